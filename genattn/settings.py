"""Checks of settings that users write: what must hold, what came. NumPy's numbers count as numbers, True and False do not."""

import math
import numbers
from collections.abc import Iterable, Sequence
from typing import Any

from genattn.errors import GenAttnError

BELOW_ONE = math.nextafter(1.0, 0.0)


def refuse(name: str, value: object, what: str) -> GenAttnError:
    """The error for a setting that is not what it must be; what: "a share", or with what to do, "a share; 0.3 is usual"."""
    must, _, todo = what.partition("; ")
    return GenAttnError(f"{name} must be {must}, got {value!r}" + (f"; {todo}" if todo else ""))


def number(name: str, value: object, low: float, high: float, what: str, above: bool = False) -> float:
    """`value` as a float in [low, high], or in (low, high] where it must lie above; what: for the message, as "a share"."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise refuse(name, value, what)
    found = float(value)
    if not low <= found <= high or (above and found == low):
        raise refuse(name, value, what)
    return found


def whole_number(name: str, value: object, least: int | None, what: str, most: float = math.inf) -> int:
    """`value` as an int from `least`, None for any, to `most`."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise refuse(name, value, what)
    found = int(value)
    if (least is not None and found < least) or found > most:
        raise refuse(name, value, what)
    return found


def flag(name: str, value: object) -> bool:
    """True or False, and nothing that only counts as one."""
    if not isinstance(value, bool):
        raise refuse(name, value, "True or False")
    return value


def one_of(name: str, value: object, allowed: Sequence[str]) -> str:
    """One of the names."""
    if not isinstance(value, str) or value not in allowed:
        raise refuse(name, value, f"one of {', '.join(allowed)}")
    return value


def several(name: str, value: object, what: str) -> tuple[Any, ...]:
    """The entries of a list, a tuple, a range or an array."""
    if isinstance(value, str | bytes | dict | set) or not isinstance(value, Iterable):
        raise refuse(name, value, what)
    try:
        return tuple(value)
    except TypeError:  # an array without axes
        raise refuse(name, value, what) from None


def whole_numbers(name: str, value: object, least: int | None, what: str) -> tuple[int, ...]:
    """Ints from `least`, None for any."""
    return tuple(whole_number(name, entry, least, what) for entry in several(name, value, what))
