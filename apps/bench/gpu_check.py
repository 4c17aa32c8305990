"""Every kernel that ships against the definition, on the device at hand: real cuts of real patterns, a few frames long.

Output, log-sum-exp and gradients; each case alone, and a row each, so that one wrong kernel costs no other its time.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from genattn.functional.planned import block_plan_for
from genattn.geometry.token_layout import TokenLayout
from genattn.kernels.block_sparse import block_sparse_attention
from genattn.kernels.plan.block_plan import BlockPlan, dense_plan
from genattn.kernels.reference.attention import reference_attention
from genattn.kernels.triton.halo import triton_halo_attention
from genattn.patterns.combine import Union
from genattn.patterns.halo import halo_plan
from genattn.patterns.neighborhood import NeighborhoodPattern
from genattn.patterns.pattern import Pattern
from genattn.patterns.radial import RadialPattern

BOUNDS = {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 8e-3}
_LSE_BOUND = 1e-2
_INT8_BOUND = 4e-2
_FAR = 1 << 31


@dataclass(frozen=True)
class Check:
    """One case: which kernel, on which plan and tensors. kv_heads divides heads; first: tensors in the order [B, H, S, D]."""

    name: str
    pattern: Pattern
    grid: tuple[int, int, int] = (3, 45, 80)
    text: int = 256
    heads: int = 2
    kv_heads: int = 2
    dim: int = 128
    dtype: torch.dtype = torch.bfloat16
    masked: bool = False
    first: bool = False
    tail: str | None = None
    impl: str = "triton"

    @property
    def layout(self) -> TokenLayout:
        """The token sequence."""
        return TokenLayout.from_grid(self.grid, text_after=self.text)


def checks(toy: bool = False) -> list[Check]:
    """What ships, in the order of what matters; toy: at sizes for an interpreter."""
    radial, strided = RadialPattern(), NeighborhoodPattern((3, 24, 24), stride=(1, 8, 8))
    sliding = NeighborhoodPattern((3, 24, 24))
    some = [
        Check("radial", radial),
        Check("radial masked", radial, masked=True),
        Check("strided", strided),
        Check("sliding", sliding),
        Check("sliding masked", sliding, masked=True),
        Check("union", Union(RadialPattern(decay=0.25), NeighborhoodPattern((1, 9, 9)))),
        Check("radial tail", RadialPattern(decay=0.25), tail="mean2"),
        Check("radial D64 float16", radial, dim=64, dtype=torch.float16),
        Check("sliding float32", sliding, dtype=torch.float32),
        Check("decay per head, heads first", RadialPattern(decay=(0.25, 0.5, 1.0, 0.5)), heads=4, kv_heads=2, first=True),
        Check("radial D72", radial, dim=72),
        Check("sliding halo", sliding, impl="halo"),
        Check("radial int8", radial, impl="triton-int8"),
    ]
    if not toy:
        return some
    small = NeighborhoodPattern((2, 3, 3))
    toys = {"strided": NeighborhoodPattern((2, 4, 4), stride=(1, 2, 2)), "union": Union(radial, small), "radial": radial}
    return [
        replace(c, pattern=c.pattern if "decay" in c.name else toys.get(c.name.split()[0], small), grid=(2, 4, 6), text=5,
                dim=32, dtype=torch.float16 if c.impl == "triton-int8" else torch.float32)
        for c in some
    ]  # fmt: skip


def check_row(check: Check, device: str) -> dict[str, Any]:
    """The largest relative error of a case, of its log-sum-exp the absolute one, and whether all is within bounds."""
    draw = torch.Generator(device).manual_seed(0)
    seqlen = check.layout.seqlen
    tensors = [_drawn(draw, seqlen, n, check, device) for n in (check.heads, check.kv_heads, check.kv_heads)]
    # a NaN in a hidden key must reach nobody
    mask = torch.arange(seqlen, device=device)[None] % 7 != 3 if check.masked else None
    want, want_lse, wanted = _definition(tensors, check, mask)
    got, lse, grads = _result(tensors, check, mask)
    finite = torch.isfinite(want_lse)
    lse_error = float((lse.double() - want_lse)[finite].abs().max())
    errors = [_error(a, b) for a, b in zip((got, *grads), (want, *wanted))]
    bound = _INT8_BOUND if check.impl == "triton-int8" else BOUNDS[check.dtype]
    lse_bound = 10 * _LSE_BOUND if check.impl == "triton-int8" else _LSE_BOUND
    right = max(errors) <= bound and lse_error <= lse_bound and torch.equal(torch.isfinite(lse), finite)
    row = {"case": f"check {check.name}", "impl": check.impl, "head_dim": check.dim, "dtype": str(check.dtype)[6:]}
    return {**row, "error": max(errors), "lse_error": lse_error, "correct": right}


def far_row(device: str) -> dict[str, Any]:
    """Rows and heads beyond 2^31 elements, which a 32-bit offset would not reach; forward only."""
    plan, worst = dense_plan(200, 200, 64, 64).to(device), 0.0
    far = _FAR + 1024
    for strides in ((far * 2, 128, far, 1), (far * 200, far // 128 * 2, 128, 1)):
        extent = sum(n * (size - 1) for n, size in zip(strides, (1, 200, 2, 128))) + 1
        held = torch.empty(extent, dtype=torch.bfloat16, device=device)
        query = held.as_strided((1, 200, 2, 128), strides)
        query.copy_(torch.randn(query.shape, device=device))
        got: Any = block_sparse_attention(query, query, query, plan, impl="triton")
        near = query.contiguous()
        want: Any = block_sparse_attention(near, near, near, plan, impl="triton")
        worst = max(worst, _error(got, want))
        del held, query
    return {"case": "check far rows", "impl": "triton", "head_dim": 128, "error": worst, "correct": worst == 0.0}


def _drawn(draw: torch.Generator, seqlen: int, heads: int, check: Check, device: str) -> torch.Tensor:
    shape = (1, heads, seqlen, check.dim) if check.first else (1, seqlen, heads, check.dim)
    drawn = torch.randn(shape, generator=draw, device=device).to(check.dtype)
    return drawn.transpose(1, 2) if check.first else drawn


def _plan(tensors: list[torch.Tensor], check: Check) -> BlockPlan:
    return block_plan_for(tensors[0], tensors[1], check.pattern, check.layout).with_tail(check.tail)


def _definition(
    tensors: list[torch.Tensor], check: Check, mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, ...]]:
    exact = [x.double().requires_grad_(_has_backward(check)) for x in tensors]
    plan = _plan(tensors, check).to(tensors[0].device)
    want, lse = reference_attention(exact[0], exact[1], exact[2], plan, key_mask=mask)
    grads = torch.autograd.grad((want * _weight(want)).sum(), exact) if _has_backward(check) else ()
    return want.detach(), lse.detach(), grads


def _result(
    tensors: list[torch.Tensor], check: Check, mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, ...]]:
    if mask is not None:
        hidden = ~mask[:, :, None, None]
        tensors = [tensors[0], *(x.masked_fill(hidden, float("nan")) for x in tensors[1:])]
    if check.impl == "halo":
        query, key, value = tensors
        return *triton_halo_attention(query, key, value, halo_plan(check.pattern, check.layout), key_mask=mask), ()
    inputs = [x.detach().requires_grad_(_has_backward(check)) for x in tensors]
    plan = _plan(tensors, check)
    query, key, value = inputs
    out: Any = block_sparse_attention(query, key, value, plan, key_mask=mask, return_lse=True, impl=check.impl)
    weighed = (out[0] * _weight(out[0]).to(out[0].dtype)).sum() if _has_backward(check) else None
    grads = torch.autograd.grad(weighed, inputs) if weighed is not None else ()
    return out[0].detach(), out[1].detach(), grads


def _has_backward(check: Check) -> bool:
    return check.impl == "triton"


def _weight(like: torch.Tensor) -> torch.Tensor:
    """What the loss weighs each output with: the same numbers for both sides, exact in every type."""
    return (torch.arange(like.numel(), device=like.device) % 13 - 6).view(like.shape).to(like.dtype) / 8


def _error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-30))


def check_jobs(device: str, toy: bool = False) -> Iterator[tuple[str, Any]]:
    """(name, job) of every case."""
    for check in checks(toy):
        yield f"check {check.name}", lambda check=check: [check_row(check, device)]
    if not toy:
        yield "check far rows", lambda: [far_row(device)]
