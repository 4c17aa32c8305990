"""SoftPAG beside compilation and offload, and without a map of all queries and keys."""

from collections.abc import Callable
from typing import Any

import older_diffusers
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import genattn
from genattn.guidance.softpag.softpag import SoftPAG
from genattn.pipelines.tiny.random.build import build_inputs, build_model, build_pipeline

HEADS = {(1, 1): 0.6, (2, 0): 1.0}
Put = Callable[[Any], Any]
pytestmark = pytest.mark.compiled


def compiled_regionally(pipe: Any) -> None:
    # as `compile_repeated_blocks` does, which SD3 does not offer
    for block in (
        pipe.transformer.transformer_blocks if hasattr(pipe.transformer, "transformer_blocks") else pipe.transformer.blocks
    ):
        block.compile(backend="eager", fullgraph=True)


def compiled_whole(pipe: Any) -> None:
    pipe.transformer.compile(backend="eager", fullgraph=True)


def compiled_around(pipe: Any) -> None:
    pipe.transformer = torch.compile(pipe.transformer, backend="eager", fullgraph=True)


def group_offload(pipe: Any) -> None:
    older_diffusers.offload_layers(pipe.transformer)


def model_offload(pipe: Any) -> None:
    import accelerate

    accelerate.cpu_offload_with_hook(pipe.transformer, execution_device="cpu")


def sampled(pipe: Any, kwargs: dict[str, Any]) -> torch.Tensor:
    out: torch.Tensor = pipe(**{**kwargs, "output_type": "latent", "generator": torch.Generator().manual_seed(0)})[0]
    return out


@pytest.mark.parametrize("order", ["apply first", "apply last"])
@pytest.mark.parametrize(
    "put",
    [compiled_regionally, compiled_whole, compiled_around, group_offload, model_offload],
    ids=lambda put: put.__name__,
)
@pytest.mark.parametrize("family", ["sd3", "wan"])
def test_the_guided_latents_are_those_of_the_plain_pipeline(family: str, put: Put, order: str) -> None:
    plain, kwargs = build_pipeline(family)
    stock = sampled(plain, kwargs)
    with genattn.apply(plain, SoftPAG(HEADS, scale=3.0)):
        expected = sampled(plain, kwargs)
    assert (expected - stock).abs().max() > 1e-3
    pipe, kwargs = build_pipeline(family)
    if order == "apply last":
        put(pipe)
    handle = genattn.apply(pipe, SoftPAG(HEADS, scale=3.0))
    if order == "apply first":
        put(pipe)
    assert (sampled(pipe, kwargs) - expected).abs().max() <= 1e-5
    if put in (compiled_whole, compiled_around):  # a graph for every exchange of blocks would soon be too many
        (told,) = handle.plugins[0].describe()["models"].values()
        assert "the model is compiled as a whole" in told["why_whole"]
    handle.remove()
    assert (sampled(pipe, kwargs) - stock).abs().max() <= 1e-5


class Largest(TorchDispatchMode):
    """Remembers the results that have `length` or more along two axes."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length, self.found = length, list[torch.Size]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple | list) else [out]:
            if isinstance(value, torch.Tensor) and sum(size >= self.length for size in value.shape) > 1:
                self.found.append(value.shape)
        return out


@pytest.mark.parametrize("target", ["identity", "identity_image", "image_to_image", "uniform", "mean_query"])
def test_no_map_of_all_queries_and_keys_is_made(target: str) -> None:
    model, inputs = build_model("sd3", sample_size=64, pos_embed_max_size=64), build_inputs("sd3")
    inputs["hidden_states"] = torch.randn(2, inputs["hidden_states"].shape[1], 64, 64)
    tokens = (64 // model.config.patch_size) ** 2
    assert tokens >= 1024
    # the watch itself must see a map where there is one
    with Largest(tokens) as watch, torch.no_grad():
        torch.softmax(torch.randn(1, 1, tokens, 4) @ torch.randn(1, 1, 4, tokens), -1)
    assert watch.found
    plugin = SoftPAG(HEADS, scale=3.0, target=target, layout="single")
    with genattn.apply(model, plugin), torch.no_grad(), Largest(tokens) as watch:
        model(**inputs, return_dict=False)
    assert watch.found == []
