"""`python -m genattn.apps.bench_gpu`: everything that waits for a GPU, in one run.

First every Triton kernel against the definition on drawn plans, natively; nothing is timed if one is wrong. Then forward,
case by case, against each dense backend forced in turn and against compiled flex_attention; then backward over forward; then
the settings of configs.json against their neighbours. Rows go to assets/bench/attention.csv and attention_backward.csv, the
best settings to tune-<arch>.json in the cache folder. Needs torch and triton, not diffusers.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

from genattn.apps.attention_cases import AttentionCase, gpu_cases
from genattn.apps.bench_attention import TABLE, bench_attention, interleaved
from genattn.apps.bench_rows import append_rows, provenance
from genattn.functional import plan_for
from genattn.kernels.block_plan import BlockPlan
from genattn.kernels.block_sparse import block_sparse_attention
from genattn.kernels.block_sparse_triton import forward_arguments
from genattn.kernels.kernel_config import arch_of
from genattn.kernels.native_build import cache_folder
from genattn.kernels.random_plan import random_plan
from genattn.kernels.reference import reference_attention

BOUNDS = {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 8e-3}
BACKWARD_TABLE = Path("assets/bench/attention_backward.csv")
_SETTINGS = [(w, s, split) for w in (4, 8) for s in (1, 2, 3) for split in (1, 2)]


def check_kernels() -> list[str]:
    """Names of the drawn cases in which the Triton forward or backward is wrong on this GPU."""
    wrong = []
    for dtype in BOUNDS:
        for dim in (64, 72, 128):
            for scattered, heads in ((False, 1), (True, 4)):
                plan = random_plan(
                    dim, (5, 12, 11), globals_=37, padding=5, block_q=64, block_k=64, heads=heads, scattered=scattered
                )
                error = kernel_error(plan.to("cuda"), dtype, dim)
                name = f"{dtype} D{dim} scattered={scattered} lists={heads}"
                print(f"{'ok  ' if error <= BOUNDS[dtype] else 'FAIL'} {name}: {error:.1e}", flush=True)
                wrong += [name] if error > BOUNDS[dtype] else []
    return wrong


def kernel_error(plan: BlockPlan, dtype: torch.dtype, dim: int) -> float:
    """Largest relative error among output and gradients, with grouped heads and a key mask."""
    shapes = [(2, plan.seqlen_q, 4, dim)] + [(2, plan.seqlen_k, 2, dim)] * 2
    inputs = [torch.randn(s, device="cuda").to(dtype).requires_grad_() for s in shapes]
    mask = torch.rand(2, plan.seqlen_k, device="cuda") < 0.8
    weight = torch.randn(shapes[0], device="cuda")
    out: Any = block_sparse_attention(inputs[0], inputs[1], inputs[2], plan, impl="triton", key_mask=mask)
    got = [out, *torch.autograd.grad((out * weight).sum(), inputs)]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    want_out = reference_attention(exact[0], exact[1], exact[2], plan, key_mask=mask)[0]
    want = [want_out, *torch.autograd.grad((want_out * weight).sum(), exact)]
    return max(float((a.double() - b).norm() / b.norm()) for a, b in zip(got, want))  # type: ignore[union-attr]


def bench_backward(case: AttentionCase, rounds: int) -> dict[str, Any]:
    """Seconds of forward and of backward, and their ratio."""
    shape = (1, case.layout.seqlen, case.heads, case.head_dim)
    inputs = [torch.randn(shape, device="cuda", dtype=case.dtype, requires_grad=True) for _ in range(3)]
    plan = plan_for(inputs[0], inputs[1], case.pattern, case.layout)
    query, key, value = inputs
    out: Any = block_sparse_attention(query, key, value, plan, impl="triton")
    grad = torch.randn(shape, device="cuda", dtype=case.dtype)
    times = interleaved(
        {
            "forward": lambda: block_sparse_attention(query, key, value, plan, impl="triton"),  # type: ignore[dict-item, return-value]
            "backward": lambda: torch.autograd.grad(out, inputs, grad, retain_graph=True)[0],  # type: ignore[arg-type]
        },
        rounds,
        "cuda",
    )
    forward, backward = min(times["forward"]), min(times["backward"])
    row = {"case": case.name, "seqlen": shape[1], "heads": case.heads, "head_dim": case.head_dim, "density": plan.density}
    return {**row, "forward_seconds": forward, "backward_seconds": backward, "backward_ratio": backward / forward}


def tune_forward(case: AttentionCase, rounds: int) -> dict[str, Any]:
    """Time the forward kernel under neighbouring settings; returns the fastest as an entry of the settings table."""
    from genattn.kernels.block_sparse_kernel import forward_kernel

    shape = (1, case.layout.seqlen, case.heads, case.head_dim)
    query, key, value, out = (torch.randn(shape, device="cuda", dtype=case.dtype) for _ in range(4))
    lse = torch.empty(shape[:3], device="cuda")
    plan = plan_for(query, key, case.pattern, case.layout)
    arguments = forward_arguments(query, key, value, out, lse, plan, None, None)
    grid = (plan.query_tiles.shape[0], shape[0] * shape[2])
    found: dict[tuple[int, int, int, int], float] = {}
    for warps, stages, split in _SETTINGS:
        for fine in (split * 2, split * 4):
            setting = {"num_warps": warps, "num_stages": stages, "SPLIT": split, "FINE": fine}
            call = {**arguments, **setting}
            try:
                times = interleaved({"call": lambda call=call: forward_kernel[grid](**call)}, rounds, "cuda")  # type: ignore[misc]
            except Exception as error:  # a setting the chip cannot hold is a result, not a failure
                print(f"     {setting}: {str(error).splitlines()[0]}", flush=True)
                continue
            found[warps, stages, split, fine] = min(times["call"])
            print(f"     {setting}: {found[warps, stages, split, fine] * 1e3:.3f} ms", flush=True)
    best = min(found, key=lambda setting: found[setting])
    return {"forward": list(best)}


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns 1 without a GPU or when a kernel is wrong."""
    parser = argparse.ArgumentParser(prog="python -m genattn.apps.bench_gpu", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--only", default="", help="run the cases whose name holds this")
    parser.add_argument("--part", choices=["check", "forward", "backward", "tune"], action="append")
    parser.add_argument("--out", type=Path, default=TABLE.parent)
    chosen = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("a GPU must be there, torch.cuda.is_available() is False; run it on a machine with one", file=sys.stderr)
        return 1
    parts = chosen.part or ["check", "forward", "backward", "tune"]
    wrong = check_kernels()
    if wrong:
        print(f"{len(wrong)} kernels are wrong; nothing is timed", file=sys.stderr)
        return 1
    cases = [case for case in gpu_cases() if chosen.only in case.name]
    if "forward" in parts:
        bench_attention(False, "cuda", chosen.out / TABLE.name, chosen.rounds, cases, ["triton", "flex"])
    if "backward" in parts:
        facts = provenance("cuda")
        rows = [{**bench_backward(case, chosen.rounds), **facts} for case in cases if case.layout.seqlen < 100_000]
        append_rows(chosen.out / BACKWARD_TABLE.name, rows)
        print("\n".join(f"{r['case']:32} backward / forward {r['backward_ratio']:.2f}" for r in rows))
    if "tune" in parts:
        table = {str(case.head_dim): tune_forward(case, chosen.rounds) for case in (cases[-1], cases[0])}
        path = cache_folder() / f"tune-{arch_of(torch.device('cuda'))}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(table, indent=1))
        (chosen.out / path.name).write_text(path.read_text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
