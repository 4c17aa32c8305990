"""A run on disk: tensors in safetensors, the rest in JSON, replaced as a whole so that there is always one complete checkpoint.

    DIR/checkpoint.json          versions, settings, fingerprint of the model, counters; names the tensor file; check sums
    DIR/state-<tick>.safetensors queue, solver history, decoder caches, memory

The tensor file is written first under a name that no record on disk has, the JSON is then replaced in one rename, and only
then the old tensor file goes; each is on disk before the next begins (`durable`).
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import genattn
from genattn.errors import GenAttnError
from genattn.pipelines.long_video.output.durable import make_folder, replace_synced

FORMAT = 2
_NAME = "checkpoint.json"
_OWN_SUM, _TENSOR_SUM = "sha256", "tensors_sha256"


def save_checkpoint(folder: str | os.PathLike[str], tensors: Mapping[str, torch.Tensor], record: Mapping[str, Any]) -> Path:
    """Put a checkpoint into `folder`, replacing the one there; gives the tensor file's path.

    record: JSON-ready; must hold "tick". A failed write (disk full) leaves the old checkpoint and is raised as OSError.
    """
    folder = Path(folder)
    make_folder(folder)
    previous = _read(folder)
    named = None if previous is None else str(previous.get("tensors"))
    state = folder / f"state-{int(record['tick']):08d}.safetensors"
    if named == state.name:
        # a second checkpoint of one tick: the file that the record on disk names must stay what it is until that goes
        state = state.with_stem(f"{state.stem}-more")
    scratch = folder / "state.partial"
    try:
        _write_tensors(scratch, tensors)
        replace_synced(scratch, state)
        told = {"format": FORMAT, "genattn": genattn.__version__, "tensors": state.name, _TENSOR_SUM: _sum_of(state)}
        body = json.loads(json.dumps({**told, **record}))
        _write_whole(folder / _NAME, json.dumps({**body, _OWN_SUM: _seal(body)}, indent=1))
    except Exception:
        scratch.unlink(missing_ok=True)
        raise
    for old in folder.glob("state-*.safetensors"):
        # the one before, and what a power cut may have left without a record
        if old.name != state.name:
            old.unlink(missing_ok=True)
    return state


def _sum_of(path: Path) -> str:
    digest = hashlib.sha256()  # hashlib.file_digest came with Python 3.11
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def _seal(body: Mapping[str, Any]) -> str:
    """Check sum of a record as JSON gives it back, without its own."""
    rest = {name: value for name, value in body.items() if name != _OWN_SUM}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    try:
        save_file({name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}, path)
    except OSError:
        raise
    except Exception as error:
        # safetensors reports a full disk as an error of its own
        raise OSError(str(error)) from error


def _write_whole(path: Path, text: str) -> None:
    scratch = path.with_suffix(".partial")
    try:
        scratch.write_text(text, encoding="utf-8")
        replace_synced(scratch, path)
    except OSError:
        scratch.unlink(missing_ok=True)
        raise


def _read(folder: Path) -> dict[str, Any] | None:
    path = folder / _NAME
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def read_record(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The JSON part of a checkpoint; refuses a folder without one, one of another version, and one that was changed since."""
    folder = Path(folder)
    try:
        record = _read(folder)
    except (ValueError, RecursionError) as error:
        raise GenAttnError(
            f"{folder / _NAME} is no valid JSON ({error}); it was changed by hand, start the run anew"
        ) from error
    if record is None:
        raise GenAttnError(f"{folder} holds no {_NAME}; pass the folder of a run that was started with folder=...")
    if not isinstance(record, dict):
        raise GenAttnError(f"{folder / _NAME} must hold an object, got {type(record).__name__}; it was changed by hand")
    if record.get("format") != FORMAT:
        raise GenAttnError(f"{folder} was written in checkpoint format {record.get('format')}, this version reads {FORMAT}")
    if record.get("genattn") != genattn.__version__:
        raise GenAttnError(
            f"{folder} was written by genattn {record.get('genattn')}, this is {genattn.__version__}; "
            "a run goes on to the bit only with the version that began it"
        )
    if record.get(_OWN_SUM) != _seal(record):
        raise GenAttnError(f"{folder / _NAME} is damaged or was changed by hand; copy the run's folder again, or start it anew")
    return record


def read_tensors(folder: str | os.PathLike[str], record: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The tensor part of a checkpoint."""
    path = Path(folder) / Path(str(record["tensors"])).name
    if not path.exists():
        raise GenAttnError(f"{path} is named by the checkpoint and must exist; it was moved or deleted")
    try:
        if _sum_of(path) != record[_TENSOR_SUM]:
            raise GenAttnError(f"{path} is damaged (its check sum is another one); copy the run's folder again")
        return dict(load_file(path))
    except (SafetensorError, OSError) as error:
        raise GenAttnError(f"{path} is damaged ({error}); copy the run's folder again") from None


def read_checkpoint(folder: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Record and tensors that belong together, also while another process of the same run replaces them."""
    record = read_record(folder)
    try:
        return record, read_tensors(folder, record)
    except GenAttnError:
        if read_record(folder)["tensors"] == record["tensors"]:
            raise
        return read_checkpoint(folder)


def check_same(saved: Mapping[str, Any], now: Mapping[str, Any], what: str) -> None:
    """Refuse to go on when settings differ; names what differs, old and new."""
    flat_saved, flat_now = _flat(saved), _flat(now)
    wrong = [k for k in sorted(flat_saved.keys() | flat_now.keys()) if flat_saved.get(k) != flat_now.get(k)]
    if wrong:
        shown = "; ".join(f"{k} was {flat_saved.get(k)!r}, is {flat_now.get(k)!r}" for k in wrong[:4])
        more = f" and {len(wrong) - 4} more" if len(wrong) > 4 else ""
        raise GenAttnError(f"the checkpoint belongs to other {what}: {shown}{more}; resume with what began the run")


def _flat(tree: Any, name: str = "") -> dict[str, Any]:
    if isinstance(tree, Mapping):
        out: dict[str, Any] = {}
        for key, value in tree.items():
            out.update(_flat(value, f"{name}.{key}" if name else str(key)))
        return out
    return {name: json.loads(json.dumps(tree))}
