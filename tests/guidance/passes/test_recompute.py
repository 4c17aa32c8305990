"""Guidance under activation checkpointing and after inference mode: the gradients of a plain run, or an error; never others."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.utils.checkpoint import checkpoint

from genattn import GenAttnError, RadialPattern, apply
from genattn.guidance.broadway.broadway import BroadWay
from genattn.guidance.nag import NAG
from genattn.guidance.softpag import SoftPAG
from genattn.pipelines.tiny.random.build import build_inputs, build_model

Gradients = dict[str, torch.Tensor]
WAYS = ("diffusers", "reentrant", "non-reentrant", "function")
_WRAPPED = {"reentrant": CheckpointImpl.REENTRANT, "non-reentrant": CheckpointImpl.NO_REENTRANT}


def checkpointed(model: Any, how: str) -> None:
    """Its blocks computed again in the backward pass: by diffusers, wrapped as FSDP recipes do, or by a function."""
    names = ("blocks", "transformer_blocks", "single_transformer_blocks")
    blocks = {id(block): block for name in names for block in getattr(model, name, ())}
    if how == "diffusers":
        model.enable_gradient_checkpointing()
    elif how == "function":
        for block in blocks.values():
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    elif how in _WRAPPED:
        wrap = functools.partial(checkpoint_wrapper, checkpoint_impl=_WRAPPED[how])
        apply_activation_checkpointing(model, checkpoint_wrapper_fn=wrap, check_fn=lambda module: id(module) in blocks)


def gradients(family: str, how: str, plugins: Sequence[Any], **settings: Any) -> Gradients:
    model, inputs = build_model(family).train(), build_inputs(family)
    inputs["hidden_states"] = inputs["hidden_states"].clone().requires_grad_()
    checkpointed(model, how)
    with apply(model, *plugins, **settings) as handle:
        handle.set(num_steps=4)
        model(**inputs, return_dict=False)[0].square().sum().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name.replace("_checkpoint_wrapped_module.", ""): grad for name, grad in found.items()}


def guided(**settings: Any) -> SoftPAG:
    return SoftPAG(**{"heads": "L1", "u": 0.7, "layout": "single"} | settings)


CASES: dict[str, tuple[str, Callable[[], list[Any]], dict[str, Any]]] = {
    "extra pass": ("wan", lambda: [guided()], {}),
    "one batch": ("wan", lambda: [guided(mode="batched")], {}),
    "two terms": ("wan", lambda: [guided(), guided(heads="L2", target="mean_query")], {}),
    "beside a pattern": ("wan", lambda: [guided(), RadialPattern(decay=0.2, floor=0)], {"dense_steps": 0, "dense_layers": 0}),
    "joint attention": ("flux", lambda: [guided()], {}),
    "a block left out": ("wan", lambda: [guided(target="skip", u=1.0)], {}),
    "half a block": ("sd3", lambda: [guided(target="skip", u=0.5)], {}),
}


@pytest.mark.parametrize("case", list(CASES))
def test_gradients_are_those_of_the_plain_run(case: str) -> None:
    family, plugins, settings = CASES[case]
    wanted = gradients(family, "plain", plugins(), **settings)
    for how in WAYS:
        found = gradients(family, how, plugins(), **settings)
        assert found.keys() == wanted.keys()
        for name, grad in found.items():
            torch.testing.assert_close(grad, wanted[name], atol=2e-5, rtol=1e-3)


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("family", ["wan", "flux"])
def test_what_cannot_be_computed_again_is_refused(family: str, how: str) -> None:
    inputs = build_inputs(family)
    texts = {name: torch.randn_like(inputs[name]) for name in ("encoder_hidden_states", "pooled_projections") if name in inputs}
    nag = NAG(negative_embeds=texts, layout="single")
    gradients(family, "plain", [nag])
    told = "with gradient checkpointing; train without NAG" if how == "diffusers" else "NAG acted on is computed again"
    with pytest.raises(GenAttnError, match=told):
        gradients(family, how, [nag])


def test_broadway_on_full_video_attention_has_no_backward_pass() -> None:
    with pytest.raises(GenAttnError, match="BroadWay steers sampling, and has no backward pass through full video attention"):
        gradients("wan", "plain", [BroadWay(alpha=0.6, energy="+20%", stop=1.0)])


@pytest.mark.parametrize("mode", ["extra", "batched"])
def test_training_after_a_run_in_inference_mode(mode: str) -> None:
    model, inputs = build_model("wan"), build_inputs("wan")
    with apply(model, guided(mode=mode)):
        with torch.inference_mode():
            model(**inputs, return_dict=False)
        model(**inputs, return_dict=False)[0].square().sum().backward()
    assert model.blocks[1].attn1.to_v.weight.grad.abs().max() > 0
