"""What a pipeline's call takes and gives, for stock pipelines and for modular ones, whose blocks say it themselves."""

import inspect
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

_FILMS, _PICTURES = "videos", "images"


def is_modular(pipe: Any) -> bool:
    """Whether its denoising loop is put together from blocks (diffusers' ModularPipeline)."""
    return hasattr(pipe, "blocks") and hasattr(pipe, "load_components")


def taken_arguments(pipe: Any) -> Mapping[str, Any]:
    """Default by name of every argument of a call; None where there is none."""
    if is_modular(pipe):
        return {given.name: given.default for given in pipe.blocks.inputs if given.name}
    empty = inspect.Parameter.empty
    parameters = inspect.signature(pipe.__call__).parameters
    return {name: None if p.default is empty else p.default for name, p in parameters.items()}


def sample_frames(pipe: Any, **call: Any) -> npt.NDArray[np.floating[Any]]:
    """The frames of one film [T, H, W, 3] or pictures [N, H, W, 3] in [0, 1] that a call gives."""
    if not is_modular(pipe):
        output = pipe(**call, output_type="np")
        return np.asarray(output.frames[0] if hasattr(output, "frames") else output.images)
    given = {str(each.name) for each in pipe.blocks.outputs}
    name = _FILMS if _FILMS in given else _PICTURES
    frames = pipe(**call, output_type="np", output=name)
    return np.asarray(frames[0] if name == _FILMS else frames)


def own_size(pipe: Any) -> dict[str, Any]:
    """Height, width and frames that a modular pipeline names as its own; empty where it works them out in its blocks."""
    names = {"height": "default_height", "width": "default_width", "num_frames": "default_num_frames"}
    found = {name: getattr(pipe, own, None) for name, own in names.items()}
    return {name: value for name, value in found.items() if value is not None}


def source_of(pipe: Any) -> str:
    """Folder or hub id that the pipeline was loaded from, "." when it was not."""
    told = getattr(pipe, "_pretrained_model_name_or_path", None) or getattr(pipe.config, "_name_or_path", None)
    return str(told or ".")


def source_makes_video(source: str) -> bool:
    """Whether the modular pipeline of a folder or hub id takes a number of frames; nothing of it is loaded but its blocks."""
    from diffusers import ModularPipeline

    return "num_frames" in taken_arguments(ModularPipeline.from_pretrained(source, trust_remote_code=False))
