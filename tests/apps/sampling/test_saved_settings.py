"""A settings file as the attention of a command."""

from pathlib import Path

import pytest

from genattn import GenAttnError, RadialPattern
from genattn.apps.sampling.saved_settings import attention_from_file
from genattn.seam.schedule import Schedule
from genattn.seam.settings_file import save_settings
from genattn.seam.sparse_plugin import SparsePlugin


def saved(tmp_path: Path, schedule: Schedule, impl: str = "auto") -> Path:
    file = tmp_path / "mine.json"
    save_settings(file, [SparsePlugin(RadialPattern(decay=0.3), schedule, impl)])
    return file


def test_what_the_file_keeps_dense(tmp_path: Path) -> None:
    found = attention_from_file(saved(tmp_path, Schedule(dense_steps=2, dense_layers=3, dense_last_steps=1)))
    assert (found.name, found.pattern) == ("mine", RadialPattern(decay=0.3))
    assert found.schedule == {"dense_steps": 2, "dense_layers": 3, "dense_last_steps": 1}


def test_options_win(tmp_path: Path) -> None:
    file = saved(tmp_path, Schedule(dense_steps=0.5, dense_layers=(1, 4)))
    assert attention_from_file(file).schedule == {"dense_steps": 0.5, "dense_layers": (1, 4)}
    assert attention_from_file(file, 0, 2).schedule == {"dense_steps": 0, "dense_layers": 2}


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(GenAttnError, match="--settings must name a file"):
        attention_from_file(tmp_path / "none.json")
    with pytest.raises(GenAttnError, match="names the backend 'sdpa'"):
        attention_from_file(saved(tmp_path, Schedule(), "sdpa"))
