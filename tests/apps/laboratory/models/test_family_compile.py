"""The compile columns: what tracing costs is bounded, and the blocks are those that attend."""

import time
from typing import Any

import pytest
from torch import nn

from genattn.apps.laboratory.models import family_compile
from genattn.apps.laboratory.models.family_trials import apply_sites
from genattn.pipelines.tiny.random.build import build_model


def test_what_takes_too_long_is_left_and_told() -> None:
    def spin() -> str:
        while True:
            try:
                sum(range(1000))
            except Exception:  # as Dynamo does
                continue

    began = time.process_time()
    assert family_compile.within(0.2, spin) == "not tried: tracing took longer than 0.2 s on one core"
    assert time.process_time() - began < 5
    assert family_compile.within(5, lambda: "yes") == "yes"


@pytest.mark.parametrize("family", ["wan", "allegro", "unet", "latte", "hunyuan-dit"])
def test_blocks_are_those_that_attend(family: str) -> None:
    """At least one for every stack, none inside another, and none of the whole model."""
    model = build_model(family)
    blocks = family_compile.blocks(model)
    assert blocks
    assert model not in blocks
    inside = {id(part) for block in blocks for part in block.modules() if part is not block}
    assert not [block for block in blocks if id(block) in inside]
    sites = apply_sites(model)
    held: list[Any] = [part for block in blocks for part in block.modules() if hasattr(part, "processor")]
    assert len(held) >= len(sites)
    assert all(isinstance(block, nn.Module) for block in blocks)
