"""`genattn bench autotune`: launch settings of the Triton kernels, measured on this GPU and kept beside the shipped table.

Each kernel starts from its shipped setting and walks to the fastest neighbour, one setting changed at a time, until none is
faster or its share of the time is spent; what the chip cannot hold, or what computes something else, is passed over. Timed is
the sum over Radial, whose tiles have unused lanes, and a sliding window, most of whose tiles are partial. The winners go to
`tune-<chip>.json` in the cache folder, in the form of `kernels/triton/configs.json`, and are used from then on.
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from genattn.apps.bench.cases import AttentionCase
from genattn.apps.bench.timing import interleaved, timed
from genattn.apps.sampling.measured_rows import provenance
from genattn.errors import GenAttnError, kind_and_line
from genattn.functional.planned import block_plan_for
from genattn.kernels.triton.block_sparse import dkv_arguments, dq_arguments, forward_arguments, forward_grid
from genattn.kernels.triton.config import arch_of, chip_of, measured_settings, measured_table, settings_of, table_row
from genattn.kernels.triton.launch import launch
from genattn.patterns.neighborhood import NeighborhoodPattern
from genattn.patterns.radial import RadialPattern
from genattn.whole_file import write_whole

KERNELS = ("forward", "dq", "dkv")
Setting = tuple[int, ...]
Timer = Callable[[str, Setting], float]
_CHOICES = ((4, 8), (1, 2, 3, 4), (1, 2, 4), (1, 2, 4, 8), (0, 1, 2))  # the last: forward only
_NAMES = ("num_warps", "num_stages", "SPLIT", "FINE")
_GAIN = 0.98  # less than this is noise


def autotune(
    arch: str,
    head_dim: int,
    timer: Timer,
    kernels: Sequence[str] = KERNELS,
    tell: Callable[[str], None] = print,
    until: float = float("inf"),
) -> dict[str, list[int]]:
    """The settings that beat the shipped ones by 2 % or more, {kernel: [warps, stages, split, fine]}; for the forward kernel
    a fifth number where a few programs per processor that share out the tiles are faster than one a tile.

    timer(kernel, setting) gives seconds, and raises RuntimeError for a setting that cannot run or is wrong. until: on
    `time.monotonic`, shared out among the kernels. Where the shipped setting itself cannot run, its neighbours are tried all
    the same. Raises GenAttnError when none of them can.
    """
    entry: dict[str, list[int]] = {}
    for place, kernel in enumerate(kernels):
        now = time.monotonic()
        end = now + (until - now) / (len(kernels) - place)
        start: Setting = tuple(settings_of(arch)[table_row(head_dim)][kernel])
        if kernel == "forward" and len(start) < len(_CHOICES):
            start = (*start, 0)
        times: dict[Setting, float] = {}
        _measure(times, kernel, start, timer, tell)
        best = start
        while time.monotonic() < end:
            for setting in _neighbours(best):
                if time.monotonic() < end:
                    _measure(times, kernel, setting, timer, tell)
            fastest = min(times, key=lambda setting: times[setting])
            if times[fastest] == float("inf") or times[fastest] >= _GAIN * times[best]:
                break
            best = fastest
        if times[best] == float("inf"):
            raise GenAttnError(
                f"the {kernel} kernel must run with its shipped setting {list(start)} or a neighbour of it on {arch}, and none "
                "does; please report what `genattn doctor` says"
            )
        if best != start:
            entry[kernel] = list(best if best[4:] != (0,) else best[:4])
        tell(f"{kernel}: {list(best)}, {times[start] / times[best]:.2f} times as fast as shipped")
    return entry


def _measure(times: dict[Setting, float], kernel: str, setting: Setting, timer: Timer, tell: Callable[[str], None]) -> None:
    if setting in times:
        return
    try:
        times[setting] = timer(kernel, setting)
        tell(f"  {kernel} {list(setting)}: {times[setting] * 1e3:.3f} ms")
    except RuntimeError as error:
        times[setting] = float("inf")
        tell(f"  {kernel} {list(setting)}: {kind_and_line(error)}")


def _neighbours(setting: Setting) -> list[Setting]:
    """Settings that differ in one number."""
    found = []
    for place, choices in enumerate(_CHOICES[: len(setting)]):
        for choice in choices:
            changed = (*setting[:place], choice, *setting[place + 1 :])
            if choice != setting[place] and changed[3] >= changed[2]:
                found.append(changed)
    return found


def keep(arch: str, head_dim: int, entry: Mapping[str, list[int]]) -> Path:
    """Add what was measured to this machine's table and use it from now on; returns the file."""
    path = measured_table(arch)
    table: dict[str, Any] = measured_settings(arch)
    row = table_row(head_dim)
    table[row] = {**table.get(row, {}), **entry}
    write_whole(path, json.dumps(table, indent=1) + "\n")
    settings_of.cache_clear()
    return path


def gpu_timer(case: AttentionCase, rounds: int = 5, device: str = "cuda") -> Timer:
    """Times the kernels of one case on the GPU; the shipped settings' results are what every other must give."""
    from genattn.kernels.triton import backward_kernel as backward
    from genattn.kernels.triton.forward_kernel import forward_kernel

    shape = (1, case.layout.seqlen, case.heads, case.head_dim)
    query, key, value, grad = (torch.randn(shape, device=device, dtype=case.dtype) for _ in range(4))
    out, dq, dk, dv = (torch.empty_like(query) for _ in range(4))
    lse = torch.empty(shape[:3], device=device)
    plan = block_plan_for(query, key, case.pattern, case.layout)
    delta = torch.randn_like(lse)
    inputs, tiles = (query, key, value, grad, lse, delta), (plan.query_tiles.shape[0], plan.key_tiles.shape[0])
    launches = {
        "forward": (forward_kernel, tiles[0], forward_arguments(query, key, value, out, lse, plan, None, None), (out,)),
        "dq": (backward.dq_kernel, tiles[0], dq_arguments(*inputs, dq, plan, None, None), (dq,)),
        "dkv": (backward.dkv_kernel, tiles[1], dkv_arguments(*inputs, dk, dv, plan, None, None), (dk, dv)),
    }
    right: dict[str, list[torch.Tensor]] = {}

    def timer(kernel: str, setting: Setting) -> float:
        jitted, blocks, arguments, results = launches[kernel]
        call = {**arguments, **dict(zip(_NAMES, setting))}
        grid = (blocks, case.heads)
        if kernel == "forward":
            programs = setting[4] if len(setting) > 4 else 0
            call["PERSISTENT"], grid = programs > 0, forward_grid(query, plan, programs)

        def run() -> torch.Tensor:
            launch(jitted, grid, call, query)
            return results[0]

        try:
            timed(run, device)
        except Exception as error:  # triton raises kinds of its own for what a chip cannot hold
            raise RuntimeError(str(error) or type(error).__name__) from error
        wanted = right.setdefault(kernel, [x.clone() for x in results])
        if any(float((a - b).float().norm() / b.float().norm()) > 1e-2 for a, b in zip(results, wanted)):
            raise RuntimeError("another result than the shipped setting's")
        return min(interleaved({"run": run}, rounds, device)["run"])

    return timer


def summed(timers: Sequence[Timer]) -> Timer:
    """The sum of several timers; a setting that one of them refuses is refused."""
    return lambda kernel, setting: sum(timer(kernel, setting) for timer in timers)


def autotune_here(
    head_dims: Sequence[int] = (64, 128),
    rounds: int = 5,
    tell: Callable[[str], None] = print,
    seconds: float = 540.0,
    kept: Callable[[Path], None] = lambda path: None,
) -> dict[str, Any]:
    """Measure on this machine's GPU and keep what is faster: {"arch", "file", "settings": {row: {kernel: setting}}, "device",
    "row"}, the last a line to put into an issue. What is found is kept after each head dim, within `seconds`;
    then `kept` is called with the file.

    Raises GenAttnError where there is no GPU.
    """
    if not torch.cuda.is_available():
        raise GenAttnError("autotune needs a GPU, and torch.cuda.is_available() is False; the shipped settings stay in use")
    arch, found = arch_of(torch.device("cuda")), {}
    path = measured_table(arch)
    end = time.monotonic() + seconds
    for place, head_dim in enumerate(head_dims):
        timers = [gpu_timer(case, rounds) for case in tuning_cases(head_dim)]
        now = time.monotonic()
        share = now + (end - now) / (len(head_dims) - place)
        found[table_row(head_dim)] = entry = autotune(arch, head_dim, summed(timers), tell=tell, until=share)
        path = keep(arch, head_dim, entry)
        kept(path)
        del timers
    facts = provenance("cuda")
    row = json.dumps({"chip": chip_of(torch.device("cuda")), **facts, "settings": found})
    return {"arch": arch, "file": str(path), "settings": found, "device": facts["device"], "row": row}


def tuning_cases(head_dim: int) -> list[AttentionCase]:
    """Tiles with unused lanes, and partial tiles: sizes that a card of 8 GB holds."""
    grid = (13, 45, 80)
    return [
        AttentionCase("radial", grid, RadialPattern(), 256, 4, head_dim),
        AttentionCase("sliding", grid, NeighborhoodPattern((9, 24, 24)), 0, 4, head_dim),
    ]
