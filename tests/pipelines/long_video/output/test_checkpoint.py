"""Checkpoints: there is always one complete one, whatever fails while the next is written."""

import errno
import json
import os
import random

import pytest
import torch
from damage import damaged, scrambled
from safetensors.torch import save_file

from genattn.errors import GenAttnError
from genattn.pipelines.long_video.output import checkpoint as checkpoint


def test_tensors_and_record_come_back(tmp_path):
    tensors = {"a": torch.randn(2, 3)[:, ::2], "b": torch.arange(4)}
    checkpoint.save_checkpoint(tmp_path / "new", tensors, {"tick": 3, "more": {"x": [1, None]}})
    record = checkpoint.read_record(tmp_path / "new")
    back = checkpoint.read_tensors(tmp_path / "new", record)
    assert record["more"] == {"x": [1, None]}
    assert all(torch.equal(back[name], tensor) for name, tensor in tensors.items())


def test_the_old_tensor_file_goes_only_when_the_new_record_stands(tmp_path):
    checkpoint.save_checkpoint(tmp_path, {"a": torch.zeros(1)}, {"tick": 1})
    checkpoint.save_checkpoint(tmp_path, {"a": torch.ones(1)}, {"tick": 2})
    assert [p.name for p in tmp_path.glob("state*")] == ["state-00000002.safetensors"]
    # the same tick again (a stop right after a checkpoint) takes another name, and back
    for value in (2, 3):
        checkpoint.save_checkpoint(tmp_path, {"a": value * torch.ones(1)}, {"tick": 2})
        assert checkpoint.read_checkpoint(tmp_path)[1]["a"] == value
        assert len(list(tmp_path.glob("state*"))) == 1


@pytest.mark.parametrize("place", ["tensors", "record"])
def test_a_failed_write_keeps_the_old_checkpoint_and_leaves_no_scraps(tmp_path, monkeypatch, place):
    checkpoint.save_checkpoint(tmp_path, {"a": torch.zeros(1)}, {"tick": 1})

    def full(*args, **kwargs):
        if place == "tensors":
            save_file(args[0], args[1])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file" if place == "tensors" else "_write_whole", full)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save_checkpoint(tmp_path, {"a": torch.ones(1)}, {"tick": 2})
    monkeypatch.undo()
    assert checkpoint.read_record(tmp_path)["tick"] == 1
    assert checkpoint.read_tensors(tmp_path, checkpoint.read_record(tmp_path))["a"] == 0
    assert not list(tmp_path.glob("*.partial"))


def test_what_safetensors_says_of_a_full_disk_is_an_os_error(tmp_path, monkeypatch):
    class SafetensorError(Exception):
        pass

    def full(*args, **kwargs):
        raise SafetensorError("I/O error: No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save_checkpoint(tmp_path, {"a": torch.ones(1)}, {"tick": 2})


def test_a_record_that_cannot_be_written_leaves_no_scrap(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError, match="broken"):
        checkpoint._write_whole(tmp_path / "a.json", "{}")
    assert not list(tmp_path.iterdir())


def test_names_cannot_lead_out_of_the_folder(tmp_path):
    checkpoint.save_checkpoint(tmp_path / "run", {"a": torch.zeros(1)}, {"tick": 1})
    path = tmp_path / "run" / "checkpoint.json"
    record = {**json.loads(path.read_text()), "tensors": "../../etc/passwd"}
    with pytest.raises(GenAttnError, match=r"run/passwd is named by the checkpoint"):
        checkpoint.read_tensors(tmp_path / "run", record)
    path.write_text(json.dumps(record))
    with pytest.raises(GenAttnError, match=r"checkpoint\.json is damaged or was changed by hand"):
        checkpoint.read_record(tmp_path / "run")


def test_differences_are_named():
    saved = {"a": 1, "b": {"c": [1, 2], "d": None}}
    checkpoint.check_same(saved, {"a": 1, "b": {"c": (1, 2), "d": None}}, "settings")
    with pytest.raises(GenAttnError, match=r"other settings: a was 1, is 2; b\.c was \[1, 2\], is \[1\]"):
        checkpoint.check_same(saved, {"a": 2, "b": {"c": [1], "d": None}}, "settings")
    with pytest.raises(GenAttnError, match="and 2 more"):
        checkpoint.check_same(dict.fromkeys("abcdef", 1), {}, "settings")


def test_python_3_10_has_all_that_a_checkpoint_needs(tmp_path, monkeypatch):
    monkeypatch.delattr("hashlib.file_digest", raising=False)
    checkpoint.save_checkpoint(tmp_path, {"a": torch.zeros(2)}, {"tick": 1})
    assert checkpoint.read_checkpoint(tmp_path)[1]["a"].tolist() == [0, 0]


def test_a_checkpoint_replaced_while_it_is_read_is_read_again(tmp_path, monkeypatch):
    checkpoint.save_checkpoint(tmp_path, {"a": torch.zeros(1)}, {"tick": 1})
    real = checkpoint.read_tensors

    def slow(folder, record):
        if record["tick"] == 1:
            checkpoint.save_checkpoint(tmp_path, {"a": torch.ones(1)}, {"tick": 2})
        return real(folder, record)

    monkeypatch.setattr(checkpoint, "read_tensors", slow)
    record, tensors = checkpoint.read_checkpoint(tmp_path)
    assert (record["tick"], float(tensors["a"])) == (2, 1.0)


@pytest.mark.parametrize("part", ["record", "record's values", "tensors"])
def test_a_damaged_checkpoint_is_refused_or_whole(tmp_path, part):
    tensors = {"latents": torch.randn(2, 3, 4), "numbers": torch.arange(5)}
    record = {"tick": 3, "settings": {"seed": 1, "eta": 0.25, 7: [None, "ä"]}, "film": {"bytes": 10}}
    state = checkpoint.save_checkpoint(tmp_path, tensors, record)
    stock = checkpoint.read_record(tmp_path)
    file = state if part == "tensors" else tmp_path / "checkpoint.json"
    content, generator, refused = file.read_bytes(), random.Random(part), 0
    for _ in range(200):
        if part == "record's values":
            file.write_text(json.dumps(damaged(json.loads(content), generator)))
        else:
            file.write_bytes(scrambled(content, generator))
        try:
            found, back = checkpoint.read_checkpoint(tmp_path)
        except GenAttnError:
            refused += 1
            continue
        assert found == stock
        assert back.keys() == tensors.keys()
        assert all(torch.equal(back[name], tensor) for name, tensor in tensors.items())
    assert refused > 150


def test_a_record_that_is_no_object_and_tensors_that_are_none_are_refused(tmp_path):
    state = checkpoint.save_checkpoint(tmp_path, {"a": torch.ones(2)}, {"tick": 1})
    record = checkpoint.read_record(tmp_path)
    state.write_bytes(b"not safetensors")
    with pytest.raises(GenAttnError, match=r"is damaged \(its check sum is another one\); copy the run's folder again"):
        checkpoint.read_tensors(tmp_path, record)
    with pytest.raises(GenAttnError, match="is damaged .*; copy the run's folder again"):
        checkpoint.read_tensors(tmp_path, record | {checkpoint._TENSOR_SUM: checkpoint._sum_of(state)})
    (tmp_path / "checkpoint.json").write_text("[1]")
    with pytest.raises(GenAttnError, match="must hold an object, got list; it was changed by hand"):
        checkpoint.read_record(tmp_path)
