"""The haloed-box kernel against the definition, in a process of its own with TRITON_INTERPRET=1 (test_interpreter.py).

Prints one line per case and exits with 1 when any is wrong.
"""

import os
import sys
from pathlib import Path

assert os.environ["TRITON_INTERPRET"] == "1"
sys.path[:0] = [str(Path(__file__).resolve().parents[3]), str(Path(__file__).parent)]

# ruff: noqa: E402 -- the path comes first
import torch
from interpreter_bf16 import cure_bfloat16

from genattn.functional.dispatch import attention
from genattn.geometry.token_layout import Segment, TokenLayout
from genattn.kernels.plan.halo_plan import HaloParts, HaloPlan, halo_attention
from genattn.kernels.reference.attention import reference_attention
from genattn.kernels.triton.halo import triton_halo_attention, why_not_triton_halo
from genattn.patterns.halo import halo_plan
from genattn.patterns.neighborhood import NeighborhoodPattern

BOUNDS = {torch.float32: 3e-6, torch.float16: 1.2e-3, torch.bfloat16: 7e-3}
failures = []


def _says(name: str, ok: bool, detail: str) -> None:
    print(f"{'ok  ' if ok else 'FAIL'} {name}: {detail}", flush=True)
    if not ok:
        failures.append(name)


def check(name, layout, pattern, dtype=torch.float32, heads=2, kv_heads=2, dim=16, batch=1, masked=False, strided=False,
          block=64, scale=None):  # fmt: skip
    """One launch against reference_attention on the fixed tiles of the same pattern; out and log-sum-exp."""
    inputs = [torch.randn(batch, layout.seqlen, n, dim).to(dtype) for n in (heads, kv_heads, kv_heads)]
    if strided:
        inputs = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs]
    key_mask = torch.rand(batch, layout.seqlen) < 0.7 if masked else None
    want, want_lse = reference_attention(
        *(x.double() for x in inputs), pattern.plan(layout, 16, 16), scale=scale, key_mask=key_mask
    )
    if key_mask is not None:
        for x in inputs[1:]:
            x[~key_mask] = float("nan")  # what is hidden must not leak
    out, lse = triton_halo_attention(*inputs, halo_plan(pattern, layout, block), scale=scale, key_mask=key_mask)
    finite = torch.isfinite(want_lse)
    error = float((out.double() - want).norm() / want.norm())
    lse_ok = torch.equal(torch.isfinite(lse), finite) and float((lse - want_lse)[finite].abs().max()) < 1e-5
    _says(name, error < BOUNDS[dtype] and lse_ok, f"{error:.1e} lse {lse_ok}")


def check_reasons() -> None:
    layout = TokenLayout.from_grid((6, 8))
    plan, query = halo_plan(NeighborhoodPattern(3), layout, 16), torch.randn(1, 48, 1, 16)
    for name, call, wanted in (
        ("float64", (query.double(), plan), "float16, bfloat16 or float32"),
        ("head dim", (torch.randn(1, 48, 1, 300), plan), r"[1, 256]"),
        ("gradient", (query, plan, True), "no backward"),
        ("long box", (query, halo_plan(NeighborhoodPattern(-1), TokenLayout.from_grid((1030,)), 16)), "places per axis"),
        ("wide tile", (query, halo_plan(NeighborhoodPattern(3), TokenLayout.from_grid((512,)), 512)), "256 queries"),
        ("gaps", (query, _with_gaps(plan)), "without gaps"),
    ):
        reason = why_not_triton_halo(*call)
        _says(f"reason {name}", wanted in (reason or ""), str(reason))
    _says("no reason", why_not_triton_halo(query, plan) is None, "served")
    try:
        triton_halo_attention(query.double(), query.double(), query.double(), plan)
        _says("refusal", False, "served float64")
    except ValueError as error:
        _says("refusal", "use halo_attention" in str(error), str(error))


def _with_gaps(plan: HaloPlan) -> HaloPlan:
    seen = torch.tensor([[True, False, True]])
    kinds = (HaloParts(torch.arange(2)[:, None], torch.arange(3).repeat(2, 1), seen),)
    return HaloPlan((plan.axes[0], plan.axes[1], kinds), plan.extent, None, *(plan.shared_keys,) * 3, plan.seqlen)


def check_dispatch() -> None:
    """`impl="halo"` takes the kernel where it serves and tensor operations where a gradient is wanted."""
    layout, pattern = TokenLayout.from_grid((3, 4, 5)), NeighborhoodPattern((2, 3, 3))
    inputs = [torch.randn(1, 60, 2, 16) for _ in range(3)]
    plan = halo_plan(pattern, layout)
    kernel = triton_halo_attention(*inputs, plan)[0]
    _says("dispatch", torch.equal(attention(*inputs, pattern, layout, impl="halo"), kernel), "impl='halo' is the kernel")
    out, lse = attention(*inputs, pattern, layout, impl="halo", return_lse=True)
    _says("dispatch lse", torch.equal(out, kernel) and lse.shape == (1, 60, 2), "with its log-sum-exp")
    inputs[1].requires_grad_()
    out = attention(*inputs, pattern, layout, impl="halo")
    _says("dispatch gradient", out.requires_grad and torch.equal(out, halo_attention(*inputs, plan)), "tensor operations")


def main() -> int:
    torch.manual_seed(0)
    cure_bfloat16()
    video, text = TokenLayout.from_grid((4, 5, 7)), TokenLayout.from_grid((2, 4, 5), text_before=3, text_after=18)
    for dtype in BOUNDS:
        check(f"sliding 3-D {dtype}", video, NeighborhoodPattern((3, 3, 5)), dtype, dim=24)
    check("sliding 2-D, ragged", TokenLayout.from_grid((11, 13)), NeighborhoodPattern((5, 4)))
    check("1-D", TokenLayout.from_grid((100,)), NeighborhoodPattern(9), heads=1, kv_heads=1)
    check("strided, some tiles plain", video, NeighborhoodPattern((4, 3, 4), stride=(2, 3, 4)))
    check("blocked, every tile plain", TokenLayout.from_grid((8, 8)), NeighborhoodPattern(4, stride=4), block=16)
    check("whole axis and causal", video, NeighborhoodPattern((-1, 3, 3), is_causal=(True, False, False)))
    check("dilated", TokenLayout.from_grid((2, 7, 10)), NeighborhoodPattern((2, 3, 3), dilation=(1, 2, 3)))
    check("text in the same softmax", text, NeighborhoodPattern((2, 3, 3)), scale=0.4)
    check("grouped heads, batch, strides", text, NeighborhoodPattern((2, 3, 3)), torch.float16, 4, 2, 16, 2, False, True)
    check("key mask, some rows see nothing", video, NeighborhoodPattern(1), masked=True, batch=2)
    check("key mask with text", text, NeighborhoodPattern((2, 3, 3)), masked=True)
    mixed = TokenLayout((Segment("text", (3,)), Segment("grid", (3, 4, 5)), Segment("padding", (2,))))
    check("padding", mixed, NeighborhoodPattern((2, 3, 3), stride=(1, 2, 1)))
    check("head dim 72", TokenLayout.from_grid((5, 6)), NeighborhoodPattern(3), heads=1, kv_heads=1, dim=72)
    check_reasons()
    check_dispatch()
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
