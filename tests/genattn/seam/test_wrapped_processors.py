"""Processors that wrap the stock one: what is wrapped runs in a module of its own, and its attention comes to the plugins."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers.models import attention_processor
from diffusers.models.attention_processor import AttnProcessor2_0

from genattn import DensePattern, RadialPattern, apply
from genattn.pipelines.tiny.random.build import build_inputs, build_model
from genattn.seam.cores import CURRENT
from genattn.seam.plugin import AttentionCall, Inner, Plugin
from genattn.seam.processors import _CLAIMS, _LOCK, abandon_processors, acquire_processor, release_processors


class Wrapper:
    """As packages write it: some work around the processor that was there."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __call__(self, attn: Any, *args: Any, **named: Any) -> Any:
        return self.inner(attn, *args, **named)


class WrapperModule(torch.nn.Module):
    """The same with weights of its own, as adapters have."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.gate = torch.nn.Linear(1, 1)
        self.inner = inner

    def forward(self, attn: Any, *args: Any, **named: Any) -> Any:
        return self.inner(attn, *args, **named)


def closure(inner: Any) -> Callable[..., Any]:
    """A function around it."""
    return lambda attn, *args, **named: inner(attn, *args, **named)


def default(inner: Any) -> Callable[..., Any]:
    """A function that has it as a default."""

    def call(attn: Any, *args: Any, inner: Any = inner, **named: Any) -> Any:
        return inner(attn, *args, **named)

    return call


def twice(inner: Any) -> Any:
    """A wrapper around a partial around a bound method."""
    return Wrapper(functools.partial(inner.__call__))


def output(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs, return_dict=False)[0]  # type: ignore[no-any-return]


@pytest.mark.parametrize("family", ["wan", "sd3"])  # one through dispatch_attention_fn, one through torch.nn.functional
@pytest.mark.parametrize("wrap", [Wrapper, WrapperModule, closure, default, twice])
def test_what_is_wrapped_is_reached(family: str, wrap: Callable[[Any], Any]) -> None:
    model, inputs = build_model(family), build_inputs(family)
    stock = output(model, inputs)
    with apply(model, RadialPattern(decay=0.2, floor=0), dense_steps=0, dense_layers=0) as handle:
        sparse, calls = output(model, inputs), handle.report().sparse_calls
    assert not torch.equal(sparse, stock)
    for module in model.modules():
        if hasattr(module, "processor"):
            module.processor = wrap(module.processor)
    assert torch.equal(output(model, inputs), stock)
    with apply(model, DensePattern()):
        assert torch.equal(output(model, inputs), stock)
    with apply(model, RadialPattern(decay=0.2, floor=0), dense_steps=0, dense_layers=0) as handle:
        assert torch.equal(output(model, inputs), sparse)
        assert handle.report().sparse_calls == calls
    assert torch.equal(output(model, inputs), stock)


class Asks:
    """Runs another module's attention within its own, which may fail."""

    def __init__(self, inner: Any, other: Any, fails: bool) -> None:
        self.inner, self.other, self.fails = inner, other, fails

    def __call__(self, attn: Any, hidden_states: torch.Tensor, *args: Any, **named: Any) -> Any:
        try:
            self.other.processor(self.other, hidden_states, fails=self.fails)
        except RuntimeError:
            assert self.fails
        return self.inner(attn, hidden_states, *args, **named)


class Small:
    """An attention over the first two tokens."""

    def __call__(self, attn: Any, hidden_states: torch.Tensor, fails: bool = False, **named: Any) -> torch.Tensor:
        rows = hidden_states[:, None, :2]
        out = F.scaled_dot_product_attention(rows, rows, rows)
        if fails:
            raise RuntimeError("on purpose")
        return out


class Child(AttnProcessor2_0):
    """Its call is the parent's."""


AT_MODULE_LEVEL = Child()


class MakesOne:
    def __call__(self, attn: Any, hidden_states: torch.Tensor, encoder_hidden_states: Any = None, **_: Any) -> Any:
        return AttnProcessor2_0()(attn, hidden_states, encoder_hidden_states)


class MakesOneByModule(torch.nn.Module):
    def forward(self, attn: Any, hidden_states: torch.Tensor, encoder_hidden_states: Any = None, **_: Any) -> Any:
        return attention_processor.AttnProcessor2_0()(attn, hidden_states, encoder_hidden_states)


class UsesOne:
    def __call__(self, attn: Any, hidden_states: torch.Tensor, encoder_hidden_states: Any = None, **_: Any) -> Any:
        return AT_MODULE_LEVEL(attn, hidden_states, encoder_hidden_states)


class WithoutSelf:
    @staticmethod
    def __call__(attn: Any, hidden_states: torch.Tensor, encoder_hidden_states: Any = None, **_: Any) -> Any:
        return AttnProcessor2_0()(attn, hidden_states, encoder_hidden_states)


class NoChildren(AttnProcessor2_0):
    def __init_subclass__(cls, **_: Any) -> None:
        raise RuntimeError("no subclass, please")


def with_processor(make: Callable[[], Any]) -> Any:
    model = build_model("unet")
    for module in model.modules():
        if hasattr(module, "processor"):
            del module.processor
            module.processor = make()
    return model


@pytest.mark.parametrize(
    "make",
    [MakesOne, MakesOneByModule, UsesOne, WithoutSelf, NoChildren, lambda: Wrapper(Child()), lambda: MakesOne().__call__],
)
def test_work_that_stock_classes_do_for_others_is_reached(make: Callable[[], Any]) -> None:
    inputs, pattern = build_inputs("unet"), RadialPattern(decay=0.2, floor=0)
    plain = build_model("unet")
    with apply(plain, pattern, dense_steps=0, dense_layers=0):
        wanted = output(plain, inputs)
    model = with_processor(make)
    stock, before = output(model, inputs), [id(m.processor) for m in model.modules() if hasattr(m, "processor")]
    assert not torch.equal(wanted, stock)
    with apply(model, pattern, dense_steps=0, dense_layers=0):
        assert torch.equal(output(model, inputs), wanted)
    assert torch.equal(output(model, inputs), stock)
    assert [id(m.processor) for m in model.modules() if hasattr(m, "processor")] == before


def test_a_patch_that_is_no_function_is_called_as_python_calls_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = build_model("unet"), build_inputs("unet")
    plain, original = output(model, inputs), AttnProcessor2_0()
    with apply(model, DensePattern()):
        for patch in (functools.partial(original.__call__), staticmethod(original.__call__)):
            monkeypatch.setattr(AttnProcessor2_0, "__call__", patch)
            assert torch.equal(output(model, inputs), plain)
            monkeypatch.undo()
    assert torch.equal(output(model, inputs), plain)


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("plain", [False, True])
def test_an_attention_inside_another_gives_the_mark_back(fails: bool, plain: bool) -> None:
    model = build_model("wan")
    outer, other = model.blocks[0].attn1, model.blocks[2].attn1
    asks = Asks(outer.processor, other, fails)
    outer.processor = asks.__call__ if plain else asks
    other.processor = Small()
    sites: list[str] = []

    class Notes(Plugin):
        def attention(self, call: AttentionCall, inner: Inner) -> torch.Tensor:
            sites.append(f"{call.site.name} {call.query.shape[1]}")
            return inner(call)

    with apply(model, Notes()), torch.no_grad():
        model.blocks[0].attn1(torch.randn(1, 12, outer.to_q.in_features))
        assert CURRENT.held == [None]
    assert sites == ["blocks.2.attn1 2", "blocks.0.attn1 12"]


def test_what_went_while_the_lock_was_held_is_closed_by_the_next_who_comes() -> None:
    """A finalizer may come at any moment, also in the middle of `apply`; it then only leaves word."""
    gone, other = (build_model("wan").blocks[0].attn1.processor for _ in range(2))
    stock = type(gone)
    claim = acquire_processor(gone)
    assert claim is not None
    with _LOCK:
        abandon_processors({claim.key: claim})
        assert type(gone).__mro__[1] is stock, "nothing can be closed now"
    second = acquire_processor(other)
    assert second is not None
    try:
        assert type(gone) is stock
        assert claim.key not in _CLAIMS
        assert type(other).__mro__[1] is stock
    finally:
        release_processors({second.key: second})
    assert type(other) is stock
