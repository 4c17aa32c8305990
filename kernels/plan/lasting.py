"""What is kept for later calls must not carry the mode of the call that made it.

A tensor made under `torch.inference_mode` can never be saved for a backward pass, and one made under `torch.device("cuda")` or
`torch.set_default_device` lies where nobody looks for it; under torch.func's `grad` or `vmap` every new tensor is a wrapper
without memory, which ends with the transform. `lasting` makes what it decorates outside of these modes.
"""

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ParamSpec, TypeVar

import torch

try:
    from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

    _no_transforms: Callable[[], AbstractContextManager[Any]] = temporarily_clear_interpreter_stack
except ImportError:  # pragma: no cover
    _no_transforms = nullcontext

_Args = ParamSpec("_Args")
_Result = TypeVar("_Result")


def _outside_of_transforms() -> AbstractContextManager[Any]:
    return _no_transforms() if torch._C._functorch.peek_interpreter_stack() is not None else nullcontext()


def lasting(make: Callable[_Args, _Result]) -> Callable[_Args, _Result]:
    """`make`, whose tensors are ordinary ones, on the CPU where it names no device."""

    @functools.wraps(make)
    def wrapped(*args: _Args.args, **kwargs: _Args.kwargs) -> _Result:
        if torch.compiler.is_compiling():  # the modes are those of the trace
            return make(*args, **kwargs)
        with _outside_of_transforms(), torch.inference_mode(False), torch.no_grad(), torch.device("cpu"):
            return make(*args, **kwargs)

    return wrapped
