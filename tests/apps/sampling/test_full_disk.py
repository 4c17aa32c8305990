"""Every writer of ours on a disk that takes no more: an OSError, the old file as it was, and nothing beside it."""

import contextlib
import errno
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib import pyplot

from genattn import RadialPattern, save_video
from genattn.apps.bench.attention import plot_attention
from genattn.apps.sampling.measured_rows import append_rows, check_rows, provenance, read_rows
from genattn.apps.sampling.output_files import write_image, write_json
from genattn.apps.tuning.draw import draw_front
from genattn.apps.tuning.goal import Goal, Row
from genattn.apps.tuning.journal import Journal
from genattn.errors import GenAttnError
from genattn.geometry.token_layout import TokenLayout
from genattn.guidance.broadway.report import BroadWayReport
from genattn.guidance.headhunter.atlas import heat_map, write_picture
from genattn.guidance.heads.head_set import HeadSet
from genattn.patterns.as_json import save_pattern
from genattn.pipelines.finetune import cache
from genattn.pipelines.training.trainer import save_checkpoint
from genattn.planning.show import draw_pattern
from genattn.seam.settings_file import save_settings
from genattn.seam.sparse_plugin import SparsePlugin
from genattn.selection.profile_map import ProfileHeader, ProfileMap, write_map

resource = pytest.importorskip("resource")

NOISE = np.random.default_rng(0).integers(0, 256, (5, 64, 64, 3), dtype=np.uint8)
HEADS = HeadSet({(0, 1): 0.5}, {0: 4}, scores={(0, 1): 1.0})
ROW = Row("radial", 1, 1.0, 2.0, 0.5, 30.0, 29.0, 0.9)
BAR = {"correct": True, "case": "a", "dtype": "float32", "head_dim": 64, "impl": "cpu", "ratio": 1.0}
MAP = ProfileMap(ProfileHeader("M", 1, 1, (1, 1, 1), (1.0,), 0.3, 2, (1.0,)), {"x": torch.zeros(99)})


def _trained(path: Path) -> None:
    model = torch.nn.Linear(64, 64)
    save_checkpoint(path, model, torch.optim.AdamW(model.parameters()), {}, 1)


WRITERS: dict[str, Callable[[Path], Any]] = {
    "film.mp4": lambda path: save_video(NOISE, path),
    "film.mkv": lambda path: save_video(NOISE, path),
    "picture.png": lambda path: write_image(path, NOISE[0], {}),
    "picture.jpg": lambda path: write_image(path, NOISE[0], {}),
    "picture.webp": lambda path: write_image(path, NOISE[0], {}),
    "report.json": lambda path: write_json(path, {"a": "x" * 500}),
    "rows.csv": lambda path: append_rows(path, [{"a": "x" * 500}]),
    "bars.png": lambda path: plot_attention([BAR], path),
    "pattern.json": lambda path: save_pattern(RadialPattern(), path, {"a": "x" * 500}),
    "settings.json": lambda path: save_settings(path, [SparsePlugin(RadialPattern())]),
    "map.safetensors": lambda path: write_map(MAP, path),
    "heads.json": lambda path: HEADS.save(path),
    "heat.png": lambda path: heat_map(HEADS, path),
    "head.png": lambda path: write_picture(torch.rand(3, 64, 64), path),
    "show.svg": lambda path: draw_pattern(RadialPattern(), TokenLayout.from_grid((4, 4)), path),
    "broadway.json": lambda path: BroadWayReport().save_json(path),
    "clip.safetensors": lambda path: cache._save(path, {"x": torch.rand(99)}),
    "training.safetensors": _trained,
    "front.png": lambda path: draw_front([ROW], None, Goal(budget=2.0), path),
}


@contextlib.contextmanager
def full_disk(room: int = 32) -> Iterator[None]:
    """While entered, no file may grow beyond `room` bytes: the system refuses it as a full disk does, with another number."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_leaves_the_old_file_and_nothing_else(name: str, tmp_path: Path) -> None:
    path, write = tmp_path / name, WRITERS[name]
    write(path)
    old = path.read_bytes()
    assert len(old) > 32
    with full_disk(), pytest.raises(OSError) as told:  # noqa: PT011  its number is looked at below
        write(path)
    assert (told.value.errno, told.value.filename) == (errno.EFBIG, str(path))
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]
    path.unlink()
    open_figures = pyplot.get_fignums()
    with full_disk(), pytest.raises(OSError) as told:  # noqa: PT011
        write(path)
    assert pyplot.get_fignums() == open_figures, "a figure that stays open stays in memory"
    assert (told.value.errno, told.value.filename) == (errno.EFBIG, str(path))
    assert list(tmp_path.iterdir()) == []


def test_a_journal_whose_last_line_was_cut_off_is_cut_on_a_full_disk_too(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    journal = Journal(path, {"a": 1})
    journal.begin()
    journal.add({"setting": "radial", "prompt": 0})
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"setting": "ra')
    with full_disk():
        assert Journal(path, {"a": 1}).samples == journal.samples
    assert path.read_bytes() == whole


def test_rows_are_appended_to_what_a_spreadsheet_saved(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes("\ufeffname,value\r\nä,1\r\n".encode())
    check_rows(path)
    append_rows(path, [{"name": "b", "more": 2}])
    assert path.read_text(encoding="utf-8") == "name,value,more\nä,1,\nb,,2\n"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("name\nä\n".encode("latin-1"), "must be a CSV in UTF-8, and cannot be read"),
        (bytes(range(256)), "must be a CSV in UTF-8, and cannot be read"),
        (b"a,b\n1,2\n1,2,3\n", "must have a cell a column, and row 3 has more"),
    ],
)
def test_a_table_that_cannot_take_rows_is_refused_before_they_are_measured(content: bytes, says: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(content)
    for look in (check_rows, read_rows):
        with pytest.raises(GenAttnError, match=says):
            look(path)
    assert path.read_bytes() == content


def test_rows_that_are_appended_at_the_same_time_are_all_there(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda i: append_rows(path, [{"i": i, f"column {i % 3}": i}]), range(24)))
    assert sorted(int(row["i"]) for row in read_rows(path)) == list(range(24))
    assert all(row[f"column {int(row['i']) % 3}"] == row["i"] for row in read_rows(path))
    assert list(tmp_path.iterdir()) == [path]


def test_rows_are_measured_where_there_is_no_git(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert provenance("cpu")["commit"] in ("unknown", "not a checkout")


def test_an_installed_package_is_not_of_the_checkout_around_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import genattn

    monkeypatch.setattr(genattn, "__file__", str(tmp_path / "genattn" / "__init__.py"))
    assert provenance("cpu")["commit"] == "not a checkout"
