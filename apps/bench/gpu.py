"""`python -m genattn.apps.bench.gpu`: everything that waits for a GPU, in one run of under eight minutes.

    check      every Triton kernel against the definition on drawn plans; nothing is timed if one is wrong
    forward    each case against each dense backend forced in turn and against compiled flex_attention
    step       one denoising step of Wan-14B- and Hunyuan-shaped transformers, dense against Radial, at 1x and 4x length
    options    what is not on by default beside what is: int8 scores, haloed boxes, specialised warps on full tiles
    settings   launch settings of the forward kernel side by side: 4 or 8 warps, tiles in one step or two, one program a tile
               or a few per processor
    backward   backward over forward
    tune       the launch settings of all kernels, kept for this machine (on request: it takes minutes)

Each case stands alone: its rows are in the file before the next one starts, and a case that fails leaves its reason and no
more. Cases that no longer fit the time are named. Needs torch and triton, not diffusers.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from genattn.apps.bench.attention import TABLE, bench_attention, bound_of, interleaved, sampled_error
from genattn.apps.bench.autotune import autotune_here, gpu_timer
from genattn.apps.bench.cases import AttentionCase, gpu_cases
from genattn.apps.bench.denoising_step import HUNYUAN, WAN_14B, StepShape, step_row
from genattn.apps.sampling.measured_rows import append_rows, provenance
from genattn.errors import GenAttnError
from genattn.functional.dispatch import block_plan_for, plan_for, planned_attention
from genattn.kernels.block_sparse import block_sparse_attention
from genattn.kernels.plan.block_plan import BlockPlan, run_tiles
from genattn.kernels.plan.random_plan import plan_from_states, random_plan
from genattn.kernels.reference.attention import reference_attention
from genattn.patterns.neighborhood import NeighborhoodPattern

BOUNDS = {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 8e-3}
PARTS = ("check", "forward", "options", "step", "settings", "backward", "tune")
_SETTINGS = ((8, 2, 1, 2), (8, 3, 1, 2), (8, 2, 2, 4), (8, 3, 2, 4), (4, 2, 1, 2), (4, 3, 1, 2), (4, 2, 2, 4), (4, 3, 2, 4),
             (8, 2, 1, 2, 1), (8, 2, 1, 2, 2), (8, 2, 2, 4, 1), (8, 2, 2, 4, 2))  # fmt: skip
Rows = Iterable[dict[str, Any]]
Job = tuple[str, Callable[[], Rows]]


def check_kernels(
    device: str = "cuda",
    impl: str = "triton",
    dims: tuple[int, ...] = (64, 72, 128),
    grid: tuple[int, int, int] = (5, 12, 11),
) -> list[str]:
    """Names of the drawn cases in which the forward or backward is wrong on this device."""
    wrong = []
    for dtype in BOUNDS:
        for dim in dims:
            for scattered, heads in ((False, 1), (True, 4)):
                plan = random_plan(dim, grid, globals_=37, padding=5, block_q=64, block_k=64, heads=heads, scattered=scattered)
                error = kernel_error(plan.to(device), dtype, dim, impl)
                name = f"{dtype} D{dim} scattered={scattered} lists={heads}"
                print(f"{'ok  ' if error <= BOUNDS[dtype] else 'FAIL'} {name}: {error:.1e}", flush=True)
                wrong += [name] if not error <= BOUNDS[dtype] else []
    return wrong


def kernel_error(plan: BlockPlan, dtype: torch.dtype, dim: int, impl: str = "triton") -> float:
    """Largest relative error among output and gradients, with grouped heads and a key mask."""
    shapes = [(2, plan.seqlen_q, 4, dim)] + [(2, plan.seqlen_k, 2, dim)] * 2
    inputs = [torch.randn(s, device=plan.device).to(dtype).requires_grad_() for s in shapes]
    mask = torch.rand(2, plan.seqlen_k, device=plan.device) < 0.8
    weight = torch.randn(shapes[0], device=plan.device)
    out: Any = block_sparse_attention(inputs[0], inputs[1], inputs[2], plan, impl=impl, key_mask=mask)
    got = [out.detach(), *torch.autograd.grad((out * weight).sum(), inputs)]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    want_out = reference_attention(exact[0], exact[1], exact[2], plan, key_mask=mask)[0]
    want = [want_out.detach(), *torch.autograd.grad((want_out * weight).sum(), exact)]
    return max(float((a.double() - b).norm() / b.norm()) for a, b in zip(got, want))  # type: ignore[union-attr]


def backward_rows(case: AttentionCase, rounds: int, device: str = "cuda", impl: str = "triton") -> Rows:
    """Seconds of forward and of backward, and their ratio."""
    shape = (1, case.layout.seqlen, case.heads, case.head_dim)
    inputs = [torch.randn(shape, device=device, dtype=case.dtype, requires_grad=True) for _ in range(3)]
    query, key, value = inputs
    plan = block_plan_for(query, key, case.pattern, case.layout)
    out: Any = block_sparse_attention(query, key, value, plan, impl=impl)
    grad = torch.randn(shape, device=device, dtype=case.dtype)
    calls: dict[str, Any] = {
        "forward": lambda: block_sparse_attention(query, key, value, plan, impl=impl),
        "backward": lambda: torch.autograd.grad(out, inputs, grad, retain_graph=True)[0],
    }
    times = interleaved(calls, rounds, device)
    forward, backward = min(times["forward"]), min(times["backward"])
    row = {"case": case.name, "seqlen": shape[1], "heads": case.heads, "head_dim": case.head_dim, "density": plan.density}
    yield {**row, "forward_seconds": forward, "backward_seconds": backward, "backward_ratio": backward / forward}


def setting_rows(case: AttentionCase, timer: Callable[[str, Any], float]) -> Iterator[dict[str, Any]]:
    """One row per launch setting of the forward kernel; what cannot run gives its reason."""
    for setting in _SETTINGS:
        row: dict[str, Any] = {"case": case.name, "head_dim": case.head_dim, **dict(zip(("warps", "stages", "split"), setting))}
        row["persistent"] = setting[4] if len(setting) > 4 else 0
        try:
            yield {**row, "seconds": timer("forward", setting)}
        except RuntimeError as error:
            yield {**row, "error": str(error).splitlines()[0]}


def option_rows(case: AttentionCase, impls: Sequence[str], rounds: int, device: str = "cuda") -> Rows:
    """Seconds of the first of `impls` and of those that wait to be measured; what is wrong or refused gives no speed."""
    shape = (1, case.layout.seqlen, case.heads, case.head_dim)
    query, key, value = (torch.randn(shape, device=device, dtype=case.dtype) for _ in range(3))
    lists = block_plan_for(query, key, case.pattern, case.layout)
    row: dict[str, Any] = {"case": case.name, "seqlen": shape[1], "heads": case.heads, "head_dim": case.head_dim}
    calls: dict[str, Any] = {}
    facts: dict[str, dict[str, Any]] = {}
    for impl in impls:
        try:
            plan: Any = plan_for(query, key, case.pattern, case.layout, impl)
            call: Any = partial(planned_attention, query, key, value, plan, impl=impl)
            error = sampled_error(call(), [query, key, value], lists)
        except (GenAttnError, RuntimeError) as reason:  # triton raises kinds of its own for what a chip cannot hold
            facts[impl] = {"error": str(reason).splitlines()[0]}
            continue
        facts[impl] = {"error": error, "computed_density": plan.computed_density}
        if error <= bound_of(impl, case.dtype):
            calls[impl] = call
    times = interleaved(calls, rounds, device)
    for impl in impls:
        speed = {"seconds": min(times[impl]), "over_first": min(times[impl]) / min(times[impls[0]])} if impl in calls else {}
        yield {**row, "impl": impl, **facts[impl], **speed}


def full_tile_rows(
    seqlen: int, heads: int, head_dim: int, rounds: int, device: str = "cuda", impls: Sequence[str] = ("triton", "triton-full")
) -> Rows:
    """Plans of full tiles only, drawn at a quarter of the pairs: whether groups of four specialised warps beat eight."""
    query, key, value = (torch.randn(1, seqlen, heads, head_dim, device=device, dtype=torch.bfloat16) for _ in range(3))
    block = min(128, seqlen // 4)
    tiles = run_tiles(seqlen, block)
    states = 2 * (torch.rand(1, len(tiles), len(tiles), generator=torch.Generator().manual_seed(0)) < 0.25).int()
    plan = plan_from_states(states, tiles, tiles, None, seqlen, seqlen).to(device)
    row: dict[str, Any] = {"case": f"full tiles {seqlen}", "seqlen": seqlen, "heads": heads, "head_dim": head_dim}
    calls: dict[str, Any] = {}
    errors: dict[str, Any] = {}
    for impl in impls:
        call: Any = partial(block_sparse_attention, query, key, value, plan, impl=impl)
        try:
            errors[impl] = sampled_error(call(), [query, key, value], plan)
        except (ValueError, RuntimeError) as reason:
            errors[impl] = str(reason).splitlines()[0]
            continue
        if errors[impl] <= bound_of(impl, query.dtype):
            calls[impl] = call
    times = interleaved(calls, rounds, device)
    for impl in impls:
        speed = {"seconds": min(times[impl]), "over_first": min(times[impl]) / min(times[impls[0]])} if impl in calls else {}
        yield {**row, "impl": impl, "error": errors[impl], "computed_density": plan.density, **speed}


def run_jobs(jobs: Iterable[Job], table: Path, facts: dict[str, str], until: float) -> list[str]:
    """Run each job alone and append its rows at once; names of the jobs that failed or no longer fitted."""
    missed = []
    for name, job in jobs:
        if time.monotonic() > until:
            print(f"skipped, out of time: {name}", flush=True)
            missed.append(name)
            continue
        try:
            for row in job():
                append_rows(table, [{**row, **facts}])
                print(" ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()), flush=True)
        except Exception as error:  # a case that fails must not take the others with it
            reason = f"{type(error).__name__}: {(str(error) or 'no message').splitlines()[0]}"
            print(f"FAILED {name}: {reason}", flush=True)
            append_rows(table, [{"case": name, "error": reason, **facts}])
            missed.append(name)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return missed


def forward_jobs(cases: list[AttentionCase], rounds: int, device: str, impls: list[str]) -> list[Job]:
    """One job per case and backend, so that a compiler's failure leaves ours measured."""
    return [
        (f"{case.name} {impl}", lambda case=case, impl=impl: _forward(case, rounds, device, impl))  # type: ignore[misc]
        for impl in impls
        for case in cases
    ]


def option_jobs(cases: list[AttentionCase], rounds: int) -> list[Job]:
    """Specialised warps on full tiles; per case int8 scores, and haloed boxes where the pattern is a neighborhood."""
    named = {c: ["triton", "triton-int8"] + ["halo"] * isinstance(c.pattern, NeighborhoodPattern) for c in cases}
    full: list[Job] = [(f"full tiles D{d}", partial(full_tile_rows, 32768, 24, d, rounds)) for d in (64, 128)]
    return full + [(c.name, partial(option_rows, c, impls, rounds)) for c, impls in named.items()]


def _forward(case: AttentionCase, rounds: int, device: str, impl: str) -> Rows:
    return bench_attention(False, device, None, rounds, [case], [impl], progress=lambda line: None)


def step_jobs(shapes: Iterable[StepShape], device: str, impl: str) -> list[Job]:
    """One job per model and length."""
    return [(shape.name, lambda shape=shape: [step_row(shape, device, impl=impl)]) for shape in shapes]  # type: ignore[misc]


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns 1 without a GPU, when a kernel is wrong, or when a case failed."""
    parser = argparse.ArgumentParser(prog="python -m genattn.apps.bench.gpu", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="", help="run the cases whose name holds this")
    parser.add_argument("--part", choices=PARTS, action="append", help="default: all but tune")
    parser.add_argument("--out", type=Path, default=TABLE.parent)
    parser.add_argument("--seconds", type=float, default=440.0, help="start no case after this long")
    chosen = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("a GPU must be there, torch.cuda.is_available() is False; run it on a machine with one", file=sys.stderr)
        return 1
    until = time.monotonic() + chosen.seconds
    wrong = check_kernels()
    if wrong:
        print(f"{len(wrong)} kernels are wrong; nothing is timed", file=sys.stderr)
        return 1
    parts = chosen.part or PARTS[:-1]
    cases = [case for case in gpu_cases() if chosen.only in case.name]
    shapes = [shape.longer(times) for times in (1, 4) for shape in (WAN_14B, HUNYUAN)]
    jobs: dict[str, tuple[str, list[Job]]] = {
        "forward": (TABLE.name, forward_jobs(cases, chosen.rounds, "cuda", ["triton"])),
        "options": ("attention_options.csv", option_jobs(cases, chosen.rounds)),
        "step": ("denoising_step.csv", step_jobs(shapes, "cuda", "triton")),
        "settings": (
            "attention_settings.csv",
            [(c.name, lambda c=c: setting_rows(c, gpu_timer(c, chosen.rounds))) for c in cases if "strided" in c.name],  # type: ignore[misc]
        ),
        "backward": (
            "attention_backward.csv",
            [(c.name, lambda c=c: backward_rows(c, chosen.rounds)) for c in cases if c.layout.seqlen < 100_000],  # type: ignore[misc]
        ),
    }
    facts, missed = provenance("cuda"), []
    for part, (file, listed) in jobs.items():
        if part in parts:
            missed += run_jobs(listed, chosen.out / file, facts, until)
    if "forward" in parts:  # last, because it compiles for each case
        missed += run_jobs(forward_jobs(cases, chosen.rounds, "cuda", ["flex"]), chosen.out / TABLE.name, facts, until)
    if "tune" in parts:
        print(autotune_here(rounds=chosen.rounds))
    print(f"done; not measured: {', '.join(missed) or 'nothing'}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
