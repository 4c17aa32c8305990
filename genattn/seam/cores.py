"""What a current mark does: attention calls of stock code come to the mark's owner.

In the modules that define the processors, the names `dispatch_attention_fn` and `F` (by whatever name it was imported) point to
pass-throughs. Without a current mark they call what stood there before; with one they hand the call to the mark's owner.

Under torch.compile the call becomes one opaque operator that takes the mark as a 0-dim tensor, so that all layers share one
graph and every decision about step, layer and pattern is taken when the graph runs.
"""

import functools
import itertools
import threading
import types
import weakref
from collections.abc import Callable
from typing import Any, ClassVar, Protocol

import torch
import torch.nn.functional as F

from genattn.errors import GenAttnError
from genattn.functional.log_sum_exp import dense_with_lse, is_native
from genattn.functional.pass_throughs import SDPA, core_of, is_pass_through, numbered, under
from genattn.kernels.block_sparse import as_autocast
from genattn.layouts.site import AttentionSite
from genattn.seam.plugin import AttentionCall

MARK = "_genattn_mark"


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
    # set in every thread's own dict: a class default would make Dynamo's guard fail on the first write; in a list, because
    # Dynamo loses what is written to an attribute once it has traced an operator with a body, as flex_attention is
    def __init__(self) -> None:
        self.held: list[Mark | None] = [None]


CURRENT = _Current()


# ---- the names in the processors' modules

_OPEN: dict[int, tuple[int, dict[str, Any], set[str]]] = {}  # by identity: users, the module's dict, the names that are ours
_SDPA_NAME = "scaled_dot_product_attention"
_DISPATCH_NAME = "dispatch_attention_fn"


def has_seam(names: dict[str, Any]) -> bool:
    """Whether a module's dict holds a name through which attention calls go."""
    return id(names) in _OPEN or bool(_doors(names))


def _doors(names: dict[str, Any]) -> dict[str, Any]:
    """{name: our pass-through for what stands there}."""
    own = {key: value for key, value in names.items() if not key.startswith("__")}  # Dynamo puts aliases of its own there
    functional = {key: _functional() for key, value in own.items() if value is F or isinstance(value, _Functional)}
    direct = {key: _sdpa_shim(value) for key, value in own.items() if value is getattr(F, _SDPA_NAME)}
    found = names.get(_DISPATCH_NAME)
    return {**functional, **direct, **({} if found is None else {_DISPATCH_NAME: _dispatch_shim(found)})}


def open_namespace(names: dict[str, Any]) -> None:
    """Put our pass-throughs into a module's dict, once for however many users; again over a patch that now stands on ours."""
    users, _, held = _OPEN.get(id(names), (0, names, set()))
    if not users or not is_ours(names.get(_DISPATCH_NAME)):
        doors = _doors(names)
        names.update(doors)
        held.update(doors)
    _OPEN[id(names)] = (users + 1, names, held)


def close_namespace(names: dict[str, Any]) -> None:
    """Undo one `open_namespace`; the last one gives the names back, except where someone has put another thing over ours."""
    users, _, held = _OPEN[id(names)]
    if users > 1:
        _OPEN[id(names)] = (users - 1, names, held)
        return
    del _OPEN[id(names)]
    for key in held:
        if is_ours(names.get(key)):
            names[key] = _under(names[key])  # not what stood there first: a patch over ours may have come, or gone


def is_ours(value: Any) -> bool:
    """Whether it is one of our pass-throughs."""
    return isinstance(value, _Functional) or is_pass_through(value)


def _under(value: Any) -> Any:
    """What stands under one of our pass-throughs; anything else as it is."""
    if isinstance(value, _Functional):
        return F
    return under(value)


class _Functional(types.ModuleType):
    """`torch.nn.functional` as it is at this moment, with our pass-through for the one function; what is set is set there."""

    def __getattr__(self, name: str) -> Any:
        return getattr(F, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(F, name, _under(value))

    def __delattr__(self, name: str) -> None:
        delattr(F, name)

    def __dir__(self) -> list[str]:
        return dir(F)

    @property
    def scaled_dot_product_attention(self) -> Callable[..., Any]:
        """Ours around whatever torch.nn.functional holds now: other packages patch it."""
        return _sdpa_shim(getattr(F, _SDPA_NAME))


@functools.cache
def _functional() -> types.ModuleType:
    return _Functional("torch.nn.functional", F.__doc__)


def _sdpa_shim(stock: Callable[..., Any]) -> Callable[..., Any]:
    def make(number: int) -> Callable[..., Any]:
        def scaled_dot_product_attention(
            query: torch.Tensor,
            key: torch.Tensor,
            value: torch.Tensor,
            attn_mask: torch.Tensor | None = None,
            dropout_p: float = 0.0,
            is_causal: bool = False,
            scale: float | None = None,
            enable_gqa: bool = False,
        ) -> torch.Tensor:
            if CURRENT.held[0] is None or dropout_p or query.ndim != 4:
                flags = {"enable_gqa": True} if enable_gqa else {}
                return stock(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, **flags)  # type: ignore[no-any-return]
            q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
            return _hand_over(q, k, v, attn_mask, scale, is_causal, enable_gqa, number, None, None).transpose(1, 2)

        return scaled_dot_product_attention

    return numbered(stock, True, make)


def _dispatch_shim(stock: Callable[..., Any]) -> Callable[..., Any]:
    def make(number: int) -> Callable[..., Any]:
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
            if CURRENT.held[0] is None or dropout_p or attention_kwargs:
                rest = {} if parallel_config is None else {"parallel_config": parallel_config}
                args = (query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, attention_kwargs)
                return stock(*args, backend=backend, **rest)  # type: ignore[no-any-return]
            return _hand_over(query, key, value, attn_mask, scale, is_causal, enable_gqa, number, backend, parallel_config)

        return dispatch_attention_fn

    return numbered(stock, False, make)


# ---- from the seam to the owner

_PARALLEL: list[Any] = [None]  # the parallel configs that compiled graphs name, by number


@torch.compiler.assume_constant_result  # process groups cannot pass an operator, a number can
def _number_of(parallel_config: Any) -> int:
    """Its place in `_PARALLEL`; all layers of a model have one config."""
    for number, known in enumerate(_PARALLEL):
        if known is parallel_config:
            return number
    _PARALLEL.append(parallel_config)
    return len(_PARALLEL) - 1


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
    mark = CURRENT.held[0]
    assert mark is not None
    if torch.compiler.is_compiling():
        answer = None
        if mask is not None and not isinstance(mask, torch.Tensor):
            # a block mask cannot pass an operator; stock code's answer under it can
            more = {"backend": backend, "parallel_config": parallel_config}
            answer = core_of(core)[0](q, k, v, mask, 0.0, is_causal, scale, enable_gqa, None, **more)
            if parallel_config is not None:
                return answer  # type: ignore[no-any-return]
            mask = None
        # inside of the operator autocast is off, so what it does to SDPA's inputs is traced here
        q, k, v = as_autocast(q, k, v)
        name = "" if backend is None else str(getattr(backend, "value", backend))
        shared = 0 if parallel_config is None else _number_of(parallel_config)
        return attention_op(q, k, v, mask, mark.handle, scale, is_causal, enable_gqa, core, name, shared, answer)
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
        before, CURRENT.held[0] = CURRENT.held[0], None  # a patch that calls one of our pass-throughs must not come back here
        try:
            stock, heads_first = core_of(self.number)
            if heads_first:
                flags = {"enable_gqa": True} if enable_gqa else {}
                q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
                return stock(q, k, v, mask, 0.0, is_causal, scale=scale, **flags).transpose(1, 2)  # type: ignore[no-any-return]
            rest = {} if self.parallel_config is None else {"parallel_config": self.parallel_config}
            out = stock(q, k, v, mask, 0.0, is_causal, scale, enable_gqa, None, backend=self.backend, **rest)
            return out  # type: ignore[no-any-return]
        finally:
            CURRENT.held[0] = before

    def answer(self, call: AttentionCall) -> torch.Tensor:
        """The end of a chain: stock's answer to what plugins left of a call, with its log-sum-exp where one asked for it."""
        if call.record.wants_lse and not call.is_causal:  # a causal call's would not mean what it says
            told = self.with_lse(call.query, call.key, call.value, call.mask, call.scale)
            if told is not None:
                call.record.lse = told[1]
                return told[0]
        return self(call.query, call.key, call.value, call.mask, call.scale, call.is_causal, call.enable_gqa)

    def with_lse(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any, scale: float | None
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """(answer, log-sum-exp [B, Sq, H]) by the kernels behind PyTorch's own backend; None for any other."""
        stock, heads_first = core_of(self.number)
        if heads_first:
            native = stock is torch._C._nn.scaled_dot_product_attention  # type: ignore[attr-defined]
        else:
            native = self.parallel_config is None and is_native(stock, self.backend)
        return dense_with_lse(q, k, v, mask, scale) if native else None


class BlockMask:
    """In place of flex's own, which stays in the graph: a mask that says more than which keys are valid."""


class AnsweredCore(StockCore):
    """The end of a chain where stock code has answered in the graph, under a block mask: plugins may edit that answer."""

    def __init__(self, tensors: tuple[torch.Tensor, ...], answer: torch.Tensor) -> None:
        super().__init__(SDPA, None, None)
        self.tensors, self.given = tensors, answer

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *mask_and_flags: Any, **flags: Any) -> torch.Tensor:
        """Stock's answer, to the call as stock made it and to no other."""
        for ours, theirs in zip((q, k, v), self.tensors):
            if ours is not theirs and not (ours.shape == theirs.shape and torch.equal(ours, theirs)):
                raise GenAttnError(
                    "a plugin asks for other queries, keys or values than the model's in a call under a flex BlockMask, "
                    "which only code inside of the compiled graph can answer; run this model without torch.compile"
                )
        return self.given

    def with_lse(self, *call: Any) -> None:
        """Not told: the block mask is not at hand."""


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
    parallel: int = 0,
    answer: torch.Tensor | None = None,
) -> torch.Tensor:
    """One attention call inside a compiled graph; which mark it belongs to is read from `handle` when it runs.

    answer: stock code's, where its mask is no tensor.
    """
    mark, tensors = Mark.living.get(int(handle)), (query, key, value)
    plain = StockCore(core, backend or None, _PARALLEL[parallel])
    under, seen = (plain, mask) if answer is None else (AnsweredCore(tensors, answer), BlockMask())
    flags: dict[str, Any] = {"scale": scale, "is_causal": is_causal, "enable_gqa": enable_gqa}
    if mark is None:  # a graph that outlived its plugins
        out = under(*tensors, seen, **flags)
    else:
        out = mark.owner.attend(mark, tensors, seen, flags, under)
    out = out.contiguous()
    # an operator may not hand back its own input, as a plugin that returns the values would
    given = tensors if answer is None else (*tensors, answer)
    same = any(out.untyped_storage().data_ptr() == t.untyped_storage().data_ptr() for t in given)
    return out.clone() if same else out


@attention_op.register_fake
def _(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: Any) -> torch.Tensor:
    return query.new_empty((*query.shape[:-1], value.shape[-1]))


def _no_backward(ctx: Any, *grads: Any) -> Any:
    raise RuntimeError(
        "attention under genattn has no backward pass inside a compiled graph; train eagerly, or call handle.remove() first"
    )


attention_op.register_autograd(_no_backward)
