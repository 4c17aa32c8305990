"""Short marks of weights, files and precision: what was begun with some is not gone on with under others of the same name."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def model_fingerprint(models: Mapping[str, Any]) -> str:
    """A short hash over names, shapes and a sample of the values of all parameters; tells checkpoints apart, and adapters with
    the strength that each is given."""
    digest = hashlib.sha256()
    for part, model in sorted(models.items()):
        digest.update(f"{part}:{type(model).__name__}".encode())
        for name, tensor in sorted(model.state_dict().items()):
            digest.update(f"{name}{tuple(tensor.shape)}".encode() + _few(tensor))
        digest.update("".join(_adapters(model)).encode())
    return digest.hexdigest()[:16]


def pipeline_fingerprint(pipe: Any) -> str:
    """As `model_fingerprint`, over every model of a pipeline, and how its scheduler is set; of a model alone, over that."""
    models = _models(pipe)
    scheduler = (getattr(pipe, "components", None) or {}).get("scheduler")
    if scheduler is None:
        return model_fingerprint(models)
    config = {name: value for name, value in dict(scheduler.config).items() if not name.startswith("_")}
    told = [model_fingerprint(models), type(scheduler).__name__, json.dumps(config, sort_keys=True, default=str)]
    return hashlib.sha256(" ".join(told).encode()).hexdigest()[:16]


def precision(pipe: Any) -> str:
    """The kinds of numbers of a pipeline's or model's weights, "bfloat16" or "bfloat16, float32": the marks above read values,
    which may be the same in several."""
    kinds = {tensor.dtype for model in _models(pipe).values() for tensor in model.state_dict().values()}
    return ", ".join(sorted(str(kind).removeprefix("torch.") for kind in kinds if kind.is_floating_point))


def place_of(pipe: Any) -> str:
    """Where a pipeline or model computes, as "cpu" or "cuda:0"; of one whose weights wait elsewhere, where they are taken."""
    place = getattr(pipe, "_execution_device", None) or getattr(pipe, "device", None)
    if place is None:
        place = next((p.device for model in _models(pipe).values() for p in model.parameters()), "cpu")
    return str(place)


def named_file(path: str | Path) -> str:
    """A path with a mark of what stands there now. Raises OSError for a file that cannot be read."""
    return f"{path} ({hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]})"


def content_mark(path: Path) -> str:
    """A short mark of what a file or a folder of weights holds now; of large files size and ends are read."""
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    digest = hashlib.sha256()
    for file in files:
        if file.is_file():
            name = file.relative_to(path).as_posix() if path.is_dir() else ""
            digest.update(f"{name} {file.stat().st_size} ".encode() + _ends(file))
    return digest.hexdigest()[:16]


def _ends(file: Path, size: int = 1 << 20) -> bytes:
    with file.open("rb") as stream:
        first = stream.read(size)
        stream.seek(max(size, file.stat().st_size - size))
        return first + stream.read(size)


def _models(pipe: Any) -> dict[str, Any]:
    """The models among a pipeline's components; of a model alone, that."""
    import torch

    components = dict(getattr(pipe, "components", None) or {"model": pipe})
    return {name: part for name, part in components.items() if isinstance(part, torch.nn.Module)}


def _few(tensor: Any) -> bytes:
    """Sixteen values across a tensor; none where they are elsewhere (offloaded to disk)."""
    if tensor.is_meta:
        return b""
    try:
        flat = tensor.detach().flatten()
    except NotImplementedError:  # torchao's quantized tensors have no view
        flat = tensor.detach().dequantize().flatten()
    return bytes(flat[:: max(1, flat.numel() // 16)][:16].float().cpu().numpy().tobytes())


def _adapters(model: Any) -> list[str]:
    """The adapters of each layer that work, with their strength: no weight tells that."""
    told = []
    for name, layer in model.named_modules():
        scaling, active = getattr(layer, "scaling", None), getattr(layer, "active_adapters", None)
        if isinstance(scaling, Mapping) and isinstance(active, list):
            working = [] if getattr(layer, "disable_adapters", False) else active
            told.append(f"{name}:{[(each, float(scaling[each])) for each in working if each in scaling]}")
    return told
