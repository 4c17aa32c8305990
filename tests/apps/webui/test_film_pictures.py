"""Film strips and maps of visited tiles."""

from pathlib import Path

import numpy as np
import pytest
from gradio_session import random_session

from genattn import GenAttnError, RadialPattern
from genattn.apps.webui.verbs.film_pictures import _LEFT, _TOP, film_strip, layer_map
from genattn.apps.webui.verbs.sampling import chosen_attention
from genattn.apps.webui.verbs.session import Session
from genattn.apps.webui.verbs.watched import WatchedSparse
from genattn.planning.ladder import ADAPTIVE
from genattn.seam.handle import apply
from genattn.seam.schedule import Schedule
from genattn.seam.settings_file import save_settings
from genattn.seam.sparse_plugin import SparsePlugin


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Session:
    folder = tmp_path_factory.mktemp("app")
    (folder / "mine").mkdir()
    file = folder / "mine" / "settings.json"
    save_settings(file, [SparsePlugin(RadialPattern(decay=0.2), Schedule(dense_steps=0, dense_layers=1))])
    found = random_session(folder)
    sources = [str(model.source) for model in found.models.values()]
    return Session(folder / "out", sources, found.limits, settings=[file])


def test_a_strip_shows_both_and_what_differs() -> None:
    dense = np.full((9, 100, 100, 3), 100, np.uint8)
    sparse = dense.copy()
    sparse[:, :, 50:] += 20
    strip = np.asarray(film_strip(dense, sparse, "radial"))
    assert strip.shape[1] == _LEFT + 8 * 104
    rows = [_TOP + row * 104 + 50 for row in range(3)]
    left, right = _LEFT + 10, _LEFT + 90
    assert [strip[y, left, 0] for y in rows] == [100, 100, 0]
    assert [strip[y, right, 0] for y in rows] == [100, 120, 80]


def test_a_map_is_dark_where_heads_look() -> None:
    shares = np.zeros((4, 4))
    shares[0], shares[1] = 1.0, 0.5
    drawn = np.asarray(layer_map({"layer 0": shares, "layer 1": 0.25}))
    column = drawn[18 + 5 :: 30, 60, 0][:4].astype(int)
    assert column[0] < column[1] < column[2] == column[3] == 255
    assert drawn.shape[1] == 2 * 128


@pytest.mark.parametrize("side", [7, 121, 500])
def test_a_long_plan_keeps_its_share(side: int) -> None:
    from genattn.apps.webui.verbs.film_pictures import _shrunk

    shares = np.random.default_rng(0).random((side, 2 * side)) < 0.3
    small = _shrunk(shares.astype(float))
    assert max(small.shape) <= 120 or side == 7
    assert small.mean() == pytest.approx(shares.mean(), abs=0.01)


@pytest.mark.parametrize("pattern", [RadialPattern(decay=0.2, floor=0), ADAPTIVE])
def test_what_layers_visited(session: Session, pattern: RadialPattern) -> None:
    pipe = session.open(session.check_name(None, video=True))
    watched = WatchedSparse(pattern, Schedule(dense_steps=0, dense_layers=1))
    call = {"height": 32, "width": 32, "num_frames": 9, "num_inference_steps": 2, "output_type": "latent"}
    pipe.set_progress_bar_config(disable=True)
    with apply(pipe, watched) as handle:
        pipe("a cat", **call)
        told = handle.report()
    shown = watched.pictured()
    assert list(shown) == [f"layer {n}" for n in range(1, 1 + len(shown))]
    assert told.plugins[0]["plugin"] == "SparsePlugin"
    if pattern is ADAPTIVE:
        assert all(isinstance(share, float) and 0 < share <= 1 for share in shown.values())
    else:
        shares = next(iter(shown.values()))
        assert isinstance(shares, np.ndarray)
        assert shares.shape[0] == shares.shape[1]
        assert shares.diagonal().min() == 1, "every tile sees itself"


def test_settings_are_presets(session: Session, tmp_path: Path) -> None:
    assert list(session.presets) == ["tuned: mine"]
    found = chosen_attention(session, "tuned: mine", "", 0.9, 7)
    assert (found.pattern, found.dense_steps, found.dense_layers) == (RadialPattern(decay=0.2), 0, 1)
    assert chosen_attention(session, "radial", None, 0.5, 2).dense_layers == 2
    with pytest.raises(GenAttnError, match="choose a sparse one"):
        chosen_attention(session, "dense", None, 0, 0)
    with pytest.raises(GenAttnError, match="--settings must name a file"):
        Session(tmp_path, [], settings=[tmp_path / "none.json"])
