"""Which heights, widths and frame counts a pipeline can take, and the nearest ones to what was asked."""

import math
from typing import Any

from genattn.errors import GenAttnError


def spatial_multiple(pipe: Any) -> int:
    """Pixels that height and width must be a multiple of: VAE compression x patch size, and the pipeline's own rule."""
    compression = _first(pipe, "vae_scale_factor_spatial", "vae_spatial_compression_ratio", "vae_scale_factor") or 8
    patch = _patch(_denoiser(pipe))[-1]
    # the pipelines' own checks: 8 by habit, 16 for Wan and HunyuanVideo, 32 for LTX
    own = {"Wan": 16, "Hunyuan": 16, "SkyReels": 16, "LTX": 32, "Cosmos": 16}
    rule = next((n for name, n in own.items() if type(pipe).__name__.startswith(name)), 8)
    return math.lcm(int(compression) * patch, rule)


def temporal_multiple(pipe: Any) -> int | None:
    """k such that frame counts k * n + 1 are legal; None when any count is."""
    factor = _first(
        pipe, "vae_scale_factor_temporal", "vae_temporal_compression_ratio", "temporal_vae_scale_factor"
    ) or getattr(getattr(getattr(pipe, "vae", None), "config", None), "temporal_compression_ratio", None)
    if factor is None or int(factor) == 1:
        return None
    return int(factor) * (_patch(_denoiser(pipe))[0] if hasattr(_denoiser(pipe).config, "patch_size_t") else 1)


def check_size(pipe: Any, height: int, width: int, frames: int | None) -> None:
    """Raise GenAttnError if `pipe` cannot make this size, naming the nearest legal ones."""
    multiple = spatial_multiple(pipe)
    for name, value in (("height", height), ("width", width)):
        if value < multiple or value % multiple:
            raise GenAttnError(
                f"{name} must be a positive multiple of {multiple} for {type(pipe).__name__}, got {value}; "
                f"nearest: {_nearest(value, multiple, 0)}"
            )
    if frames is None:
        return
    temporal = temporal_multiple(pipe)
    if frames < 1:
        raise GenAttnError(f"frames must be >= 1, got {frames}")
    if temporal is not None and (frames - 1) % temporal:
        raise GenAttnError(
            f"frames must be {temporal} * n + 1 for {type(pipe).__name__}, got {frames}; "
            f"nearest: {_nearest(frames, temporal, 1)}"
        )


def _nearest(value: int, multiple: int, offset: int) -> str:
    """The legal values just below and above."""
    below = (value - offset) // multiple * multiple + offset
    smallest = offset or multiple
    found = sorted({max(smallest, below), max(smallest, below + multiple)})
    return " or ".join(map(str, found))


def _denoiser(pipe: Any) -> Any:
    for name in ("transformer", "unet"):
        if getattr(pipe, name, None) is not None:
            return getattr(pipe, name)
    raise GenAttnError(f"{type(pipe).__name__} has neither a transformer nor a unet; genattn cannot serve it")


def _patch(model: Any) -> tuple[int, int]:
    """(temporal, spatial) patch size."""
    patch = getattr(model.config, "patch_size", 1) or 1
    if isinstance(patch, (tuple, list)):
        return (int(patch[0]) if len(patch) == 3 else 1, int(patch[-1]))
    return (int(getattr(model.config, "patch_size_t", None) or 1), int(patch))


def _first(owner: Any, *names: str) -> int | None:
    return next((getattr(owner, n) for n in names if getattr(owner, n, None)), None)
