"""What a GPU run measures beside the forward: backward, launch settings, options that wait, tiles without masks."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch

from genattn.apps.bench.attention import bound_of, sampled_error
from genattn.apps.bench.cases import AttentionCase
from genattn.apps.bench.gpu_compile import SETTINGS
from genattn.apps.bench.timing import interleaved
from genattn.errors import kind_and_line
from genattn.functional.planned import block_plan_for, plan_for, planned_attention
from genattn.kernels.block_sparse import block_sparse_attention
from genattn.kernels.plan.block_plan import run_tiles
from genattn.kernels.plan.random_plan import plan_from_states

Rows = Iterable[dict[str, Any]]


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
    for setting in SETTINGS:
        row: dict[str, Any] = {"case": case.name, "head_dim": case.head_dim, **dict(zip(("warps", "stages", "split"), setting))}
        row["persistent"] = setting[4] if len(setting) > 4 else 0
        try:
            yield {**row, "seconds": timer("forward", setting)}
        except RuntimeError as error:
            yield {**row, "error": kind_and_line(error)}


def option_rows(case: AttentionCase, impls: Sequence[str], rounds: int, device: str = "cuda") -> Rows:
    """Seconds of the first of `impls` and of those that wait to be measured; what is wrong or refused gives no speed."""
    shape = (1, case.layout.seqlen, case.heads, case.head_dim)
    query, key, value = (torch.randn(shape, device=device, dtype=case.dtype) for _ in range(3))
    lists, mask = block_plan_for(query, key, case.pattern, case.layout), case.key_mask(device)
    row: dict[str, Any] = {"case": case.name, "seqlen": shape[1], "heads": case.heads, "head_dim": case.head_dim}
    calls: dict[str, Any] = {}
    facts: dict[str, dict[str, Any]] = {}
    for impl in impls:
        try:
            plan: Any = plan_for(query, key, case.pattern, case.layout, impl)
            call: Any = partial(planned_attention, query, key, value, plan, impl=impl, key_mask=mask)
            error = sampled_error(call(), [query, key, value], lists, mask)
        except Exception as reason:  # triton's own kinds derive from nothing else
            facts[impl] = {"error": kind_and_line(reason)}
            continue
        facts[impl] = {"error": error, "computed_density": plan.computed_density}
        if error <= bound_of(impl, case.dtype):
            calls[impl] = call
    times = interleaved(calls, rounds, device)
    for impl in impls:
        speed = {"seconds": min(times[impl]), "over_first": _over(times, impl, impls[0])} if impl in calls else {}
        yield {**row, "impl": impl, **facts[impl], **speed}


def full_tile_rows(
    seqlen: int,
    heads: int,
    head_dim: int,
    rounds: int,
    device: str = "cuda",
    impls: Sequence[str] = ("triton", "triton-full"),
    dtype: torch.dtype = torch.bfloat16,
) -> Rows:
    """Plans of full tiles only, drawn at a quarter of the pairs: whether groups of four specialised warps beat eight."""
    query, key, value = (torch.randn(1, seqlen, heads, head_dim, device=device, dtype=dtype) for _ in range(3))
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
        except Exception as reason:
            errors[impl] = kind_and_line(reason)
            continue
        if errors[impl] <= bound_of(impl, query.dtype):
            calls[impl] = call
    times = interleaved(calls, rounds, device)
    for impl in impls:
        speed = {"seconds": min(times[impl]), "over_first": _over(times, impl, impls[0])} if impl in calls else {}
        yield {**row, "impl": impl, "error": errors[impl], "computed_density": plan.density, **speed}


def _over(times: dict[str, list[float]], impl: str, first: str) -> float | None:
    """How many times as long as the first; None where that one could not run."""
    return min(times[impl]) / min(times[first]) if first in times else None
