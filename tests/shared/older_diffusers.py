"""What an older diffusers lacks, for tests that ask for more than it has."""

from typing import Any

import diffusers
import pytest
import torch

from genattn.pipelines.tiny.random.build import families
from genattn.pipelines.tiny.random.models import MODELS

BEFORE_041 = tuple(int(part) for part in diffusers.__version__.split(".")[:2]) < (0, 41)
ABSENT = {spec.model for spec in MODELS.values()} - {MODELS[name].model for name in families()}
"""Denoisers that came later."""


def needs(family: str) -> None:
    """Skip where the installed version has no denoiser of this family."""
    if family not in families():
        pytest.skip(f"diffusers {diffusers.__version__} has no {family}")


def offload_layers(model: Any) -> None:
    """Group offloading on the processor alone, every layer by itself; skip where diffusers' own code cannot begin it."""
    if BEFORE_041 and torch.accelerator.current_accelerator() is None:
        pytest.skip("before 0.41 diffusers' group offloading asks an accelerator for its type, and none is here")
    cpu = torch.device("cpu")
    model.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type="leaf_level")
