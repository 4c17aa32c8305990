"""Functions in the place of attention functions, and numbers for what is under them, by which a compiled graph can name it.

A number is for ever. A patch that may hold objects of the user's is not kept by it: its pass-through hangs on the patch itself.
"""

import weakref
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F

from genattn.holding import may_hold

SDPA = -1
_OVER = "_genattn_over"
_KEPT: dict[int, Any] = {}
_UNDER: list[tuple[Callable[[], Any], bool]] = []  # (what gives the function, whether it is heads-first)


def numbered(stock: Callable[..., Any], heads_first: bool, make: Callable[[int], Callable[..., Any]]) -> Callable[..., Any]:
    """The one pass-through for `stock`, by `make(number)`. heads_first: whether it takes [B, H, S, D], as SDPA does."""
    if is_pass_through(stock):
        return stock
    own = getattr(stock, "__dict__", None)
    known = _KEPT.get(id(stock)) or (own or {}).get(_OVER)
    if known is not None and core_of(known._genattn_core)[0] is stock:
        return known  # type: ignore[no-any-return]
    shim: Any = make(len(_UNDER))
    shim._genattn_core, shim._genattn_shim = len(_UNDER), shim
    if own is not None and may_hold(stock):
        _UNDER.append((weakref.ref(stock), heads_first))
        own[_OVER] = shim
    else:
        _UNDER.append((lambda: stock, heads_first))
        _KEPT[id(stock)] = shim
    return shim  # type: ignore[no-any-return]


def is_pass_through(value: Any) -> bool:
    """Whether it is one of ours, and not a patch to which functools.wraps handed our attributes."""
    return getattr(value, "_genattn_shim", None) is value


def under(value: Any) -> Any:
    """What stands under a pass-through; anything else as it is."""
    return core_of(value._genattn_core)[0] if is_pass_through(value) else value


def core_of(number: int) -> tuple[Callable[..., Any], bool]:
    """(function, whether it is heads-first); PyTorch's own for SDPA, and for a patch that went while a graph still names it."""
    found = _UNDER[number][0]() if number != SDPA else None
    return (F.scaled_dot_product_attention, True) if found is None else (found, _UNDER[number][1])
