"""What every launch has in common: the device it goes to, and how the rows of its tensors lie in memory."""

import contextlib
import math
from typing import Any

import torch

Arguments = dict[str, object]


def launch(kernel: Any, grid: tuple[int, int], arguments: Arguments, like: torch.Tensor) -> None:
    """Run a jitted kernel on the device of `like`.

    Triton launches on the current device, whatever the tensors are on; a model on a second GPU would read memory that is not
    there, or race with its own stream.
    """
    with torch.cuda.device(like.device) if like.device.type == "cuda" else contextlib.nullcontext():
        kernel[grid](**arguments)


def strides_of(name: str, tensor: torch.Tensor) -> Arguments:
    """Strides of batch, sequence and heads as arguments `<name>_b`, `<name>_s`, `<name>_h`."""
    return {f"{name}_{axis}": tensor.stride(place) for place, axis in enumerate("bsh")}


def alignment(*tensors: torch.Tensor) -> int:
    """Largest power of two, at most 16, that divides the strides of batch, sequence and heads of all tensors [B, S, H, D]."""
    strides = [step for x in tensors for step, size in zip(x.stride()[:3], x.shape) if size > 1]
    return math.gcd(16, *strides)


def is_wide(*tensors: torch.Tensor) -> bool:
    """Whether the last row of a head lies 2^31 elements or more behind its first, in any of the tensors [B, S, H, D]."""
    return any(x.stride(1) * x.shape[1] >= 1 << 31 for x in tensors)


def padded(dim: int) -> int:
    """Next power of two, at least 16: what a matrix product takes."""
    return max(16, 1 << (dim - 1).bit_length())
