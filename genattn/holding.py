"""What a callable may keep alive: caches of ours must not hold what a user's patch has in its closure."""

import types
from typing import Any

_PLAIN = (int, float, complex, str, bytes, type(None))


def may_hold(function: Any) -> bool:
    """Whether a callable may keep objects of the user's alive: all but builtins and functions that have nothing but code."""
    if isinstance(function, types.BuiltinFunctionType):
        return False
    if not isinstance(function, types.FunctionType) or function.__closure__:
        return True
    given = (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values())
    return any(not isinstance(value, _PLAIN) for value in given)
