"""A pipeline without its weights: what can be refused is refused before minutes of loading.

The folder's configs are enough to build every denoiser and autoencoder on the meta device, where tensors have shapes and no
memory. Pipelines compute their scale factors from them exactly as they do with weights, so sizes are checked by the same code.
"""

import inspect
import json
from pathlib import Path
from typing import Any

import torch


def pipeline_shell(folder: Path) -> Any | None:
    """The pipeline in `folder` with empty models, no text encoders and no tokenizers; None where it cannot be built so.

    None is no verdict: the whole pipeline must then be opened and asked.
    """
    import diffusers

    index = folder / "model_index.json"
    try:
        components: dict[str, Any] = json.loads(index.read_text())
        cls = getattr(diffusers, components["_class_name"])
        accepted = inspect.signature(cls.__init__).parameters
        parts = {name: _part(folder / name, entry) for name, entry in components.items() if name in accepted}
        pipe = cls(**{name: parts.get(name, _plain(components.get(name))) for name in _required(accepted)})
    except Exception:  # whatever a pipeline wants at its start and does not get here
        return None
    pipe.register_to_config(_name_or_path=str(folder))
    return pipe


def _part(folder: Path, entry: Any) -> Any:
    """A component on the meta device, a scheduler as it is, None for what sizes do not depend on."""
    import diffusers

    if not isinstance(entry, list):
        return _plain(entry)
    library, name = entry
    if library != "diffusers" or name is None:
        return None
    cls = getattr(diffusers, name)
    if "Scheduler" in name:
        return cls.from_pretrained(folder)
    with torch.device("meta"):
        return cls.from_config(cls.load_config(folder))


def _plain(entry: Any) -> Any:
    """A setting of the pipeline itself (a flag, a ratio), None for components."""
    return None if isinstance(entry, list) else entry


def _required(accepted: Any) -> list[str]:
    kinds = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    return [name for name, parameter in accepted.items() if name != "self" and parameter.kind not in kinds]
