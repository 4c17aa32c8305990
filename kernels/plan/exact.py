"""Arithmetic of our own is done in the types that it names, whatever autocast would make of it.

Inputs are cast once, as scaled_dot_product_attention casts them (`as_autocast`); inside, a matrix product in float32 is meant
to be one, and tensors of two types do not add up.
"""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

_Args = ParamSpec("_Args")
_Result = TypeVar("_Result")


def exact(make: Callable[_Args, _Result]) -> Callable[_Args, _Result]:
    """`make` outside of autocast."""

    @functools.wraps(make)
    def wrapped(*args: _Args.args, **kwargs: _Args.kwargs) -> _Result:
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            return make(*args, **kwargs)

    return wrapped
