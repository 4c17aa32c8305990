"""`genattn bench attention`: block-sparse attention against every dense backend and peer on this machine.

    ratio = t_sparse / (density x t_dense)        1.00: the time fell exactly as the number of scores did

Correctness comes first: each backend's result is held against the float64 definition on sampled queries, and a wrong one gets
no speed. Timed calls are interleaved (A B C A B C ...), so that a busy machine hits all alike; the load average is in each row.
"""

import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from genattn.apps.bench.cases import AttentionCase, cpu_cases, gpu_cases
from genattn.apps.bench.timing import interleaved
from genattn.apps.sampling.measured_rows import append_rows, provenance
from genattn.errors import RunFailed, first_line
from genattn.functional.planned import block_plan_for
from genattn.kernels.block_sparse import IMPLS, block_sparse_attention, choose_impl
from genattn.kernels.peers.dense import dense_backends
from genattn.kernels.peers.optional import natten_attention, why_not_natten
from genattn.kernels.plan.block_plan import BlockPlan
from genattn.kernels.reference.attention import visible_rows
from genattn.patterns.natten_windows import natten_windows
from genattn.patterns.neighborhood import NeighborhoodPattern
from genattn.whole_file import save_figure

TABLE = Path("assets/bench/attention.csv")
BOUNDS = {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 1e-2}
_INT8_BOUND = 4e-2
_SAMPLED_QUERIES = 64
_MANY_FLOPS = 1e13
_PEERS = ("flex",)
MEASURABLE = (*IMPLS, "natten")


def bench_attention(
    quick: bool = False,
    device: str | None = None,
    table: Path | None = TABLE,
    rounds: int | None = None,
    cases: Sequence[AttentionCase] | None = None,
    impls: Sequence[str] | None = None,
    progress: Callable[[str], None] = print,
    seconds: float | None = None,
) -> list[dict[str, Any]]:
    """Measure, append the rows to `table` (None: nowhere) and return them.

    device: default a GPU when there is one. impls: backends beside "auto"'s choice; default every one that can serve, flex
    only when not quick (it compiles for each case). seconds: start no case after this long; default 150 on a GPU, where the
    cases come in an order in which the first tell the most, and no limit on a CPU.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    chosen = list(cases or (gpu_cases() if device == "cuda" else cpu_cases(quick)))
    facts = provenance(device)
    peaks: dict[torch.dtype, float] = {}
    known: dict[Any, dict[str, list[float]]] | None = {} if device.startswith("cuda") else None
    rows: list[dict[str, Any]] = []
    limit = seconds if seconds is not None else 150.0 if device.startswith("cuda") else float("inf")
    started = time.monotonic()
    for case in chosen:
        if time.monotonic() - started > limit:
            progress(f"{case.name:32} skipped, {limit:.0f} s are over; --seconds gives it more")
            continue
        try:
            peak = peaks.setdefault(case.dtype, matmul_flops(case.dtype, device))
            found = bench_case(case, device, rounds or (3 if quick else 7), impls or _default_impls(device, quick), peak, known)
        except torch.OutOfMemoryError as error:
            # a smaller card measures what it can hold
            progress(f"{case.name:32} skipped, it does not fit this device: {first_line(error)}")
            continue
        whole_case = [{**row, **facts} for row in found]
        if table is not None and whole_case:  # in one move: backends are compared within a case
            append_rows(table, whole_case)
        rows += whole_case
        for row in found:
            progress(describe_row(row))
    for name in impls or ():
        if all(row["impl"] != name for row in rows):
            progress(f"{name} can serve none of these cases here; `genattn doctor` says what it lacks")
    return rows


def bound_of(impl: str, dtype: torch.dtype) -> float:
    """Largest relative error with which a backend counts as right."""
    return _INT8_BOUND if impl == "triton-int8" else BOUNDS[dtype]


def describe_row(row: dict[str, Any]) -> str:
    """One line for the screen."""
    head = f"{row['case']:32} {row['dtype']:8} D{row['head_dim']:<4} density {row['density']:.3f}  {row['impl']:10}"
    if not row["correct"]:
        reason = row["error"] if isinstance(row["error"], str) else f"WRONG (error {row['error']:.1e}), no speed given"
        return f"{head} {reason}"
    return f"{head} {row['seconds'] * 1e3:9.2f} ms  ratio {row['ratio']:.2f}  {row['speedup']:.2f}x over {row['dense']}"


def bench_case(
    case: AttentionCase,
    device: str,
    rounds: int,
    impls: Sequence[str],
    peak: float,
    known: dict[Any, dict[str, list[float]]] | None = None,
) -> list[dict[str, Any]]:
    """Rows of one case, one per backend of `impls` that can serve it.

    peak: operations a second of a matrix product. known: dense times by shape, to be used again and added to; None measures
    them in turns with the others, which is fairer where a machine is busy. A masked case is held against dense attention
    without a mask.
    """
    draw = torch.Generator(device).manual_seed(0)
    shape = (1, case.layout.seqlen, case.heads, case.head_dim)
    inputs = [torch.randn(shape, generator=draw, device=device, dtype=case.dtype) for _ in range(3)]
    mask = case.key_mask(device)
    started = time.perf_counter()
    plan = block_plan_for(inputs[0], inputs[1], case.pattern, case.layout)
    planned = time.perf_counter() - started
    sparse = _sparse_calls(impls, case, inputs, plan, mask)
    if not sparse:
        return []
    errors = {name: _error_or_reason(call, inputs, plan, mask) for name, call in sparse.items()}
    right = {name: call for name, call in sparse.items() if _is_right(errors[name], name, case.dtype)}
    key = shape, case.dtype
    if known is not None and key in known:
        times = {**known[key], **interleaved(right, rounds, device)}
        dense = list(known[key])
    else:
        calls = _dense_calls(inputs, plan.seqlen_q**2 * case.heads * case.head_dim * 4.0)
        times, dense = interleaved({**calls, **right}, rounds, device), list(calls)
        if known is not None:
            known[key] = {name: times[name] for name in dense}
    fastest = min(dense, key=lambda name: min(times[name]))
    common = {
        **{"case": case.name, "layout": case.layout.describe(), "seqlen": shape[1], "heads": case.heads},
        **{"head_dim": case.head_dim, "dtype": str(case.dtype)[6:], "density": plan.density, "full_share": plan.full_share},
        **{"computed_density": plan.computed_density, "tile": f"{plan.block_q}x{plan.block_k}", "plan_seconds": planned},
        "dense_times": "; ".join(f"{name} {min(times[name]):.6g}" for name in dense),
        **{"dense": fastest, "dense_seconds": min(times[fastest]), "rounds": rounds, "loadavg": os.getloadavg()[0]},
    }
    rows = []
    for name, call in sparse.items():
        row: dict[str, Any] = {**common, "impl": name, "error": errors[name], "correct": name in right}
        if name in right:
            row |= _speed(times[name], times[fastest], plan, case, peak)
            row["peak_bytes"] = peak_memory(call, device)
        rows.append(row)
    return rows


def _dense_calls(inputs: list[torch.Tensor], flops: float) -> dict[str, Callable[[], torch.Tensor]]:
    """The dense backends that run on these tensors; on a GPU, where a call takes long, only those that can be the fastest."""
    left_out = {"sdpa:math"} | ({"sdpa", "sdpa:efficient"} if inputs[0].is_cuda and flops > _MANY_FLOPS else set())
    found = {}
    for name, call in dense_backends(inputs[0])[0].items():
        if name not in left_out and _runs(_dense_call(call, inputs)):
            found[name] = _dense_call(call, inputs)
    return found or {"sdpa": _dense_call(dense_backends(inputs[0])[0]["sdpa"], inputs)}


def _runs(call: Callable[[], torch.Tensor]) -> bool:
    """Whether a backend that took a short sequence takes this one too."""
    try:
        call()
    except RuntimeError:
        return False
    return True


def _error_or_reason(
    call: Callable[[], torch.Tensor], inputs: list[torch.Tensor], plan: BlockPlan, mask: torch.Tensor | None
) -> float | str:
    """Error of a backend against the definition, or why it could not run: one that fails must not cost the others' rows."""
    try:
        return sampled_error(call(), inputs, plan, mask)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        return f"{type(error).__name__}: {(str(error) or 'no message').splitlines()[0]}"


def _is_right(error: float | str, name: str, dtype: torch.dtype) -> bool:
    return not isinstance(error, str) and error <= bound_of(name, dtype)


def rows_to_share(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as a table that can be put into an issue."""
    right = [row for row in rows if row["correct"]]
    if not right:
        return "nothing was measured"
    facts = right[0]
    versions = ", ".join(f"{name.removesuffix('_version')} {facts[name]}" for name in facts if name.endswith("_version"))
    lines = [f"to share: {facts['device']}, {versions}, commit {facts['commit']}", ""]
    lines += ["| case | head dim | impl | ms | time / (density x dense) | over |", "|---|---|---|---|---|---|"]
    lines += [
        f"| {r['case']} | {r['head_dim']} {r['dtype']} | {r['impl']} | {r['seconds'] * 1e3:.2f} | {r['ratio']:.2f} | "
        f"{r['dense']} |"
        for r in right
    ]
    return "\n".join(lines)


def _speed(times: list[float], dense: list[float], plan: BlockPlan, case: AttentionCase, peak: float) -> dict[str, float]:
    best, base = min(times), min(dense)
    flops = plan.flops(case.head_dim, case.heads)
    return {
        "seconds": best,
        "median_seconds": statistics.median(times),
        "ratio": best / (plan.density * base),
        "median_ratio": statistics.median(a / b for a, b in zip(times, dense)) / plan.density,
        "speedup": base / best,
        "gflops": flops / best / 1e9,
        "roofline_share": flops / best / peak,
    }


def _default_impls(device: str, quick: bool) -> list[str]:
    """All that can be named, but for what takes minutes: compiling when quick, NATTEN's uncompiled route on CPUs."""
    left_out = (
        "auto",
        "reference",
        "sdpa",
        *(_PEERS if quick else ()),
        *(("natten",) if torch.device(device).type == "cpu" else ()),
    )
    return [name for name in MEASURABLE if name not in left_out]


def _sparse_calls(
    names: Sequence[str], case: AttentionCase, inputs: list[torch.Tensor], plan: BlockPlan, mask: torch.Tensor | None
) -> dict[str, Callable[[], torch.Tensor]]:
    """The named backends that can serve the case; NATTEN from the pattern, the others from the plan."""
    calls = {
        name: _call(name, inputs, plan, mask)
        for name in names
        if name != "natten" and _serves(name, inputs, plan, mask is not None)
    }
    if mask is None and "natten" in names and isinstance(case.pattern, NeighborhoodPattern) and len(case.layout.segments) == 1:
        windows = natten_windows(case.pattern, case.layout)
        if why_not_natten(inputs[0], windows) is None:
            query, key, value = inputs
            calls["natten"] = lambda: natten_attention(query, key, value, windows)
    return calls


def _call(name: str, inputs: list[torch.Tensor], plan: BlockPlan, mask: torch.Tensor | None) -> Callable[[], torch.Tensor]:
    query, key, value = inputs
    return lambda: block_sparse_attention(query, key, value, plan, impl=name, key_mask=mask)  # type: ignore[return-value]


def _dense_call(call: Callable[..., torch.Tensor], inputs: list[torch.Tensor]) -> Callable[[], torch.Tensor]:
    return lambda: call(*inputs)


def _serves(name: str, inputs: list[torch.Tensor], plan: BlockPlan, masked: bool) -> bool:
    query, key, value = inputs
    try:
        choose_impl(query, key, value, plan, impl=name, masked=masked)
    except ValueError:
        return False
    return True


def sampled_error(out: torch.Tensor, inputs: list[torch.Tensor], plan: BlockPlan, mask: torch.Tensor | None = None) -> float:
    """Relative error against the float64 definition on some queries, spread over the sequence."""
    query, key, value = (x.double() for x in inputs)
    index = torch.linspace(0, plan.seqlen_q - 1, _SAMPLED_QUERIES, device=query.device).long()
    visible = visible_rows(plan, index)[None]
    if mask is not None:
        visible = visible & mask[:, None, None, :]
    scores = torch.einsum("bqhd,bkhd->bhqk", query[:, index], key) * query.shape[-1] ** -0.5
    probs = scores.masked_fill(~visible, float("-inf")).softmax(-1)
    want = torch.einsum("bhqk,bkhd->bqhd", probs.nan_to_num(), value)
    return float((out[:, index].double() - want).norm() / want.norm())


def matmul_flops(dtype: torch.dtype, device: str) -> float:
    """Operations a second of a large square product: the roof that the share is taken of."""
    size = 8192 if device.startswith("cuda") else 2048
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2.0 * size**3 / min(interleaved({"product": lambda: a @ b}, 5, device)["product"])


def peak_memory(call: Callable[[], torch.Tensor], device: str) -> int | None:
    """Bytes that a call needs at its peak beyond what was there before; None where the system does not tell."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    try:
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
        call()
        return max(0, _status("VmHWM") - before)
    except (OSError, KeyError):
        return None


def _status(name: str) -> int:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[name].split()[0]) * 1024


def plot_attention(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Bars of the ratio per case and backend, with the line at 1.00. Raises RunFailed without a row that is correct."""
    from matplotlib.figure import Figure  # pyplot would keep the figure, also where writing fails

    shown = [row for row in rows if row["correct"]]
    if not shown:
        raise RunFailed(f"a plot needs at least one correct row, got {len(rows)} wrong ones; nothing was drawn")
    labels = [f"{r['case']}\n{r['dtype']} D{r['head_dim']} {r['impl']}" for r in shown]
    figure = Figure(figsize=(8, 0.35 * len(shown) + 1.2), layout="constrained")
    axes = figure.subplots()
    axes.barh(labels[::-1], [float(r["ratio"]) for r in shown][::-1], color="#3b6ea5")
    axes.axvline(1.0, color="black", linewidth=1)
    axes.set_xlabel("time / (density x dense time), lower is better")
    axes.tick_params(axis="y", labelsize=6)
    save_figure(figure, path, 150)
