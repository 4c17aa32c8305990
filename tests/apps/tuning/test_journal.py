"""The journal: nothing that was finished is lost, and nothing of another request is taken."""

import json
from pathlib import Path
from typing import Any

import pytest

from genattn.apps.tuning.journal import Journal
from genattn.errors import GenAttnError

REQUEST = {"model": "a", "prompts": ["a cat"]}


def written(path: Path) -> Journal:
    journal = Journal(path, REQUEST)
    journal.begin()
    journal.add({"setting": "radial", "prompt": 0, "psnr": float("inf")})
    return journal


def test_finished_runs_are_there_again(tmp_path: Path) -> None:
    written(tmp_path / "j.jsonl").add({"setting": "radial", "prompt": 1})
    found = Journal(tmp_path / "j.jsonl", REQUEST)
    assert found.done("radial", 0)
    assert found.done("radial", 1)
    assert not found.done("radial", 2)
    assert not found.done("gna", 0)
    assert found.samples[0]["psnr"] == float("inf")


@pytest.mark.parametrize("cut", range(1, 60))
def test_a_line_that_a_kill_cut_off_is_forgotten(cut: int, tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    written(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    found = Journal(path, REQUEST)
    assert found.samples == []
    found.begin()
    found.add({"setting": "radial", "prompt": 0, "psnr": float("inf")})
    assert path.read_bytes() == whole


def test_an_unused_journal_leaves_no_file(tmp_path: Path) -> None:
    Journal(tmp_path / "j.jsonl", REQUEST)
    assert not (tmp_path / "j.jsonl").exists()


def test_runs_of_other_weights_are_not_taken(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    first = Journal(path, REQUEST)
    assert first.begun is None
    first.made_with("aa", "CPU, float32")
    first.begin()
    first.add({"setting": "radial", "prompt": 0})
    again = Journal(path, REQUEST)
    again.made_with("aa", "CPU, float32")
    assert again.begun == {**REQUEST, "weights": "aa", "machine": "CPU, float32"}
    assert again.done("radial", 0)
    with pytest.raises(GenAttnError, match="j.jsonl belongs to a request with other weights; name another --out, or delete"):
        Journal(path, REQUEST).made_with("bb", "CPU, float32")
    says = r"other machine \(CPU, float32; here CPU, bfloat16\); name another --out"
    with pytest.raises(GenAttnError, match=says):
        Journal(path, REQUEST).made_with("aa", "CPU, bfloat16")


def test_refusals(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    written(path)
    with pytest.raises(GenAttnError, match="belongs to a request with other model, seed"):
        Journal(path, {"model": "b", "prompts": ["a cat"], "seed": 3})
    path.write_text('{"setting": "radial"}\n')
    with pytest.raises(GenAttnError, match="must begin with the request"):
        Journal(path, REQUEST)
    path.write_text('{"request": {}}\nnonsense\n{}\n')
    with pytest.raises(GenAttnError, match="line 2 of .* is damaged"):
        Journal(path, REQUEST)
    path.write_text('{"request": {}}\n[3]\n')
    with pytest.raises(GenAttnError, match="one JSON object a line"):
        Journal(path, REQUEST)


@pytest.mark.parametrize(
    "change",
    [
        {"setting": 3},
        {"prompt": "0"},
        {"prompt": -1},
        {"prompt": True},
        {"psnr": "x"},
        {"psnr": None},
        {"seconds": []},
        {"oracle": "x"},
        {"ssim": float("nan")},
    ],
)
def test_a_run_that_is_none_is_refused_with_its_line(change: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    journal = written(path)
    journal.add({"setting": "gna", "prompt": 0, "seconds": 1.0, "oracle": None} | change)
    with pytest.raises(GenAttnError, match="(line 3 of .*j.jsonl is damaged|must be )"):
        Journal(path, REQUEST)


def test_a_line_without_a_setting_is_refused(tmp_path: Path) -> None:
    written(tmp_path / "j.jsonl")._append({"prompt": 0})
    with pytest.raises(GenAttnError, match="line 3 of .* is damaged"):
        Journal(tmp_path / "j.jsonl", REQUEST)


@pytest.mark.parametrize("change", [{"psnr": 99.0}, {"check": "00000000"}, {"check": None}, {"more": 1}])
def test_a_run_that_was_changed_by_hand_is_refused(change: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    written(path).add({"setting": "gna", "prompt": 0, "psnr": 30.0})
    *before, last = path.read_text().splitlines()
    path.write_text("\n".join([*before, json.dumps(json.loads(last) | change)]) + "\n")
    with pytest.raises(GenAttnError, match="(line 3 of .* was changed by hand .*its values are not those|must be )"):
        Journal(path, REQUEST)
    path.write_text("\n".join(before) + "\n")
    assert [line["setting"] for line in Journal(path, REQUEST).samples] == ["radial"]
