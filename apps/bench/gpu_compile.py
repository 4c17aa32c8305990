"""Compile the kernels of a GPU run before it starts, in as many processes as there are cores.

Triton compiles one kernel at a time, a few seconds each, on the first launch that needs it; on a lent machine that would be
most of the time. A worker builds a launch's arguments on the CPU, asks for the kernel without launching it, and leaves it in
Triton's cache on disk, where the run finds it.
"""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from typing import Any

import torch

from genattn.apps.bench.cases import AttentionCase, lease_cases
from genattn.apps.bench.gpu_check import checks
from genattn.functional.planned import block_plan_for, tile_size
from genattn.kernels.plan.block_plan import BlockPlan
from genattn.kernels.reference.tail import TailKeys
from genattn.kernels.triton.block_sparse import dkv_arguments, dq_arguments, forward_arguments
from genattn.kernels.triton.config import arch_of, settings_of, table_row
from genattn.kernels.triton.launch import Arguments

Spec = tuple[str, int, str, tuple[int, ...] | None]
SETTINGS: tuple[tuple[int, ...], ...] = (
    (8, 2, 1, 2), (8, 3, 2, 4), (8, 4, 2, 4), (8, 2, 2, 4), (4, 3, 2, 4), (8, 3, 1, 2, 1), (8, 3, 2, 4, 2),
)  # fmt: skip
_NAMES = ("num_warps", "num_stages", "SPLIT", "FINE")


def specs(parts: Sequence[str]) -> list[Spec]:
    """What the parts of a run will launch, longest to compile first: (kind, number of the case, kernel, setting).

    One model stands for all: the same pattern on another grid is the same kernel, but for its numbers.
    """
    found: list[Spec] = []
    cases = [i for i, case in enumerate(lease_cases()) if "hunyuan" in case.name]
    plain = [i for i in cases if not lease_cases()[i].hidden]
    if "check" in parts:
        found += [("check", i, k, None) for i, c in enumerate(checks()) if c.impl == "triton" for k in ("dkv", "dq", "forward")]
    if "backward" in parts:
        found += [("case", i, kernel, None) for i in plain for kernel in ("dkv", "dq")]
    if "forward" in parts:
        found += [("case", i, "forward", None) for i in cases]
    if "settings" in parts:
        found += [("case", i, "forward", s) for i in (plain[0], plain[-1]) for s in SETTINGS]
    return found


def compile_all(
    parts: Sequence[str], arch: str, workers: int | None = None, tell: Callable[[str], None] = print
) -> Iterator[dict[str, Any]]:
    """A row per kernel, as they come: seconds, or why it could not be compiled. What two parts share is compiled twice at
    worst."""
    jobs = specs(parts)
    count = max(1, min(workers or (os.cpu_count() or 2) - 1, len(jobs)))
    # a forked process could not use a GPU that its parent has touched
    with ProcessPoolExecutor(count, mp_context=get_context("spawn")) as pool:
        waiting = {pool.submit(compile_one, spec, arch): spec for spec in jobs}
        for done in as_completed(waiting):
            kind, number, kernel, setting = waiting[done]
            row: dict[str, Any] = {"case": f"compile {kind} {number} {kernel} {setting or ''}".strip()}
            failed = done.exception()
            row |= {"error": f"{type(failed).__name__}: {failed}"[:300]} if failed is not None else done.result()
            if failed is not None:
                tell(f"{row['case']}: {row['error']}")
            yield row


def compile_one(spec: Spec, arch: str) -> dict[str, Any]:
    """Compile one kernel into Triton's cache: {"seconds", "shared"}."""
    torch.set_num_threads(1)
    started = time.perf_counter()
    kernel, arguments = launch_of_spec(spec, arch)
    made = kernel.warmup(grid=(1,), **arguments)
    return {"seconds": time.perf_counter() - started, "shared": getattr(made.metadata, "shared", None)}


def launch_of_spec(spec: Spec, arch: str) -> tuple[Any, Arguments]:
    """(jitted kernel, its arguments) on the CPU, as the run on a chip would have them."""
    from genattn.kernels.triton.backward_kernel import dkv_kernel, dq_kernel
    from genattn.kernels.triton.forward_kernel import forward_kernel

    kind, number, name, setting = spec
    plan, tensors, mask = _of_check(number, arch) if kind == "check" else _of_case(lease_cases()[number], arch)
    query, key, value = tensors
    out, grad, grad_key, grad_value = (torch.empty(x.shape, dtype=x.dtype) for x in (query, query, key, value))
    lse, delta = torch.empty(2, *query.shape[:3])
    pseudo = _pseudo(plan, key)
    if name == "forward":
        arguments = forward_arguments(query, key, value, out, lse, plan, None, mask, arch, pseudo)
        kernel = forward_kernel
    elif name == "dq":
        arguments = dq_arguments(query, key, value, grad, lse, delta, out, plan, None, mask, arch, pseudo)
        kernel = dq_kernel
    else:
        inputs = query, key, value, grad, lse, delta, grad_key, grad_value
        arguments, kernel = dkv_arguments(*inputs, plan, None, mask, arch=arch), dkv_kernel
    if setting is not None:
        arguments |= {**dict(zip(_NAMES, setting)), "PERSISTENT": len(setting) > 4}
    return kernel, arguments


def _of_case(case: AttentionCase, arch: str) -> tuple[BlockPlan, list[torch.Tensor], torch.Tensor | None]:
    shape = (1, case.layout.seqlen, case.heads, case.head_dim)
    tensors = [torch.empty(shape, dtype=case.dtype) for _ in range(3)]
    plan = _plan(case.pattern, case.layout, tensors[0], arch)
    return plan, tensors, case.key_mask("cpu")


def _of_check(number: int, arch: str) -> tuple[BlockPlan, list[torch.Tensor], torch.Tensor | None]:
    check = checks()[number]
    seqlen = check.layout.seqlen
    sizes = [(1, n, seqlen, check.dim) if check.first else (1, seqlen, n, check.dim)
             for n in (check.heads, check.kv_heads, check.kv_heads)]  # fmt: skip
    tensors = [torch.empty(size, dtype=check.dtype) for size in sizes]
    tensors = [x.transpose(1, 2) for x in tensors] if check.first else tensors
    mask = torch.ones(1, seqlen, dtype=torch.bool) if check.masked else None
    return _plan(check.pattern, check.layout, tensors[0], arch).with_tail(check.tail), tensors, mask


def _pseudo(plan: BlockPlan, key: torch.Tensor) -> TailKeys | None:
    """Room for the pseudo-keys of a plan with a tail."""
    if plan.tail is None:
        return None
    rows = torch.empty(key.shape[0], plan.tail.pseudo_keys, *key.shape[2:], dtype=key.dtype)
    weight = torch.zeros(rows.shape[:2])
    return TailKeys(rows, rows, weight[:, None], weight, plan.tail.tokens[None, None])


def _plan(pattern: Any, layout: Any, query: torch.Tensor, arch: str) -> BlockPlan:
    if arch == "cpu":
        return block_plan_for(query, query, pattern, layout)
    most = settings_of(arch)[table_row(query.shape[-1], query.dtype)]["tile"]
    size = tile_size(layout.seqlen, "cuda")
    plan: BlockPlan = pattern.plan(layout, min(size, most[0]), min(size, most[1]))
    return plan


def this_arch(device: str) -> str:
    """Name of the settings that serve a device."""
    return arch_of(torch.device(device))
