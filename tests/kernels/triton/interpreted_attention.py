"""The Triton kernels against the definition, in a process of their own with TRITON_INTERPRET=1 (test_interpreter.py).

Prints one line per case and exits with 1 when any is wrong.
"""

import os
import sys
from pathlib import Path

assert os.environ["TRITON_INTERPRET"] == "1"
sys.path[:0] = [str(Path(__file__).resolve().parents[3]), str(Path(__file__).parent)]

# ruff: noqa: E402 -- the path comes first
import torch
import triton
import triton.language as tl
from interpreter_bf16 import cure_bfloat16

from genattn.geometry.token_layout import TokenLayout
from genattn.kernels.block_sparse import block_sparse_attention
from genattn.kernels.operators import block_sparse_forward
from genattn.kernels.plan.block_plan import dense_plan, run_tiles
from genattn.kernels.plan.element_rule import BlockRule, PerHeadRule
from genattn.kernels.plan.fade import HIGHEST, LOWEST, Fade
from genattn.kernels.plan.random_plan import plan_from_rule, plan_from_states, random_fade, random_grid_rule, random_plan
from genattn.kernels.reference.attention import reference_attention
from genattn.kernels.triton.block_sparse import (
    forward_arguments,
    forward_grid,
    triton_backward,
    triton_forward,
    why_not_triton,
)
from genattn.kernels.triton.forward_kernel import forward_kernel
from genattn.kernels.triton.full_tiles import why_not_full_tiles
from genattn.kernels.triton.int8_scores import int8_reference_attention, triton_int8_forward, why_not_int8
from genattn.patterns.radial import RadialPattern

BOUNDS = {torch.float32: 3e-6, torch.float16: 1.2e-3, torch.bfloat16: 7e-3}
failures = []


@triton.jit
def product(A, B, C, N: tl.constexpr):
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(C + at, tl.dot(tl.load(A + at), tl.load(B + at)).to(C.dtype.element_ty))


def _product_error() -> float:
    a, b = torch.randn(2, 16, 16).bfloat16()
    c = torch.empty(16, 16, dtype=torch.bfloat16)
    product[(1,)](a, b, c, 16)
    return float((c.double() - a.double() @ b.double()).norm() / (a.double() @ b.double()).norm())


def _says(name: str, ok: bool, detail: str) -> None:
    print(f"{'ok  ' if ok else 'FAIL'} {name}: {detail}", flush=True)
    if not ok:
        failures.append(name)


def _error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.detach().double() - want.detach()).norm() / want.detach().norm().clamp_min(1e-30))


def check(name, plan, dtype, heads=2, kv_heads=2, dim=32, batch=1, masked=False, strided=False) -> None:
    shapes = [(batch, plan.seqlen_q, heads, dim)] + [(batch, plan.seqlen_k, kv_heads, dim)] * 2
    inputs = [torch.randn(s).to(dtype) for s in shapes]
    if strided:
        inputs = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs]
    key_mask = torch.rand(batch, plan.seqlen_k) < 0.7 if masked else None
    grad_out, grad_lse = torch.randn(shapes[0]).to(dtype), torch.randn(shapes[0][:3])
    exact = [x.double().requires_grad_() for x in inputs]
    want, want_lse = reference_attention(*exact, plan, key_mask=key_mask)
    if masked:
        for x in inputs[1:]:
            x[~key_mask] = float("nan")  # what is hidden must not leak
    finite = torch.isfinite(want_lse)
    loss = (want * grad_out.double()).sum() + (want_lse[finite] * grad_lse[finite].double()).sum()
    wanted = torch.autograd.grad(loss, exact)
    out, lse = triton_forward(*inputs, plan, key_mask=key_mask)
    again = [triton_backward(grad_out, grad_lse, *inputs, out, lse, plan, key_mask=key_mask) for _ in range(2)]
    errors = [_error(out, want)] + [_error(g, w) for g, w in zip(again[0], wanted)]
    same = all(torch.equal(a, b) for a, b in zip(*again))
    # the means of a tail are rounded to the type of the keys
    close = 1e-5 if plan.tail is None or dtype == torch.float32 else 1e-2
    lse_ok = torch.equal(torch.isfinite(lse), finite) and float((lse - want_lse.detach())[finite].abs().max()) < close
    ok = max(errors) < BOUNDS[dtype] and lse_ok and same and not any(g.isnan().any() for g in again[0])
    _says(name, ok, " ".join(f"{e:.1e}" for e in errors) + f" lse {lse_ok} deterministic {same}")


def check_tail() -> None:
    """Pseudo-keys for skipped tiles: one and four a tile, lists per head, key masks, grouped heads, types."""
    plan = random_plan(61, (3, 5, 6), keep=0.4)
    check("tail", plan.with_tail("mean"), torch.float32, dim=24)
    check("tail in two parts, masked, batch", plan.with_tail("mean2"), torch.float32, 2, 1, 16, 2, True, True)
    check("tail bfloat16", plan.with_tail("mean2"), torch.bfloat16)
    per_head = random_plan(62, (2, 4, 5), heads=2, scattered=True, keep=0.5)
    check("tail per head", per_head.with_tail("mean", heads=(True, False)), torch.float32)


def check_fade() -> None:
    """Tile pairs outside: with a rule and without, tails, lists per head, key masks, grouped heads, split tiles, types."""

    def faded(plan, *numbers):
        return plan.with_fade(random_fade(plan, 5, *numbers))

    plan = random_plan(61, (3, 5, 6), keep=0.5)
    check("fade", faded(plan), torch.float32, dim=24)
    check("fade, factor 0", faded(plan, 0.0, 0.0), torch.float32, dim=16)
    check("fade, a large penalty", faded(plan, 0.5, 60.0), torch.float32, dim=16)
    check("fade of full tiles", faded(dense_plan(60, 90, 16, 32), 0.9, 0.0), torch.float16)
    check("fade, tail in two parts, masked, batch", faded(plan.with_tail("mean2")), torch.float32, 2, 1, 16, 2, True, True)
    check("fade, tail, bfloat16", faded(plan.with_tail("mean2"), 0.8, 0.3), torch.bfloat16)
    per_head = random_plan(62, (2, 4, 5), heads=2, scattered=True, keep=0.5)
    check("fade, tail per head", faded(per_head.with_tail("mean", heads=(True, False))), torch.float32)
    split = random_plan(31, (2, 8, 8), globals_=3, block_q=64, block_k=64)
    check("fade, split tiles", faded(split), torch.float32, 1, 1, 256)
    inputs = [torch.randn(1, plan.seqlen_q, 1, 16) for _ in range(3)]
    first = random_fade(plan, 5)
    window = torch.tensor([[LOWEST, HIGHEST]], dtype=torch.int32)
    half = Fade(torch.cat([window.expand(3, -1), first.window[3:]]).contiguous(), first.span, 0.3, 1.0)
    some, rows = triton_forward(*inputs, plan.with_fade(half))[0], plan.query_tiles[:3].flatten().long()
    plain = triton_forward(*inputs, plan)[0]
    _says("fade, rows inside", torch.equal(some[:, rows], plain[:, rows]) and not torch.equal(some, plain), "same bits")


def check_far_head() -> None:
    """A head that begins beyond 2^31 elements, and rows that lie beyond it, in inputs of either order."""
    plan, far = dense_plan(20, 20, 16, 16), (1 << 31) + 64
    for name, step in (("head", (far * 2, 16, far, 1)), ("row", (far * 20, far // 16 * 2, 16, 1))):
        extent = sum(n * (size - 1) for n, size in zip(step, (1, 20, 2, 16))) + 1
        inputs = [torch.empty(extent, dtype=torch.float16).as_strided((1, 20, 2, 16), step) for _ in range(3)]
        for x in inputs:
            x.copy_(torch.randn(1, 20, 2, 16))
        want = reference_attention(*(x.double() for x in inputs), plan)[0]
        out, lse = triton_forward(*inputs, plan)
        grads = triton_backward(torch.ones_like(out), None, *inputs, out, lse, plan)
        near = triton_backward(torch.ones_like(out), None, *(x.contiguous() for x in inputs), out, lse, plan)
        same = all(torch.equal(a, b) for a, b in zip(grads, near))
        _says(f"far {name}", _error(out, want) < 1.2e-3 and same, f"{_error(out, want):.1e} gradients {same}")


def check_persistent() -> None:
    """A few programs that share out all tiles give the same bits as one program a tile."""
    plan = random_plan(50, (2, 4, 5), heads=2)
    inputs = [torch.randn(2, plan.seqlen_q, 2, 16) for _ in range(3)]
    want = triton_forward(*inputs, plan)
    for programs in (1, 3):
        out, lse = torch.full_like(want[0], float("nan")), torch.full_like(want[1], float("nan"))
        arguments = forward_arguments(*inputs, out, lse, plan, None, None) | {"PERSISTENT": True}
        forward_kernel[(programs, 1)](**arguments)
        _says(f"persistent, {programs} programs", torch.equal(out, want[0]) and torch.equal(lse, want[1]), "same bits")
    grids = forward_grid(inputs[0], plan), forward_grid(inputs[0], plan, 1), forward_grid(inputs[0], plan, 99)
    tiles = plan.query_tiles.shape[0]
    _says("persistent grid", grids == ((tiles, 4), (2, 1), (min(tiles * 4, 198), 1)), str(grids))


def check_full_tiles() -> None:
    """Plans of full tiles by the kernel with tensor descriptors, and why it serves no others."""
    draw = torch.Generator().manual_seed(7)
    for dtype, heads in ((torch.float32, 1), (torch.float16, 2)):
        states = 2 * (torch.rand(heads, 3, 4, generator=draw) < 0.5).int()
        plan = plan_from_states(states, run_tiles(40, 16), run_tiles(128, 32), None, 40, 128)
        query, key, value = (torch.randn(2, n, h, 32).to(dtype) for n, h in ((40, 2), (128, 1), (128, 1)))
        want, want_lse = reference_attention(query.double(), key.double(), value.double(), plan)
        out, lse = block_sparse_attention(query, key, value, plan, impl="triton-full", return_lse=True)
        lse_ok = torch.equal(torch.isfinite(lse), torch.isfinite(want_lse))
        _says(f"full tiles {dtype}", _error(out, want) < BOUNDS[dtype] and lse_ok, f"{_error(out, want):.1e} lse {lse_ok}")
    # strips of frames: runs that begin anywhere, of unequal length
    layout = TokenLayout.from_grid((3, 5, 9), text_after=7)
    strips = RadialPattern(decay=0.2, block=16).plan(layout, 16, 16)
    inputs = [torch.randn(1, layout.seqlen, 2, 32) for _ in range(3)]
    out, lse = block_sparse_attention(*inputs, strips, impl="triton-full", return_lse=True)
    want, want_lse = reference_attention(*(x.double() for x in inputs), strips)
    close = float((lse - want_lse).abs().max()) < 1e-5
    holes = len({int(n) for n in (strips.key_tiles >= 0).sum(1)}) > 1
    _says("full tiles of a strip", _error(out, want) < 3e-6 and close and holes, f"{_error(out, want):.1e} {close} {holes}")
    for name, call, wanted in (
        ("partial", (query, random_plan(3)), "partial"),
        ("tail", (query, plan.with_tail("mean")), "stands in for no skipped tiles"),
        ("scattered", (query, _full_boxes()), "no runs of the sequence"),
        ("head dim", (query[..., :24], plan), "power of two"),
        ("gradient", (query.clone().requires_grad_(), plan), "no backward"),
    ):
        _says(f"full tiles reason {name}", wanted in str(why_not_full_tiles(*call)), str(why_not_full_tiles(*call)))
    try:
        block_sparse_attention(query, key, value, plan, impl="triton-full", key_mask=torch.ones(2, 128, dtype=torch.bool))
        _says("full tiles key mask", False, "served")
    except ValueError as error:
        _says("full tiles key mask", "serves no key mask" in str(error), str(error))


def _full_boxes():
    tiles = torch.arange(40).view(2, 20).T.reshape(4, 10).int()
    tiles = torch.nn.functional.pad(tiles, (0, 6), value=-1)
    return plan_from_states(torch.full((1, 4, 4), 2), tiles, tiles, None, 40, 40)


def check_int8(name, plan, dtype, heads=2, kv_heads=2, dim=32, masked=False) -> None:
    """int8 scores against their definition, which has the same integers."""
    shapes = [(2, plan.seqlen_q, heads, dim)] + [(2, plan.seqlen_k, kv_heads, dim)] * 2
    query, key, value = (torch.randn(s).to(dtype) for s in shapes)
    key = key + 3 * torch.randn(dim).to(dtype)
    key_mask = torch.rand(2, plan.seqlen_k) < 0.7 if masked else None
    want, want_lse = int8_reference_attention(query, key, value, plan, key_mask=key_mask)
    if masked:
        key[~key_mask] = float("nan")
    out, lse = triton_int8_forward(query, key, value, plan, key_mask=key_mask)
    finite = torch.isfinite(want_lse)
    lse_ok = torch.equal(torch.isfinite(lse), finite) and float((lse - want_lse)[finite].abs().max()) < 1e-4
    _says(f"int8 {name}", _error(out, want) < BOUNDS[dtype] and lse_ok, f"{_error(out, want):.1e} lse {lse_ok}")


def check_int8_limits() -> None:
    plan = random_plan(3, (2, 3, 4))
    rows = torch.randn(1, plan.seqlen_q, 1, 32).half()
    wanting = rows.clone().requires_grad_()
    for query, wanted in ((rows, "None"), (rows.float(), "out of proportion"), (wanting, "no backward")):
        _says("int8 reason", wanted in str(why_not_int8(query, plan)), str(why_not_int8(query, plan)))
    out = block_sparse_attention(rows, rows, rows, plan, impl="triton-int8")
    _says("int8 by name", _error(out, reference_attention(*[rows.double()] * 3, plan)[0]) < 3e-2, "impl='triton-int8'")
    try:
        block_sparse_attention(rows, rows, wanting, plan, impl="triton-int8").sum().backward()
        _says("int8 backward", False, "gave a gradient")
    except ValueError as error:
        _says("int8 backward", "has no backward" in str(error), str(error))


def check_ops() -> None:
    """torch.library's own check of the operator with every Triton kernel behind it."""
    full = dense_plan(16, 32, 16, 32)
    for impl, plan in (
        ("triton", random_plan(1, (2, 3, 4))),
        ("triton-int8", random_plan(1, (2, 3, 4))),
        ("triton-full", full),
    ):
        shapes = [(1, n, 1, 16) for n in (plan.seqlen_q, plan.seqlen_k, plan.seqlen_k)]
        inputs = [torch.randn(shape, dtype=torch.float16, requires_grad=impl == "triton") for shape in shapes]
        done = torch.library.opcheck(block_sparse_forward, (*inputs, None, plan.handle, 0.3, impl), raise_exception=False)
        _says(f"opcheck {impl}", set(done.values()) == {"SUCCESS"}, str(done))


def main() -> int:
    torch.manual_seed(0)
    stock = _product_error()
    cure_bfloat16()
    cured = _product_error()
    _says("bf16 canary", cured < 5e-3, f"stock {stock:.1e} cured {cured:.1e}")
    if stock < 5e-3:
        print("note: the stock interpreter multiplies bfloat16 rightly now; interpreter_bf16.py may go")
    drawn = [torch.float32, torch.float16, torch.bfloat16]
    for i, dtype in enumerate(drawn):
        scattered = dtype == torch.float16
        check(f"{dtype}", random_plan(i, (2, 4, 5), block_q=16, block_k=32, scattered=scattered), dtype, dim=24)
    check("ragged dense", dense_plan(37, 50, 16, 16), torch.float32)
    check("grouped heads, masked, batch", random_plan(20, (2, 4, 4), padding=3), torch.float32, 4, 2, 16, 2, True, True)
    check("per head", random_plan(21, (2, 4, 4), heads=2, scattered=True), torch.float32, masked=True)
    draw = torch.Generator().manual_seed(4)
    grids = tuple(random_grid_rule(draw, (2, 4, 4), 3, 2) for _ in range(2))
    tokens, table = grids[0].coords.shape[0], torch.rand(2, 6, 6) < 0.4
    tiles = dense_plan(tokens, tokens, 16, 16)
    same_axes = grids[0].__class__(*[getattr(grids[1], n) for n in ("coords", "frame_class", "low", "width")], grids[0].extent,
                                   grids[0].dilation, grids[0].circular)  # fmt: skip
    for name, rule, heads in (
        ("block rule", BlockRule(table[:1], 7), 1),
        ("block rule per head, shared lists", BlockRule(table, 7), 1),
        ("block rule per head", BlockRule(table, 7), 2),
        ("grids per head merged", PerHeadRule((grids[0], same_axes), (1, 0)), 2),
        ("grids per head", PerHeadRule(grids, (1, 0)), 1),
    ):
        check(name, plan_from_rule(rule, tiles.query_tiles, tiles.key_tiles, tokens, heads), torch.float32, dim=16)
    for dim in (72, 96):
        check(f"head dim {dim}", random_plan(dim, (2, 3, 4)), torch.float32, 1, 1, dim)
    check("split tiles", random_plan(31, (2, 8, 8), globals_=3, block_q=64, block_k=64), torch.float32, 1, 1, 256)
    check_tail()
    check_fade()
    check_far_head()
    check_persistent()
    check_full_tiles()
    check_int8("drawn plan", random_plan(40, (2, 4, 5), block_q=16, block_k=32), torch.float16)
    check_int8("grouped, masked", random_plan(41, (2, 4, 4), padding=3, scattered=True), torch.bfloat16, 4, 2, 24, True)
    check_int8("per head, small", random_plan(42, (2, 3, 4), heads=2), torch.float16, 2, 1, 16)
    check_int8_limits()
    check_ops()
    odd = random_plan(0, block_q=24, block_k=16)
    query = torch.randn(1, odd.seqlen_q, 1, 16)
    _says("reasons", "powers of two" in (why_not_triton(query, odd) or ""), str(why_not_triton(query, odd)))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
