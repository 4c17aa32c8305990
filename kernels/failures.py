"""Kernels that failed on this machine when they were launched: told once, remembered, and passed over by "auto" from then on.

A launch can fail where every check before it passed: a chip with less shared memory than its generation has, a driver that
knows no such code, no C compiler where Triton wants one. Who names a backend gets the failure as an error; "auto" goes on.
"""

import warnings
from collections.abc import Hashable

import torch

from genattn.kernels.plan.block_plan import BlockPlan

_FAILED: dict[Hashable, str] = {}
# after these a device computes nothing any more, whoever asks
_FATAL = ("illegal memory access", "misaligned address", "device-side assert", "unspecified launch failure", "cuda-assert")


class KernelFailure(RuntimeError):
    """A kernel that should have served could not be compiled or launched."""

    def __init__(self, impl: str, reason: str) -> None:
        super().__init__(f"the kernel of impl={impl!r} failed on this device: {reason}; use another impl, or impl='auto'")
        self.impl, self.reason = impl, reason


def failure_of(impl: str, error: Exception) -> KernelFailure | None:
    """The failure that an exception out of a launch stands for; None when it is to be raised as it is."""
    text = f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), 'no message')}"
    # a ValueError is our own: it says what to do differently
    if isinstance(error, torch.OutOfMemoryError | ValueError) or is_fatal(error):
        return None
    return KernelFailure(impl, text)


def is_fatal(error: BaseException) -> bool:
    """Whether a device computes nothing any more for this process after an error."""
    return any(word in str(error).lower() for word in _FATAL)


def remember_failure(
    failure: KernelFailure, query: torch.Tensor, plan: BlockPlan, instead: str, backward: bool = False
) -> None:
    """Pass the kernel over from now on for calls like this one, and say so once."""
    key = _key(failure.impl, query, plan, backward)
    if key not in _FAILED:
        _FAILED[key] = failure.reason
        warnings.warn(
            f"genattn: the {'backward' if backward else 'forward'} kernel of {failure.impl!r} failed on {query.device} "
            f"({failure.reason}); {instead} instead, from now on",
            RuntimeWarning,
            stacklevel=3,
        )


def failed_before(impl: str, query: torch.Tensor, plan: BlockPlan, backward: bool = False) -> str | None:
    """Why a kernel is not tried again for calls like this one, or None."""
    reason = _FAILED.get(_key(impl, query, plan, backward))
    return None if reason is None else f"it failed on this device before ({reason})"


def forget_failures() -> None:
    """Try everything again."""
    _FAILED.clear()


def _key(impl: str, query: torch.Tensor, plan: BlockPlan, backward: bool) -> Hashable:
    """What a compiled kernel depends on, as far as a plan tells."""
    partial = plan.rule is not None
    facts = (type(plan.rule).__name__, partial, None if plan.tail is None else plan.tail.kind, plan.fade is not None)
    return impl, backward, query.device, query.dtype, query.shape[-1], plan.block_q, plan.block_k, facts
