"""NAG beside torch.compile: blocks may be compiled; a model compiled as a whole, either way, is refused in words."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

import genattn
from genattn.errors import GenAttnError
from genattn.guidance.nag import NAG
from genattn.pipelines.tiny.random.build import build_pipeline

Put = Callable[[Any], None]
pytestmark = pytest.mark.compiled


def in_place(pipe: Any) -> None:
    pipe.transformer.compile(backend="eager", fullgraph=True)


def around(pipe: Any) -> None:
    pipe.transformer = torch.compile(pipe.transformer, backend="eager", fullgraph=True)


def blocks(pipe: Any) -> None:
    pipe.transformer.compile_repeated_blocks(backend="eager")


def sampled(pipe: Any, kwargs: dict[str, Any]) -> torch.Tensor:
    given = {**kwargs, "guidance_scale": 1.0, "output_type": "latent", "generator": torch.Generator().manual_seed(0)}
    given.pop("negative_prompt", None)
    out: torch.Tensor = pipe(**given)[0]
    return out


@pytest.mark.parametrize("order", ["apply first", "apply last"])
@pytest.mark.parametrize("put", [in_place, around], ids=lambda put: put.__name__)
def test_a_model_compiled_as_a_whole_is_refused(put: Put, order: str) -> None:
    pipe, kwargs = build_pipeline("wan")
    stock = sampled(pipe, kwargs)
    if order == "apply last":
        put(pipe)
    with genattn.apply(pipe, NAG("red", scale=4.0)):
        if order == "apply first":
            put(pipe)
        with pytest.raises(GenAttnError, match="got WanTransformer3DModel compiled as a whole; compile its blocks instead"):
            sampled(pipe, kwargs)
    assert (sampled(pipe, kwargs) - stock).abs().max() <= 1e-5


def test_compiled_blocks_are_guided() -> None:
    pipe, kwargs = build_pipeline("wan")
    stock = sampled(pipe, kwargs)
    with genattn.apply(pipe, NAG("red", scale=4.0)):
        expected = sampled(pipe, kwargs)
        blocks(pipe)
        found = sampled(pipe, kwargs)
    assert (expected - stock).abs().max() > 1e-4
    assert (found - expected).abs().max() <= 1e-5
