"""What the page shows of a verb: its status line, its values, and a refusal that stays readable."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from genattn.errors import GenAttnError

gr = pytest.importorskip("gradio", reason="the app needs gradio")

from genattn.apps.webui.tabs.parts import in_decibels, in_words, pixel_classes, streamed  # noqa: E402 -- after the check for gradio
from genattn.apps.webui.tabs.report import _brief  # noqa: E402
from genattn.apps.webui.verbs.job import Update  # noqa: E402


def refused() -> Iterator[Update]:
    yield Update("opening the model", values={"film": "a.mp4"})
    raise GenAttnError("--guidance-scale must be a number, got 'x'")


def test_a_refusal_stays_in_the_status_line() -> None:
    rows: list[tuple[Any, ...]] = []
    with pytest.raises(gr.Error, match="guidance scale must be a number, got 'x'"):
        rows.extend(streamed(refused(), ["film", "report"], {}))
    assert [row[0] for row in rows] == ["opening the model · 0.0 s", "**not done:** guidance scale must be a number, got 'x'"]
    assert rows[0][1] == "a.mp4"
    assert rows[1][1:] == (gr.skip(), gr.skip()), "what is shown stays as it was"


def test_options_are_named_as_fields() -> None:
    assert in_words(GenAttnError("--pattern-options must be JSON; see --out")) == "pattern options must be JSON; see out"


def test_equal_clips_are_equal() -> None:
    assert [in_decibels(value) for value in (31.26, float("inf"), None)] == ["31.3 dB", "equal", "equal"]


def test_a_run_in_brief() -> None:
    """A row of the table: the second run of a clip is the one beside dense."""
    common = {"date": "2026-01-02T03:04:05.6", "model": "tiny", "run": "r"}
    dense = {"seconds": 2.0, "psnr": 9.9, "density": 1.0, "speedup": 1.0}
    sparse = {"seconds": 1.5, "psnr": 31.26, "density": 0.254, "speedup": 1.333}
    row = _brief({**common, "verb": "video", "runs": [dense, sparse], "frames": 5})
    assert row == {
        "date": "2026-01-02 03:04:05", "verb": "video", "model": "tiny", "seconds": "3.5",
        "outcome": "density 0.25, 31.3 dB, 1.33x", "run": "r", "frames": 5,
    }  # fmt: skip
    told = [
        _brief({**common, "verb": "image", "heads": "L1H0"}),
        _brief({**common, "verb": "hunt", "heads": "L2H1", "seconds": 0.04}),
        _brief({**common, "verb": "long", "frames": 61, "frames_per_second": 2.5}),
    ]
    assert [(each["outcome"], each["seconds"]) for each in told] == [
        ("heads L1H0", "-"), ("L2H1", "0.0"), ("61 frames, 2.5 a second", "-")
    ]  # fmt: skip


def test_pixels_are_shown_where_every_model_makes_small_pictures() -> None:
    models = {"tiny": {"height": 128}, "large": {"height": 129}, "plain": {}}
    session: Any = SimpleNamespace(models={name: SimpleNamespace(defaults=told) for name, told in models.items()})
    assert pixel_classes(session, ["tiny"]) == ["small"]
    for names in (["large"], ["plain"], ["tiny", "large"]):
        assert pixel_classes(session, names) == []
