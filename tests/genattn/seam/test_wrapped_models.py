"""Models inside the wrappers of other libraries: their own sites, names and layouts, whichever came first."""

import copy
import functools
import pickle
from typing import Any

import pytest
import torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing, checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from genattn import GenAttnError, RadialPattern, apply
from genattn.pipelines.tiny.random.build import build_inputs, build_model, build_pipeline
from genattn.seam.sites import unwrapped

PATTERN = RadialPattern(decay=0.2, floor=0)
ALL = {"dense_steps": 0, "dense_layers": 0}


def forward(model: Any) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model(**build_inputs("wan"), return_dict=False)[0]
    return out


@pytest.fixture(scope="module")
def wanted() -> torch.Tensor:
    model = build_model("wan")
    with apply(model, PATTERN, **ALL):
        return forward(model)


@pytest.fixture
def process_group(tmp_path: Any) -> Any:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def lora(model: Any) -> Any:
    peft = pytest.importorskip("peft", reason="LoRA adapters need peft, the train extra")
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["to_q", "to_k"]))


def test_peft_around_the_model(wanted: torch.Tensor) -> None:
    outer = lora(build_model("wan"))
    with apply(outer, PATTERN, **ALL) as handle:
        torch.testing.assert_close(forward(outer), wanted)
        report = handle.report()
    assert (report.sparse_calls, report.calls) == (3, 3)
    assert [row["site"] for row in report.sites] == [f"blocks.{i}.attn1" for i in range(3)]


def test_peft_that_came_later(wanted: torch.Tensor) -> None:
    model = build_model("wan")
    stock = forward(model)
    handle = apply(model, PATTERN, **ALL)
    outer = lora(model)
    torch.testing.assert_close(forward(outer), wanted)
    handle.remove()
    torch.testing.assert_close(forward(outer), stock)


class OnlyChild(torch.nn.Module):
    """As FullyShardedDataParallel and DeepSpeedEngine hold a model, which need an accelerator to be made."""

    def __init__(self, name: str, inner: Any) -> None:
        super().__init__()
        self.add_module(name, inner)


@pytest.mark.filterwarnings("ignore:.*script_method. is deprecated:DeprecationWarning")  # torch's own, on loading inductor
@pytest.mark.parametrize(
    ("cls", "child"),
    [
        ("FullyShardedDataParallel", "_fsdp_wrapped_module"),
        ("DeepSpeedEngine", "module"),
        ("DataParallel", "module"),
        ("CheckpointWrapper", "_checkpoint_wrapped_module"),
        ("OptimizedModule", "_orig_mod"),
    ],
)
def test_the_model_inside_is_found_by_the_wrappers_name(cls: str, child: str) -> None:
    model = build_model("wan")
    wrapper = type(cls, (OnlyChild,), {})
    assert unwrapped(wrapper(child, wrapper(child, model))) is model
    assert unwrapped(wrapper("other", model)) is not model
    assert unwrapped(torch.nn.parallel.DataParallel(model)) is model
    assert unwrapped(torch.compile(model)) is model


def test_a_pipeline_whose_denoiser_has_adapters_is_seen_running() -> None:
    pipe, call = build_pipeline("wan")
    pipe.transformer = lora(pipe.transformer)
    with apply(pipe, PATTERN, dense_steps=0.4, dense_layers=0) as handle:
        pipe(**{**call, "output_type": "latent"})
        report = handle.report()
    assert report.dense_reasons == {"first dense steps (dense_steps=0.4)": 6 * 2}
    assert report.sparse_calls == 6


@pytest.mark.parametrize("around", ["blocks", "attention"])
@pytest.mark.parametrize("first", ["wrapper", "plugins"])
def test_checkpoint_wrappers_leave_the_names_as_they_are(around: str, first: str, wanted: torch.Tensor) -> None:
    model = build_model("wan")
    kind = type(model.blocks[0] if around == "blocks" else model.blocks[0].attn1)
    wrap = functools.partial(
        apply_activation_checkpointing, model, checkpoint_wrapper_fn=checkpoint_wrapper, check_fn=lambda m: type(m) is kind
    )
    if first == "wrapper":
        wrap()
    with apply(model, PATTERN, **ALL) as handle:
        if first == "plugins":
            wrap()
        torch.testing.assert_close(forward(model), wanted)
        rows = handle.report().sites
    assert [row["site"] for row in rows] == [f"blocks.{i}.attn1" for i in range(3)], "attn2 is cross-attention"
    assert sum(row["sparse"] for row in rows) == 3


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view tensor")  # stock's own outputs are views too
@pytest.mark.parametrize("parts", ["blocks", "attention"])
def test_fsdp2_after_apply_trains_sparse(parts: str, process_group: None, wanted: torch.Tensor) -> None:
    model, mesh = build_model("wan").train(), init_device_mesh("cpu", (1,))
    handle = apply(model, PATTERN, **ALL)
    for block in model.blocks:
        if parts == "attention":
            fully_shard(block.attn1, mesh=mesh)
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    out = model(**build_inputs("wan"), return_dict=False)[0]
    torch.testing.assert_close(out.detach(), wanted)
    out.square().sum().backward()
    assert handle.report().sparse_calls == 3
    assert all(p.grad is not None for block in model.blocks for p in block.attn1.parameters())
    handle.remove()


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickle.dumps])
def test_handles_are_not_copied(copied: Any) -> None:
    model = build_model("wan")
    with apply(model, PATTERN) as handle, pytest.raises(GenAttnError, match="a handle belongs to the model that it is on"):
        copied(handle)
