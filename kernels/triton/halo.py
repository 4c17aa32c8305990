"""Host side of the haloed-box kernel: what it can serve, its tables, and the launch.

    plan (kinds of parts per axis)  ->  one row of six numbers per part of an axis, and the windows of each kind once

A program finds its tile by dividing its number through the counts of parts, so what is held is a few numbers per axis however
long the sequence is.
"""

import warnings
from dataclasses import dataclass

import torch

from genattn.kernels.plan.halo_plan import HaloParts, HaloPlan
from genattn.kernels.triton.block_sparse import precision_of, why_not_launch
from genattn.kernels.triton.config import arch_of, settings_of, table_row
from genattn.kernels.triton.launch import Arguments, alignment, is_wide, launch, padded, strides_of

_MOST_PLACES = (511, 1024, 1024)
_MOST_QUERIES = 256


@dataclass(frozen=True, eq=False)
class HaloTables:
    """parts: int32 [P, 6], see `halo_kernel`. windows: int32 [W, 2], first and last visible place of a query inside its box.

    counts: parts per axis. steps: distance of neighbouring places per axis. plain, ragged: whether some tile sees all of its
    box, and whether some does not. places: as in the plan, or a placeholder. listed: shared keys, the keys of dense queries,
    dense queries; int32. block_q: lanes of a tile.
    """

    parts: torch.Tensor
    windows: torch.Tensor
    counts: tuple[int, int, int]
    steps: tuple[int, int, int]
    plain: bool
    ragged: bool
    places: torch.Tensor
    listed: torch.Tensor
    block_q: int


def why_not_triton_halo(query: torch.Tensor, plan: HaloPlan, wants_gradient: bool = False) -> str | None:
    """The reason why the kernel cannot serve this call, or None; tensor operations serve then."""
    reason = why_not_launch(query)
    if reason is not None:
        return reason
    if wants_gradient:
        return "it has no backward; tensor operations have"
    tables = halo_tables(plan)
    return tables if isinstance(tables, str) else None


def triton_halo_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    plan: HaloPlan,
    *,
    scale: float | None = None,
    key_mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out [B, S, H, D], lse [B, S, H], natural log, float32); shapes and meaning as in `halo_attention`, forward only.

    A query that sees nothing gets zeros and -inf. Raises ValueError when the kernel cannot serve.
    """
    from genattn.kernels.triton.halo_kernel import halo_kernel

    plan = plan.to(query.device)
    reason = why_not_triton_halo(query, plan)
    if reason is not None:
        raise ValueError(f"the halo kernel cannot serve this call: {reason}; use halo_attention")
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    lse = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)
    arguments, grid = halo_arguments(query, key, value, out, lse, plan, scale, key_mask)
    launch(halo_kernel, grid, arguments, query)
    return out, lse


def halo_arguments(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    plan: HaloPlan,
    scale: float | None,
    key_mask: torch.Tensor | None,
    arch: str | None = None,
) -> tuple[Arguments, tuple[int, int]]:
    """Every argument of `halo_kernel`, launch settings included, and the grid of programs."""
    tables = halo_tables(plan)
    if isinstance(tables, str):
        raise ValueError(tables)
    batch, seqlen, heads, dim = query.shape
    name = arch or arch_of(query.device)
    warps, stages, block_k = settings_of("sm_90" if name == "cpu" else name)[table_row(dim, query.dtype)]["halo"]
    dense = plan.dense_queries.numel()
    dense_tiles = -(-dense // tables.block_q)
    arguments: Arguments = {
        **{"Q": query, "K": key, "V": value, "OUT": out, "LSE": lse},
        "PARTS": tables.parts,
        "WINDOWS": tables.windows,
        "PLACES": tables.places,
        "LISTED": tables.listed,
        # 8-bit loads would cost the operands their layout
        "KEY_MASK": tables.parts if key_mask is None else key_mask.to(torch.int32),
        "scale": dim**-0.5 if scale is None else scale,
        **strides_of("q", query),
        **strides_of("k", key),
        **strides_of("v", value),
        **strides_of("o", out),
        "seqlen": seqlen,
        "heads": heads,
        "group": heads // key.shape[2],
        **dict(zip(("parts_t", "parts_y", "parts_x"), tables.counts)),
        "extent_y": plan.extent[1],
        "extent_x": plan.extent[2],
        "shared": plan.shared_keys.numel(),
        "visible": plan.visible_keys.numel(),
        "dense": dense,
        "dense_tiles": dense_tiles,
        "DIM": dim,
        "DIM_PAD": padded(dim),
        "BLOCK_Q": tables.block_q,
        "BLOCK_K": block_k,
        **dict(zip(("DIL_T", "DIL_Y", "DIL_X"), tables.steps)),
        "MOVED": plan.places is not None,
        "HAS_LISTED": plan.shared_keys.numel() + dense > 0,
        "HAS_PLAIN": tables.plain,
        "HAS_RAGGED": tables.ragged,
        "MASKED": key_mask is not None,
        "WIDE": is_wide(query, key, value, out),
        "ALIGN": alignment(query, key, value, out),
        "PRECISION": precision_of(query, arch),
        "num_warps": warps,
        "num_stages": stages,
    }
    tiles = tables.counts[0] * tables.counts[1] * tables.counts[2]
    return arguments, (dense_tiles + tiles, batch * heads)


def halo_tables(plan: HaloPlan) -> HaloTables | str:
    """The tables of `plan` on its device, or the reason why there are none; kept in the plan."""
    if "triton" not in plan.cache:
        plan.cache["triton"] = _build(plan)
    return plan.cache["triton"]  # type: ignore[return-value]


def refuse_from_now_on(plan: HaloPlan, reason: str) -> None:
    """Say once that the kernel failed on this device, and leave `plan` to tensor operations."""
    plan.cache["triton"] = f"it failed on this device before ({reason})"
    text = f"genattn: the halo kernel failed on this device ({reason}); tensor operations serve this plan from now on"
    warnings.warn(text, RuntimeWarning, stacklevel=4)


def _build(plan: HaloPlan) -> HaloTables | str:
    widest = [max(part.keys.shape[1] for part in kinds) for kinds in plan.axes]
    if any(n > most for n, most in zip(widest, _MOST_PLACES)):
        return f"a box may hold {_MOST_PLACES} places per axis, got {tuple(widest)}"
    lanes = 1
    for kinds in plan.axes:
        lanes *= max(part.rows.shape[1] for part in kinds)
    if lanes > _MOST_QUERIES:
        return f"a tile may hold {_MOST_QUERIES} queries, got {lanes}"
    rows: list[torch.Tensor] = []
    windows: list[torch.Tensor] = []
    steps = []
    for kinds in plan.axes:
        step = _step(kinds)
        if step is None or not all(_are_runs(part.seen) for part in kinds):
            return "the places of an axis must be evenly spaced and the windows without gaps, and these are not"
        steps.append(step)
        rows.append(_axis_rows(kinds, windows))
    plain = [[bool(part.seen.all()) for part in kinds] for kinds in plan.axes]
    parts = torch.cat(rows).to(torch.int32).contiguous()
    return HaloTables(
        parts=parts,
        windows=torch.cat(windows).to(torch.int32).contiguous(),
        counts=tuple(len(r) for r in rows),  # type: ignore[arg-type]
        steps=tuple(steps),  # type: ignore[arg-type]
        plain=all(any(axis) for axis in plain),
        ragged=not all(all(axis) for axis in plain),
        places=parts if plan.places is None else plan.places.to(torch.int32),
        listed=torch.cat([plan.shared_keys, plan.visible_keys, plan.dense_queries]).to(torch.int32),
        block_q=padded(lanes),
    )


def _step(kinds: tuple[HaloParts, ...]) -> int | None:
    """Distance of neighbouring coordinates of an axis, the dilation; None if it varies."""
    gaps = [line.diff(dim=1).flatten() for part in kinds for line in (part.rows, part.keys)]
    found = torch.cat(gaps).unique()
    return None if found.numel() > 1 else int(found[0]) if found.numel() else 1


def _are_runs(seen: torch.Tensor) -> bool:
    """Whether every row of a bool [q, k] is one run of at least one key."""
    rises = seen.int().diff(dim=1, prepend=torch.zeros_like(seen[:, :1], dtype=torch.int32)) == 1
    return bool((rises.sum(1) == 1).all())


def _axis_rows(kinds: tuple[HaloParts, ...], windows: list[torch.Tensor]) -> torch.Tensor:
    """Int64 [parts, 6] of an axis in the order of its coordinates, so that neighbours share keys; adds to `windows`."""
    rows = []
    for part in kinds:
        begin = sum(len(w) for w in windows)
        first = part.seen.to(torch.uint8).argmax(1)
        windows.append(torch.stack([first, first + part.seen.sum(1) - 1], 1))
        facts = torch.tensor([begin, int(part.seen.all())], device=part.rows.device).expand(len(part.rows), 2)
        sizes = (torch.full_like(part.rows[:, 0], n) for n in (part.rows.shape[1], part.keys.shape[1]))
        queries, keys = sizes
        rows.append(torch.cat([torch.stack([part.rows[:, 0], queries, part.keys[:, 0], keys], 1), facts], 1))
    table = torch.cat(rows)
    return table[torch.argsort(table[:, 0])]
