"""The outermost point of a denoiser: its call runs the plugins' wrappers around stock, while its class stays stock's own.

`nn.Module.__call__` asks the instance for `_call_impl`, or for `_compiled_call_impl` after `model.compile()`, so attributes of
the instance are enough: `type(model)` is what diffusers, FSDP2 and parametrizations expect, and hooks and a `forward` that
offloading puts on the instance run inside of ours. None of it is traced: the compiled frame is the stock `forward`.
"""

import contextlib
import copy
import functools
import inspect
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from genattn.seam.cores import MARK
from genattn.seam.plugin import Plugin, Run
from genattn.seam.processors import FunctionProcessor, is_exporting, refuse_export

INJECTION = "_genattn_injection"


# torch.compiler.disable has no inverse: plugins must run untraced, the stock forward under them must not
try:
    from torch._C._dynamo import eval_frame as _eval_frame
    from torch._dynamo.decorators import skip as _skip

    _set_eval_frame: Callable[[Any], Any] = _eval_frame.set_eval_frame
except ImportError:  # pragma: no cover
    _skip = functools.partial(torch.compiler.disable, recursive=False)

    def _set_eval_frame(callback: Any) -> Any:
        return None


class _Here(threading.local):
    def __init__(self) -> None:
        self.run: Run | None = None
        self.compiler: Any = None


HERE = _Here()


def run_of(model: nn.Module) -> Run | None:
    """The run of `model`'s forward on this thread, None outside of one."""
    return HERE.run if HERE.run is not None and HERE.run.model is model else None


def is_compiled_whole(model: nn.Module) -> bool:
    """Whether stock's forward is one compiled frame: after `model.compile()`, or in this call under `torch.compile(model)`."""
    return getattr(model, "_compiled_call_impl", None) is not None or callable(HERE.compiler)


@contextlib.contextmanager
def current_run(run: Run) -> Iterator[Run]:
    """`run` is what attention calls on this thread belong to."""
    before = HERE.run
    HERE.run = run
    try:
        yield run
    finally:
        HERE.run = before


_ROOT = ("_call_impl", "_compiled_call_impl", "cache_context", "_replicate_for_data_parallel", "__getstate__")


class RootCalls:
    """Our attributes on one denoiser, and what stood there before. `remove` leaves what others have put over them since."""

    def __init__(self, model: nn.Module, injection: Any) -> None:
        self.model = model
        self.before = {name: model.__dict__[name] for name in _ROOT if name in model.__dict__}
        model.__dict__[INJECTION] = injection
        self.ours = _root_calls(model, self.before)
        model.__dict__.update(self.ours)

    def remove(self) -> None:
        """Give every attribute back to whoever had it."""
        self.model.__dict__.pop(INJECTION, None)
        for name, ours in self.ours.items():
            if self.model.__dict__.get(name) is ours:
                del self.model.__dict__[name]
                if name in self.before:
                    self.model.__dict__[name] = self.before[name]


def _root_calls(model: nn.Module, before: dict[str, Any]) -> dict[str, Any]:
    def below(name: str) -> Any:
        return before.get(name) or functools.partial(getattr(type(model), name), model)

    calls: dict[str, Any] = {"_call_impl": _Entry(model, lambda: below("_call_impl"))._call_impl}
    if before.get("_compiled_call_impl") is not None:
        calls["_compiled_call_impl"] = _Entry(model, lambda: before["_compiled_call_impl"])._call_impl
    if hasattr(type(model), "cache_context"):
        calls["cache_context"] = _noting_cache_context(model, lambda: below("cache_context"))
    calls["_replicate_for_data_parallel"] = functools.partial(_replica, model, before)
    calls["__getstate__"] = functools.partial(stock_state, model, before, calls)
    return calls


class _Entry:
    """One way into the forward of `model`: through its injection where there is one, to `below()` where it runs already."""

    def __init__(self, model: nn.Module, below: Callable[[], Callable[..., Any]]) -> None:
        self.model, self.below = model, below
        # for torch.export: Dynamo reads no attribute of a class that diffusers lets stand in graphs whole, as LTX and Mochi
        self.at_first = below()

    # torch.compile puts a frame of its own around what it may not trace, except under this name; and it looks through a
    # function that is not traced, but not through a method. `skip` is torch.compiler.disable(recursive=False) without the
    # wrapper that turns torch.export away
    @_skip
    def _call_impl(self, *args: Any, **kwargs: Any) -> Any:
        if is_exporting():
            return self._exported(*args, **kwargs)
        injection, stock = self.model.__dict__.get(INJECTION), self.below()
        if injection is None or (HERE.run is not None and HERE.run.model is injection.model):
            return stock(*args, **kwargs)
        compiler, outer = _set_eval_frame(None), HERE.compiler
        HERE.compiler = compiler

        def under(*given: Any, **named: Any) -> Any:
            _set_eval_frame(compiler)
            try:
                return stock(*given, **named)
            finally:
                _set_eval_frame(None)

        try:
            return injection.forward(under, args, kwargs)
        finally:
            HERE.compiler = outer
            _set_eval_frame(compiler)

    def _inside_a_graph(self, *args: Any, **kwargs: Any) -> Any:
        """What Dynamo sees where it would trace through `_call_impl`: a way for torch.export, a graph break for the rest."""
        if is_exporting():
            return self._exported(*args, **kwargs)
        return _never_traced(self, args, kwargs)

    def _exported(self, *args: Any, **kwargs: Any) -> Any:
        injection = self.model.__dict__.get(INJECTION)
        if injection is not None:
            refuse_export(injection)
        return self.at_first(*args, **kwargs)


@torch.compiler.disable
def _never_traced(entry: _Entry, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return entry._call_impl(*args, **kwargs)


_Entry._call_impl._torchdynamo_inline = _Entry._inside_a_graph  # type: ignore[attr-defined]


def _replica(model: nn.Module, before: dict[str, Any]) -> nn.Module:
    """nn.DataParallel copies the attributes of the instance; a replica's must call the replica."""
    replica: nn.Module = type(model)._replicate_for_data_parallel(model)
    replica.__dict__.update(_root_calls(replica, before))
    return replica


def stock_state(module: nn.Module, before: Mapping[str, Any], ours: Mapping[str, Any]) -> dict[str, Any]:
    """What copying and pickling takes of a module: nothing of ours, so that the copy is a plain stock one."""
    getstate = getattr(type(module), "__getstate__", None)  # object has none before Python 3.11
    state = dict(getstate(module) if getstate is not None else module.__dict__)
    for name in ours:
        if state.get(name) is ours[name]:
            del state[name]
            if name in before and name != "_compiled_call_impl":
                state[name] = before[name]
    if isinstance(state.get("processor"), FunctionProcessor):
        state["processor"] = state["processor"].function
    getstate = state.get("__getstate__")
    if getattr(getstate, "func", None) is stock_state:
        del state["__getstate__"]
    return {name: value for name, value in state.items() if name not in (INJECTION, MARK)}


class CacheContexts:
    """The cache contexts that pipelines are in on one denoiser, [name, what was told, ...] each.

    Pipelines in several threads are in contexts of their own. A thread that is in none takes the last one of any: a replica
    runs apart from the pipeline.
    """

    def __init__(self) -> None:
        self._open: list[tuple[int, list[Any]]] = []

    def enter(self, noted: list[Any]) -> None:
        """A context of this thread starts."""
        self._open.append((threading.get_ident(), noted))

    def leave(self, noted: list[Any]) -> None:
        """This very context ends; equal ones stay."""
        self._open = [entry for entry in self._open if entry[1] is not noted]

    def open(self) -> list[list[Any]]:
        """The open ones, the innermost last."""
        here = threading.get_ident()
        return [noted for thread, noted in self._open if thread == here] or [noted for _, noted in self._open]

    def innermost(self) -> tuple[str | None, dict[str, Any]]:
        """(name, what was told) of the context that holds here; (None, {}) outside of all."""
        known = self.open()
        return (known[-1][0], known[-1][1]) if known else (None, {})


def _noting_cache_context(model: nn.Module, below: Callable[[], Callable[..., Any]]) -> Callable[..., Any]:
    """The model's own cache_context, whose name tells which pass runs."""

    @contextlib.contextmanager
    def cache_context(name: str, **told: Any) -> Iterator[None]:
        injection = model.__dict__.get(INJECTION)
        noted: list[Any] = [name, told]
        if injection is not None:
            injection.cache.enter(noted)
        try:
            stock = below()
            with stock(name, **_taken(stock, told)):
                yield
        finally:
            if injection is not None:
                injection.cache.leave(noted)

    return cache_context


def _taken(stock: Callable[..., Any], told: Mapping[str, Any]) -> dict[str, Any]:
    """What of `told` a cache_context takes: diffusers before 0.40 has a name alone."""
    parameters = inspect.signature(stock).parameters
    every = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    return {name: value for name, value in told.items() if every or name in parameters}


@contextlib.contextmanager
def other_cache_context(model: nn.Module, stock: type, noted: list[Any], suffix: str) -> Iterator[None]:
    """An extra pass inside the pipeline's own cache context: its caches keep a state of their own."""
    name, told = noted[0], _taken(stock.cache_context, noted[1])  # type: ignore[attr-defined]
    with stock.cache_context(model, f"{name}+{suffix}", **told):  # type: ignore[attr-defined]
        yield
    again = stock.cache_context(model, name, **told)  # type: ignore[attr-defined]
    again.__enter__()  # leaving a context clears it, but the pipeline is still inside its own
    noted.append(again)


def same_objects(given: tuple[Any, ...], args: tuple[Any, ...], named: dict[str, Any], kwargs: dict[str, Any]) -> bool:
    """Whether a plugin passed on exactly what it got."""
    if len(given) != len(args) or named.keys() != kwargs.keys():
        return False
    return all(a is b for a, b in zip(given, args)) and all(named[name] is kwargs[name] for name in named)


def wrapped(plugin: Plugin, inner: Callable[..., Any]) -> Callable[..., Any]:
    """A forward of the denoiser within `plugin`'s."""

    def call(*args: Any, **kwargs: Any) -> Any:
        assert HERE.run is not None
        return plugin.forward(HERE.run, args, kwargs, inner)

    return call


@contextlib.contextmanager
def other_caches(model: nn.Module, noted: list[list[Any]], suffix: str, pass_name: str) -> Iterator[None]:
    """An extra pass, for caches of all kinds. noted: the pipeline's open cache contexts, the last one innermost."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(own_cache_dit_state(model, pass_name))
        if noted:
            stack.enter_context(other_cache_context(model, type(model), noted[-1], suffix))
        yield


# ---- beside cache-dit: it counts the forwards of a denoiser and keeps what its blocks gave by that count, so an extra pass of
# ours must not count as one of the pipeline's. Nothing of it is imported: a model that it has on carries the manager of its
# states, their names, and the forward under its own.

_EXTRA = "_genattn_extra"


def held_by_cache_dit(model: nn.Module) -> bool:
    """Whether cache-dit is on this model."""
    return "_original_forward" in model.__dict__ and hasattr(model.__dict__.get("_context_manager"), "_cached_context_manager")


@contextlib.contextmanager
def own_cache_dit_state(model: nn.Module, pass_name: str) -> Iterator[None]:
    """Inside, its states are those of an extra pass; they live as long as the pipeline's own, which is one run.

    The pipeline's states take every second forward for the other half of classifier-free guidance. An extra pass has one kind
    only.
    """
    if not held_by_cache_dit(model):
        yield
        return
    manager: Any = model.__dict__["_context_manager"]
    states, current = manager._cached_context_manager, manager._current_context
    before = {name: states[name] for name in model.__dict__["_context_names"] if name in states}
    states.update({name: _extra_of(state, pass_name) for name, state in before.items()})
    try:
        yield
    finally:
        states.update(before)
        manager._current_context = current


def _extra_of(state: Any, pass_name: str) -> Any:
    kept = state.__dict__.setdefault(_EXTRA, {})
    if pass_name not in kept:
        config = copy.copy(state.cache_config)
        config.enable_separate_cfg = False
        given = {**getattr(state, "_init_kwargs", {}), "name": state.name, "cache_config": config}
        made = type(state)(**given)
        made._init_args, made._init_kwargs = (), given
        kept[pass_name] = made
    return kept[pass_name]


@contextlib.contextmanager
def without_cache_dit(model: nn.Module) -> Iterator[None]:
    """Inside, every block runs: the forward is the one under cache-dit's."""
    if not held_by_cache_dit(model):
        yield
        return
    theirs, hook = model.__dict__["forward"], getattr(model, "_hf_hook", None)

    def forward(*args: Any, **kwargs: Any) -> Any:
        if hook is not None:
            args, kwargs = hook.pre_forward(model, *args, **kwargs)
        out = model.__dict__["_original_forward"](*args, **kwargs)
        return out if hook is None else hook.post_forward(model, out)

    model.__dict__["forward"] = forward
    try:
        yield
    finally:
        model.__dict__["forward"] = theirs
