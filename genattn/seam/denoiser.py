"""The outermost point of a denoiser: its class is swapped for one whose call runs the plugins' wrappers around stock.

Both `__call__` and `_call_impl` are overridden, because `torch.compile(model)` made before `apply` has bound the one and
`model.compile()` the other; whichever comes first does the work. Neither is traced: the compiled frame is the stock `forward`.
"""

import contextlib
import copy
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from genattn.seam.plugin import Run
from genattn.seam.processors import MARK, swapped_class

INJECTION = "_genattn_injection"


# torch.compiler.disable has no inverse: plugins must run untraced, the stock forward under them must not
try:
    from torch._C._dynamo import eval_frame as _eval_frame

    _set_eval_frame: Callable[[Any], Any] = _eval_frame.set_eval_frame
except ImportError:  # pragma: no cover

    def _set_eval_frame(callback: Any) -> Any:
        return None


class _Here(threading.local):
    def __init__(self) -> None:
        self.run: Run | None = None


HERE = _Here()


def run_of(model: nn.Module) -> Run | None:
    """The run of `model`'s forward on this thread, None outside of one."""
    return HERE.run if HERE.run is not None and HERE.run.model is model else None


@contextlib.contextmanager
def current_run(run: Run) -> Iterator[Run]:
    """`run` is what attention calls on this thread belong to."""
    before = HERE.run
    HERE.run = run
    try:
        yield run
    finally:
        HERE.run = before


@functools.cache
def denoiser_class(stock: Any) -> type:
    """The class that an injected `stock` gets."""
    skip = functools.partial(torch.compiler.disable, recursive=False)
    members: dict[str, Any] = {
        "__call__": skip(_around(stock.__call__)),
        "_call_impl": skip(_around(stock._call_impl)),  # type: ignore[attr-defined]
        "__deepcopy__": _deepcopy(stock),
    }
    if hasattr(stock, "cache_context"):
        members["cache_context"] = _noting_cache_context(stock.cache_context)
    return swapped_class(stock, members)


def _around(stock: Callable[..., Any]) -> Callable[..., Any]:
    def around(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        injection = self.__dict__.get(INJECTION)
        if injection is None or (HERE.run is not None and HERE.run.model is self):
            return stock(self, *args, **kwargs)
        compiler = _set_eval_frame(None)

        def under(*given: Any, **named: Any) -> Any:
            _set_eval_frame(compiler)
            try:
                return stock(self, *given, **named)
            finally:
                _set_eval_frame(None)

        try:
            return injection.forward(under, args, kwargs)
        finally:
            _set_eval_frame(compiler)

    return functools.wraps(stock)(around)


def _deepcopy(stock: type) -> Callable[[nn.Module, dict[int, Any]], nn.Module]:
    def __deepcopy__(self: nn.Module, memo: dict[int, Any]) -> nn.Module:
        copied: nn.Module = object.__new__(stock)
        memo[id(self)] = copied
        state = {k: v for k, v in self.__dict__.items() if k != INJECTION}
        copied.__dict__.update(copy.deepcopy(state, memo))
        for module in copied.modules():
            module.__dict__.pop(MARK, None)
        return copied

    return __deepcopy__


def _noting_cache_context(stock: Callable[..., Any]) -> Callable[..., Any]:
    """The model's own cache_context, whose name tells which pass runs."""

    @functools.wraps(stock)
    @contextlib.contextmanager
    def cache_context(self: nn.Module, name: str, **told: Any) -> Iterator[None]:
        injection = self.__dict__.get(INJECTION)
        noted: list[Any] = [name, told]
        if injection is not None:
            injection.cache.append(noted)
        try:
            with stock(self, name, **told):
                yield
        finally:
            if injection is not None:
                injection.cache.remove(noted)

    return cache_context


@contextlib.contextmanager
def other_cache_context(model: nn.Module, stock: type, noted: list[Any], suffix: str) -> Iterator[None]:
    """An extra pass inside the pipeline's own cache context: its caches keep a state of their own."""
    name, told = noted[0], noted[1]
    with stock.cache_context(model, f"{name}+{suffix}", **told):  # type: ignore[attr-defined]
        yield
    again = stock.cache_context(model, name, **told)  # type: ignore[attr-defined]
    again.__enter__()  # leaving a context clears it, but the pipeline is still inside its own
    noted.append(again)


@contextlib.contextmanager
def checkpoints_carry(model: nn.Module, run: Run) -> Iterator[None]:
    """Blocks recomputed in the backward pass (maybe in another thread, after later forwards) see the run of their forward."""
    if not (torch.is_grad_enabled() and getattr(model, "is_gradient_checkpointing", False)):
        yield
        return
    name = "_gradient_checkpointing_func"
    holders = [m for m in model.modules() if name in m.__dict__]
    before = [m.__dict__[name] for m in holders]
    for module, stock in zip(holders, before):
        module.__dict__[name] = functools.partial(_checkpoint, stock, run)
    try:
        yield
    finally:
        for module, stock in zip(holders, before):
            module.__dict__[name] = stock


def _checkpoint(stock: Callable[..., Any], run: Run, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    def with_run(*inputs: Any, **named: Any) -> Any:
        with current_run(HERE.run if run_of(run.model) is not None else run):  # type: ignore[arg-type]
            return function(*inputs, **named)

    return stock(with_run, *args, **kwargs)
