"""How an attention call of a stock processor comes to us, and how everything is put back.

1. A mark hangs on the attention module. The class of its processor is swapped in place for a subclass whose `__call__` makes
   the mark current for the time of the call; the processor stays the same object with the same attributes.
2. In the modules that define the processors, the names `dispatch_attention_fn` and `F` point to pass-throughs. Without a
   current mark they call what stood there before; with one they hand the call to the mark's owner.
3. Under torch.compile the call becomes one opaque operator that takes the mark as a 0-dim tensor, so that all layers share one
   graph and every decision about step, layer and pattern is taken when the graph runs.
"""

import functools
import inspect
import itertools
import sys
import threading
import types
import weakref
from collections.abc import Callable
from typing import Any, ClassVar, Protocol

import torch
import torch.nn.functional as F

from genattn.layouts.site import AttentionSite
from genattn.seam.log_sum_exp import dense_with_lse, is_native

MARK = "_genattn_mark"
SDPA = -1


class Owner(Protocol):
    """Whoever answers the calls of a mark."""

    def attend(
        self,
        mark: "Mark",
        tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        mask: Any,
        flags: dict[str, Any],
        core: Any,
    ) -> torch.Tensor:
        """Answer one call, [B, Sq, H, D]."""
        ...


class Mark:
    """What hangs on an attention module. `handle` is its number as a 0-dim tensor: Dynamo does not specialise on that."""

    _numbers: ClassVar = itertools.count()
    living: ClassVar["weakref.WeakValueDictionary[int, Mark]"] = weakref.WeakValueDictionary()

    def __init__(self, site: AttentionSite, owner: Owner) -> None:
        self.site, self.owner = site, owner
        self.number = next(self._numbers)
        self.handle = torch.tensor(self.number)
        self.chain: tuple[tuple[Any, Any], ...] = ()  # (plugin, its handle), the outermost first
        self.handles: tuple[Any, ...] = ()
        Mark.living[self.number] = self

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None  # a copied model starts without plugins

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()


class _Current(threading.local):
    # set in every thread's own dict: a class default would make Dynamo's guard fail on the first write
    def __init__(self) -> None:
        self.mark: Mark | None = None


CURRENT = _Current()


# ---- the processor's class


_SUBCLASSES: dict[type, type] = {}
_USERS: dict[int, tuple[Any, int]] = {}
_LOCK = threading.RLock()


def _marking_call(stock: Callable[..., Any]) -> Callable[..., Any]:
    """`stock` with the module's mark current. functools.wraps carries the signature that `Attention.forward` filters by."""

    @functools.wraps(stock)
    def __call__(self: Any, attn: Any, *args: Any, **kwargs: Any) -> Any:
        mark = attn.__dict__.get(MARK)
        # a compiled graph takes every mark along: plugins may come to it later
        if mark is None or not (torch.compiler.is_compiling() or mark.chain):
            return stock(self, attn, *args, **kwargs)
        before = CURRENT.mark
        CURRENT.mark = mark
        try:
            return stock(self, attn, *args, **kwargs)
        finally:
            CURRENT.mark = before

    # Dynamo measures the length of __defaults__ when it traces inspect.signature, and stumbles over None
    __call__.__defaults__ = ()  # type: ignore[attr-defined]
    return __call__


def swapped_class(stock: type, members: dict[str, Any]) -> type:
    """A subclass that passes for `stock`: same names, same `__class__`, and copies or pickles as a plain `stock`."""

    def __reduce_ex__(self: Any, protocol: Any) -> Any:
        reduced = list(stock.__reduce_ex__(self, protocol))  # type: ignore[call-arg]
        reduced[1] = tuple(stock if part is type(self) else part for part in reduced[1])
        return tuple(reduced)

    spoof = {
        "__reduce_ex__": __reduce_ex__,
        "__module__": stock.__module__,
        "__qualname__": stock.__qualname__,
        "__doc__": stock.__doc__,
        "__class__": property(lambda self: stock),
        "_genattn_stock": stock,
    }
    return type(stock.__name__, (stock,), {**spoof, **members})


def set_class(instance: Any, cls: type) -> None:
    """Assign the true class, past the `__class__` property of a swapped one."""
    object.__dict__["__class__"].__set__(instance, cls)


def stock_class(instance: Any) -> type:
    """The class that diffusers or the user gave it."""
    return type(instance).__dict__.get("_genattn_stock", type(instance))


def acquire_processor(processor: Any) -> list[str]:
    """Swap its class (once, however many users) and open the seam in the modules that define it; their names."""
    with _LOCK:
        held, users = _USERS.get(id(processor), (processor, 0))
        _USERS[id(processor)] = (held, users + 1)
        cls = stock_class(processor)
        if not users:
            if cls not in _SUBCLASSES:
                _SUBCLASSES[cls] = swapped_class(cls, {"__call__": _marking_call(cls.__call__)})
            set_class(processor, _SUBCLASSES[cls])
        names = [base.__module__ for base in cls.__mro__ if base.__module__ in sys.modules]
        opened = [name for name in dict.fromkeys(names) if _has_seam(name)]
        for name in opened:
            _open_module(name)
        return opened


def release_processor(processor: Any, opened: list[str]) -> None:
    """Undo one `acquire_processor`."""
    with _LOCK:
        _, users = _USERS.pop(id(processor))
        if users > 1:
            _USERS[id(processor)] = (processor, users - 1)
        else:
            set_class(processor, stock_class(processor))
        for name in opened:
            _close_module(name)


# ---- the names in the processors' modules


_OPEN: dict[str, tuple[int, dict[str, Any]]] = {}
_SHIMS: dict[int, Callable[..., Any]] = {}
_CORES: list[Callable[..., Any]] = []


def _has_seam(name: str) -> bool:
    names = sys.modules[name].__dict__
    return name in _OPEN or "dispatch_attention_fn" in names or names.get("F") is F


def _open_module(name: str) -> None:
    users, before = _OPEN.get(name, (0, {}))
    names = sys.modules[name].__dict__
    if not users:
        if names.get("F") is F:
            before["F"] = F
            names["F"] = _functional()
        if "dispatch_attention_fn" in names:
            before["dispatch_attention_fn"] = names["dispatch_attention_fn"]
            names["dispatch_attention_fn"] = _dispatch_shim(names["dispatch_attention_fn"])
    _OPEN[name] = (users + 1, before)


def _close_module(name: str) -> None:
    users, before = _OPEN[name]
    if users > 1:
        _OPEN[name] = (users - 1, before)
        return
    del _OPEN[name]
    names = sys.modules[name].__dict__
    for key, value in before.items():
        ours = _functional() if key == "F" else _dispatch_shim(value)
        if names.get(key) is ours:  # someone who patched over us keeps a pass-through
            names[key] = value


@functools.cache
def _functional() -> types.ModuleType:
    """`torch.nn.functional` with our pass-through for the one function."""
    proxy = types.ModuleType("torch.nn.functional", F.__doc__)
    proxy.__dict__.update({k: v for k, v in vars(F).items() if not k.startswith("__")})
    proxy.__dict__["scaled_dot_product_attention"] = _sdpa_shim
    return proxy


def _sdpa_shim(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    if CURRENT.mark is None or dropout_p or query.ndim != 4:
        flags = {"enable_gqa": True} if enable_gqa else {}
        return F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, **flags)
    q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    return _hand_over(q, k, v, attn_mask, scale, is_causal, enable_gqa, SDPA, None, None).transpose(1, 2)


def _dispatch_shim(stock: Callable[..., Any]) -> Callable[..., Any]:
    """The pass-through for one dispatch function; the same object for the same function."""
    if id(stock) in _SHIMS:
        return _SHIMS[id(stock)]
    number = len(_CORES)
    _CORES.append(stock)

    def dispatch_attention_fn(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: Any = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
        attention_kwargs: dict[str, Any] | None = None,
        *,
        backend: Any = None,
        parallel_config: Any = None,
    ) -> torch.Tensor:
        if CURRENT.mark is None or dropout_p or attention_kwargs:
            rest = {} if parallel_config is None else {"parallel_config": parallel_config}
            args = (query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, attention_kwargs)
            return stock(*args, backend=backend, **rest)
        return _hand_over(query, key, value, attn_mask, scale, is_causal, enable_gqa, number, backend, parallel_config)

    _SHIMS[id(stock)] = dispatch_attention_fn
    return dispatch_attention_fn


# ---- from the seam to the owner


def _hand_over(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: Any,
    scale: float | None,
    is_causal: bool,
    enable_gqa: bool,
    core: int,
    backend: Any,
    parallel_config: Any,
) -> torch.Tensor:
    mark = CURRENT.mark
    assert mark is not None
    plain = parallel_config is None and (mask is None or isinstance(mask, torch.Tensor))
    if torch.compiler.is_compiling():
        if not plain:  # block masks and process groups cannot pass an operator; stock code traces them
            return _CORES[core](
                q, k, v, mask, 0.0, is_causal, scale, enable_gqa, None, backend=backend, parallel_config=parallel_config
            )
        name = "" if backend is None else str(getattr(backend, "value", backend))
        return attention_op(q, k, v, mask, mark.handle, scale, is_causal, enable_gqa, core, name)
    flags = {"is_causal": is_causal, "enable_gqa": enable_gqa}
    under = StockCore(core, backend, parallel_config)
    return mark.owner.attend(mark, (q, k, v), mask, {"scale": scale, **flags}, under)


class StockCore:
    """What the processor would have called, with the user's own backend."""

    def __init__(self, number: int, backend: Any, parallel_config: Any) -> None:
        self.number, self.backend, self.parallel_config = number, backend, parallel_config

    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: Any,
        scale: float | None,
        is_causal: bool,
        enable_gqa: bool,
    ) -> torch.Tensor:
        """Heads-last in and out; `mask` as the processor gave it."""
        if self.number == SDPA:
            flags = {"enable_gqa": True} if enable_gqa else {}
            q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
            return F.scaled_dot_product_attention(q, k, v, mask, 0.0, is_causal, scale=scale, **flags).transpose(1, 2)
        rest = {} if self.parallel_config is None else {"parallel_config": self.parallel_config}
        return _CORES[self.number](q, k, v, mask, 0.0, is_causal, scale, enable_gqa, None, backend=self.backend, **rest)

    def with_lse(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any, scale: float | None
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """(answer, log-sum-exp [B, Sq, H]) by the kernels behind PyTorch's own backend; None for any other."""
        if self.number != SDPA and (self.parallel_config is not None or not is_native(_CORES[self.number], self.backend)):
            return None
        return dense_with_lse(q, k, v, mask, scale)


# a decision taken while a CUDA graph is recorded would be frozen into it
_TAGS = (torch.Tag.cudagraph_unsafe,) if hasattr(torch.Tag, "cudagraph_unsafe") else ()


@torch.library.custom_op("genattn::attention", mutates_args=(), tags=_TAGS)
def attention_op(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    handle: torch.Tensor,
    scale: float | None,
    is_causal: bool,
    enable_gqa: bool,
    core: int,
    backend: str,
) -> torch.Tensor:
    """One attention call inside a compiled graph; which mark it belongs to is read from `handle` when it runs."""
    mark = Mark.living.get(int(handle))
    under = StockCore(core, backend or None, None)
    flags: dict[str, Any] = {"scale": scale, "is_causal": is_causal, "enable_gqa": enable_gqa}
    if mark is None:  # a graph that outlived its plugins
        out = under(query, key, value, mask, **flags)
    else:
        out = mark.owner.attend(mark, (query, key, value), mask, flags, under)
    out = out.contiguous()
    # an operator may not hand back its own input, as a plugin that returns the values would
    same = any(out.untyped_storage().data_ptr() == t.untyped_storage().data_ptr() for t in (query, key, value))
    return out.clone() if same else out


@attention_op.register_fake
def _(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: Any) -> torch.Tensor:
    return query.new_empty((*query.shape[:-1], value.shape[-1]))


def _no_backward(ctx: Any, *grads: Any) -> Any:
    raise RuntimeError(
        "attention under genattn has no backward pass inside a compiled graph; train eagerly, or call handle.remove() first"
    )


attention_op.register_autograd(_no_backward)


def signature_of(stock: type) -> inspect.Signature:
    """Signature of the denoiser's forward, decorators looked through."""
    return _signature(stock)


@functools.cache
def _signature(stock: type) -> inspect.Signature:
    return inspect.signature(inspect.unwrap(stock.forward))  # type: ignore[attr-defined]
