"""torch.export while plugins are on: stock's own program where they do nothing, else a refusal in our words."""

import copy
from typing import Any

import pytest
import torch

from genattn import DensePattern, GenAttnError, NeighborhoodPattern, RadialPattern
from genattn.guidance.nag import NAG
from genattn.guidance.passes.prediction import leaves
from genattn.guidance.softpag.softpag import SoftPAG
from genattn.pipelines.tiny.random.build import build_inputs, build_model, families
from genattn.seam.handle import apply
from genattn.seam.plugin import Plugin, Run

pytestmark = [pytest.mark.compiled, pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")]
HOW = [pytest.param("wan", False), pytest.param("wan", True)] + [
    pytest.param("flux", how, marks=pytest.mark.slow) for how in (False, True)
]
DATA = ("its lengths depend on what the inputs hold", "Could not guard on data-dependent expression")
NOT_BY_STOCK = {
    "hunyuan-video-1.5": DATA,
    "hidream": ("its experts are chosen in numpy", r"\.numpy\(\) is not supported for tensor subclasses"),
    "lumina2": ("its lengths depend on what the inputs hold", "unhashable type: non-nested SymInt"),
    "anyflow-far": ("flex_attention on a CPU has no backward pass", "FlexAttention does not support backward on CPU"),
    "wan-animate2": ("its inputs hold a cache of a class of its own", "Unsupported input type .*WanAnimate2KVCache"),
    "flux2-kv": ("it answers with a cache of a class of its own", "Found .*Flux2KVCache.* in output"),
    "qwen-image-2.1": DATA,
    "hunyuan-image": DATA,
    "omnigen": DATA,
    "bria-fibo2-batch": DATA,
}
"""Families that torch.export refuses without us: why, and in which words."""
NOT_STRICT = {"z-image": "a context manager", "bria-fibo2": "a context manager"}
QUICK = {"allegro", "cogvideox", "dit", "ideogram4", "krea2", "lumina-next", "minimax-h3", "pixart", "sd3", "stable-audio"}
WHOLE = {"wan-animate", "wan-vace", "bria-fibo"}  # some of their blocks have one of a list each
# Sana's linear attention is refused when a pattern is applied, a dense one too
EVERY = [
    pytest.param(family, strict, marks=() if family in QUICK and not strict else pytest.mark.slow)
    for family in families()
    for strict in (False, True)
    if family not in ("wan", "sana", *NOT_BY_STOCK, *(NOT_STRICT if strict else ()))
]


def exported(model: torch.nn.Module, inputs: dict[str, Any], strict: bool) -> Any:
    return torch.export.export(model, (), {**inputs, "return_dict": False}, strict=strict)


class Mixing(Plugin):
    """Guidance that works around the forward alone."""

    def forward(self, run: Run, args: Any, kwargs: Any, inner: Any) -> Any:
        return inner(*args, **kwargs)


@pytest.mark.parametrize(("family", "strict"), HOW)
def test_a_dense_pattern_exports_stocks_program(family: str, strict: bool) -> None:
    """No operator of ours, whose marks another process does not have, and the same bits."""
    model, inputs = build_model(family, num_layers=1), build_inputs(family)
    stock = exported(model, inputs, strict)
    with torch.no_grad():
        reference = model(**inputs, return_dict=False)[0]
    with apply(model, DensePattern()) as handle:
        program = exported(model, inputs, strict)
        assert handle.report().calls == 0
        with torch.no_grad():
            assert torch.equal(model(**inputs, return_dict=False)[0], reference)
        assert handle.report().calls > 0  # and is still on
    assert program.graph_module.code == stock.graph_module.code
    assert [m.fqn for m in program.module_call_graph] == [m.fqn for m in stock.module_call_graph]
    assert torch.equal(program.module()(**inputs, return_dict=False)[0], reference)


def small(family: str) -> tuple[torch.nn.Module, dict[str, Any]]:
    """A model of one layer where its class counts them so."""
    try:
        model = build_model(family, **({} if family in WHOLE else {"num_layers": 1}))
    except TypeError:
        model = build_model(family)
    return model, build_inputs(family)


@pytest.mark.filterwarnings("ignore::UserWarning")  # stock's own, of torch's deprecations
@pytest.mark.parametrize(("family", "strict"), EVERY)
def test_every_family_that_stock_exports(family: str, strict: bool) -> None:
    """A dense pattern: stock's program, line by line and bit by bit. A sparse one: refused in our words.

    A model for each: some keep tensors of the tracer in themselves, so that stock is not exported twice either.
    """
    model, inputs = small(family)
    stock = exported(model, copy.deepcopy(inputs), strict)
    model, _ = small(family)
    words = f"torch.export of {type(model).__name__} must find no plugin that acts: .*NeighborhoodPattern would be left out"
    with apply(model, NeighborhoodPattern(3)), pytest.raises(GenAttnError, match=words):
        exported(model, copy.deepcopy(inputs), strict)
    model, _ = small(family)
    with apply(model, DensePattern()) as handle:
        program = exported(model, copy.deepcopy(inputs), strict)
        assert handle.report().calls == 0
    assert program.graph_module.code == stock.graph_module.code
    answers = [leaves(p.module()(**copy.deepcopy(inputs), return_dict=False)) for p in (program, stock)]
    assert answers[0]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*answers, strict=True))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("family", sorted(NOT_BY_STOCK.keys() & set(families())))
def test_what_stock_does_not_export(family: str) -> None:
    """The list above holds what it says it does."""
    model, inputs = small(family)
    with pytest.raises(Exception, match=NOT_BY_STOCK[family][1]):
        exported(model, inputs, strict=False)


@pytest.mark.parametrize(("family", "strict"), HOW)
def test_whatever_acts_is_refused(family: str, strict: bool) -> None:
    model, inputs = build_model(family, num_layers=1), build_inputs(family)
    plugins = {
        "RadialPattern": RadialPattern(),
        "NeighborhoodPattern": NeighborhoodPattern(3),
        "SoftPAG": SoftPAG({(0, 0): 1.0}, layout="single"),
        "NAG": NAG("blurry"),
        "Mixing": Mixing(),
    }
    for name, plugin in plugins.items():
        words = f"torch.export of {type(model).__name__} must find no plugin that acts: .*{name} would be left out"
        with apply(model, plugin), pytest.raises(GenAttnError, match=words):
            exported(model, inputs, strict)
    handle = apply(model, DensePattern(), Mixing())
    with pytest.raises(GenAttnError, match="and Mixing would be left out of it; export before genattn.apply or after"):
        exported(model, inputs, strict)
    handle.remove()


@pytest.mark.parametrize("strict", [False, True])
def test_what_is_switched_off_may_go_and_parts_are_held_to_the_same(strict: bool) -> None:
    """A block alone, and a module around the model, are asked as the model is."""
    torch.manual_seed(0)
    model = build_model("wan", num_layers=1)
    inputs = build_inputs("wan")
    block = model.blocks[0]
    attention, hidden = block.attn1, torch.randn(1, 6, block.norm1.normalized_shape[0])
    around = torch.nn.Sequential(torch.nn.Identity(), attention)
    handle = apply(model, RadialPattern(), dense_steps=0)
    with handle.options(enabled=False):
        program = exported(model, inputs, strict)
    with torch.no_grad():
        assert torch.equal(program.module()(**inputs, return_dict=False)[0], _without(model, inputs, handle))
    for part in (attention, around):
        with pytest.raises(GenAttnError, match="RadialPattern would be left out"):
            torch.export.export(part, (hidden,), strict=strict)
    handle.remove()
    torch.export.export(around, (hidden,), strict=strict)


def _without(model: Any, inputs: dict[str, Any], handle: Any) -> torch.Tensor:
    with handle.options(enabled=False):
        out: torch.Tensor = model(**inputs, return_dict=False)[0]
    return out
