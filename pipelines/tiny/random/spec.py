"""What a tiny denoiser is: a class of diffusers by name, its settings, its inputs."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from torch import nn

Inputs = Callable[..., dict[str, Any]]


@dataclass(frozen=True)
class TinyModel:
    """A class of diffusers at a tiny size.

    model: class name in diffusers. inputs: (generator, raster of tokens) -> keyword arguments. zero: parameters that stock
    code leaves uninitialised. latents, axes: the input that holds the latents, and what its axes are: B samples, C channels,
    F frames, H rows, W columns, S tokens one behind the other; in brackets when a list has one tensor per sample. large: a
    raster on which a pattern leaves out a fair share of the scores, None where a table of the model ends before. prepare:
    what the pipeline does to the model first. since: the first diffusers whose class takes these settings and inputs.
    """

    model: str
    config: dict[str, Any]
    inputs: Inputs
    zero: tuple[str, ...] = ()
    latents: str = "hidden_states"
    axes: str = "BCFHW"
    large: tuple[int, ...] | None = (12, 8, 6)
    prepare: Callable[[nn.Module], None] | None = None
    since: tuple[int, int] = (0, 0)

    @property
    def available(self) -> bool:
        """Whether the installed diffusers has this class as it is here; nothing of it is imported."""
        here = tuple(int(part) for part in diffusers.__version__.split(".")[:2])
        return self.model in dir(diffusers) and here >= self.since

    def build(self, config: dict[str, Any]) -> nn.Module:
        """The model with random weights."""
        with warnings.catch_warnings():  # stock classes warn of their own imports
            warnings.simplefilter("ignore", FutureWarning)
            model: nn.Module = getattr(diffusers, self.model)(**config)
        if self.prepare is not None:
            self.prepare(model)
        return model


def normal(generator: torch.Generator, *shape: int) -> torch.Tensor:
    """Normal noise from `generator`."""
    return torch.randn(shape, generator=generator)


def latents(grid: tuple[int, ...], patch: int = 2) -> tuple[int, ...]:
    """The shape of the latents of a raster of tokens, patched on rows and columns."""
    *before, height, width = grid
    return (*before, patch * height, patch * width)


def image_ids(grid: tuple[int, ...], columns: int = 3, reference: int = 0) -> torch.Tensor:
    """Token positions (reference, row, column[, ...]) of one image in raster order, [H * W, columns]."""
    height, width = grid
    ids = torch.zeros(height * width, columns)
    ids[:, 0] = reference
    ids[:, 1] = torch.arange(height).repeat_interleave(width)
    ids[:, 2] = torch.arange(width).repeat(height)
    return ids
