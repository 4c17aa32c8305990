"""What a tiny denoiser is: a class of diffusers by name, its settings, its inputs."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from torch import nn

Inputs = Callable[[torch.Generator], dict[str, Any]]


@dataclass(frozen=True)
class TinyModel:
    """model: class name in diffusers. zero: parameters that stock code leaves uninitialised."""

    model: str
    config: dict[str, Any]
    inputs: Inputs
    zero: tuple[str, ...] = ()

    @property
    def available(self) -> bool:
        """Whether the installed diffusers has this class."""
        return hasattr(diffusers, self.model)

    def build(self, config: dict[str, Any]) -> nn.Module:
        """The model with random weights."""
        with warnings.catch_warnings():  # stock classes warn of their own imports
            warnings.simplefilter("ignore", FutureWarning)
            model: nn.Module = getattr(diffusers, self.model)(**config)
        return model


def normal(generator: torch.Generator, *shape: int) -> torch.Tensor:
    """Normal noise from `generator`."""
    return torch.randn(shape, generator=generator)


def image_ids(height: int, width: int, columns: int = 3, reference: int = 0) -> torch.Tensor:
    """Token positions (reference, row, column[, ...]) of one image in raster order, [H * W, columns]."""
    ids = torch.zeros(height * width, columns)
    ids[:, 0] = reference
    ids[:, 1] = torch.arange(height).repeat_interleave(width)
    ids[:, 2] = torch.arange(width).repeat(height)
    return ids
