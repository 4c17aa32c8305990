"""What people do to a model, before a plugin is applied and after, on families that differ in how they are built."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.utils.parametrize import register_parametrization

from genattn import DensePattern, NeighborhoodPattern
from genattn.guidance.passes.prediction import leaves
from genattn.pipelines.tiny.random.build import build_inputs, build_model, build_pipeline
from genattn.seam.denoiser import INJECTION
from genattn.seam.handle import apply

FAMILIES = ("wan", "flux", "sd3", "hunyuan-video", "qwen-image", "ltx", "unet")
Twin = Callable[[nn.Module], nn.Module]


def forward(model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        return leaves(model(**inputs))[0].clone()


def pickled(model: nn.Module) -> Any:
    return pickle.loads(pickle.dumps(model))


def saved(model: nn.Module) -> Any:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def of_another_class(model: nn.Module) -> nn.Module:
    model.__class__ = type("Mine", (type(model),), {})
    return model


def parametrized(model: nn.Module) -> nn.Module:
    model.register_parameter("extra", nn.Parameter(torch.ones(2)))
    register_parametrization(model, "extra", nn.Identity())  # the root's class changes
    layer = next(module for module in model.modules() if isinstance(module, nn.Linear))
    register_parametrization(layer, "weight", nn.Identity())
    return model


def sharded(model: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (1,))
    stack = next(module for module in model.modules() if isinstance(module, nn.ModuleList))
    for block in stack:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


@pytest.fixture
def one_process() -> Any:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("habit", [copy.copy, copy.deepcopy, pickled, saved], ids=lambda habit: habit.__name__)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_copy_is_stock_and_may_be_applied_to(family: str, habit: Twin) -> None:
    model, inputs = build_model(family), build_inputs(family)
    stock = forward(model, inputs)
    handle = apply(model, NeighborhoodPattern(1), dense_steps=0, dense_layers=0)
    twin = habit(model)
    assert type(twin) is type(model)
    handle.remove()
    assert INJECTION not in twin.__dict__
    assert torch.equal(forward(twin, inputs), stock)
    with apply(twin, DensePattern()) as again:
        assert torch.equal(forward(twin, inputs), stock)
        assert again.report().calls > 0
    assert torch.equal(forward(model, inputs), stock)
    assert torch.equal(forward(twin, inputs), stock)


@pytest.mark.parametrize("first", [True, False], ids=["before apply", "after apply"])
@pytest.mark.parametrize("habit", [of_another_class, parametrized, sharded], ids=lambda habit: habit.__name__)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_changed_class_in_either_order(family: str, habit: Twin, first: bool, one_process: None) -> None:
    model, inputs = build_model(family), build_inputs(family)
    stock = forward(model, inputs)
    if first:
        habit(model)
        handle = apply(model, DensePattern())
    else:
        handle = apply(model, DensePattern())
        habit(model)
    changed = type(model)
    assert torch.equal(forward(model, inputs), stock)
    assert handle.report().calls > 0
    handle.remove()
    assert type(model) is changed
    assert torch.equal(forward(model, inputs), stock)
    with apply(model, NeighborhoodPattern(1), dense_steps=0, dense_layers=0) as handle:
        forward(model, inputs)
        assert handle.report().sparse_calls > 0 or family == "unet"
    assert torch.equal(forward(model, inputs), stock)


@pytest.mark.parametrize("family", ["wan", "flux", "sd3", "unet"])
def test_components_are_handed_on_before_and_after_remove(family: str) -> None:
    """The modular way: a spec made from the model's own class takes the model, applied or not."""
    from diffusers.modular_pipelines.modular_pipeline_utils import ComponentSpec

    pipe, _ = build_pipeline(family)
    name = "unet" if family == "unet" else "transformer"
    model = getattr(pipe, name)
    stock_class = type(model)
    handle = apply(pipe, DensePattern())
    for _ in range(2):
        spec = ComponentSpec(name=name, type_hint=type(model))
        assert spec.type_hint is stock_class
        assert isinstance(model, spec.type_hint)
        again = type(pipe).from_pipe(pipe)
        assert getattr(again, name) is model
        pipe.register_modules(**{name: model})
        handle.remove()


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_update_components_takes_an_applied_denoiser() -> None:
    blocks = pytest.importorskip("diffusers.modular_pipelines.stable_diffusion_3.modular_blocks_stable_diffusion_3")
    stock, _ = build_pipeline("sd3")
    pipe = blocks.StableDiffusion3AutoBlocks().init_pipeline()
    handle = apply(stock, DensePattern())
    pipe.update_components(transformer=stock.transformer)
    assert pipe.transformer is stock.transformer
    handle.remove()
    pipe.update_components(transformer=stock.transformer)
    assert pipe.transformer is stock.transformer
