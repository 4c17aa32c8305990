"""What the Triton kernels read of a plan, derived once and kept in the plan: launch order, frame spans, masks, tile facts."""

from dataclasses import dataclass

import torch

from genattn.kernels.plan.block_plan import BlockPlan, run_tiles
from genattn.kernels.plan.element_rule import ElementRule, GridRule, PerHeadRule
from genattn.kernels.plan.packed_masks import packed_masks

_MOST_FRAMES, _LONGEST_AXIS = 509, 1023


@dataclass(frozen=True, eq=False)
class TritonTables:
    """`rule` 0 none, 1 grid, 2 bits; the tensors that a rule does not use are placeholders.

    words: int32 [S], one per token, see `grid_visible` in forward_kernel.py.
    """

    order: torch.Tensor
    order_k: torch.Tensor
    runs_q: bool
    runs_k: bool
    holes: bool
    rule: int
    grid: GridRule
    words: torch.Tensor
    frame_span: torch.Tensor
    slots: torch.Tensor
    bits: torch.Tensor


def triton_tables(plan: BlockPlan) -> TritonTables:
    """The tables of `plan`, on its device."""
    if "triton" not in plan.cache:
        plan.cache["triton"] = _build(plan)
    return plan.cache["triton"]  # type: ignore[return-value]


def as_grid_rule(rule: ElementRule | None) -> GridRule | None:
    """The rule as one GridRule (with heads where each head follows its own), or None when it is of another kind."""
    if isinstance(rule, GridRule):
        return rule
    if not isinstance(rule, PerHeadRule) or not all(isinstance(r, GridRule) for r in rule.rules):
        return None
    first, *others = grids = [r for r in rule.rules if isinstance(r, GridRule)]
    axes = (first.extent, first.dilation, first.circular, first.low.shape[3])
    for other in others:
        same = torch.equal(first.coords, other.coords) and first.frame_class.shape == other.frame_class.shape
        if not same or (other.extent, other.dilation, other.circular, other.low.shape[3]) != axes:
            return None
    classes = max(g.low.shape[1] for g in grids)
    low = torch.cat([_pad_classes(g.low, classes) for g in grids])
    width = torch.cat([_pad_classes(g.width, classes) for g in grids])
    choice = torch.tensor(rule.choice, device=low.device)
    frame_class = torch.cat([g.frame_class for g in grids])
    return GridRule(first.coords, frame_class[choice], low[choice], width[choice], *axes[:3])


def _pad_classes(table: torch.Tensor, classes: int) -> torch.Tensor:
    return torch.nn.functional.pad(table, (0, 0, 0, 0, 0, classes - table.shape[1]))


def _build(plan: BlockPlan) -> TritonTables:
    partial = bool(plan.entries[1].any())
    grid = as_grid_rule(plan.rule)
    if grid is not None and not _fits_words(grid):
        grid = None
    kind = 0 if not partial else 2 if grid is None else 1
    # kernels take a pointer for every table, used or not
    words = span = nothing = torch.zeros(1, dtype=torch.int32, device=plan.device)
    slots, bits = packed_masks(plan) if kind == 2 else (nothing[None], nothing.to(torch.int16))
    if grid is None:
        grid = GridRule(nothing, nothing.view(1, 1, 1), nothing.view(1, 1, 1, 1), nothing.view(1, 1, 1, 1), (1, 1))
    else:
        coords, classes, low, width = (_packed(t) for t in (grid.coords, grid.frame_class, grid.low, grid.width))
        grid = GridRule(coords, classes, low, width, grid.extent, grid.dilation, grid.circular)
        words, span = _words(grid.coords), _frame_span(plan.key_tiles, grid.coords)
    return TritonTables(
        order=_longest_first(plan.row_lengths),
        order_k=_longest_first(plan.transposed.row_lengths.sum(0, keepdim=True)),
        runs_q=are_runs(plan.query_tiles, plan.seqlen_q),
        runs_k=are_runs(plan.key_tiles, plan.seqlen_k),
        holes=bool((plan.key_tiles < 0).any()),
        rule=kind,
        grid=grid,
        words=words,
        frame_span=span,
        slots=slots.contiguous(),
        bits=bits,
    )


def _fits_words(grid: GridRule) -> bool:
    return grid.frame_class.shape[-1] <= _MOST_FRAMES and max(grid.extent) <= _LONGEST_AXIS


def _words(coords: torch.Tensor) -> torch.Tensor:
    """frame + 2 | y | x in fields of 9, 10 and 10 bits, a guard bit above each; global tokens are 1 | 0 | 0, padding 0."""
    _, y, x = coords.clamp_min(0).unbind(1)
    word = ((coords[:, 0] + 2) << 22) + (y << 11) + x
    return torch.where(coords[:, 0] >= 0, word, (coords[:, 0] + 2) << 22).to(torch.int32).contiguous()


def _packed(table: torch.Tensor) -> torch.Tensor:
    return table.to(torch.int32).contiguous()


def _longest_first(lengths: torch.Tensor) -> torch.Tensor:
    """Int32 [N, tiles]: stable, so that neighbours of equal length stay neighbours and share their keys in cache."""
    return torch.argsort(lengths, dim=1, descending=True, stable=True).to(torch.int32).contiguous()


def are_runs(tiles: torch.Tensor, seqlen: int) -> bool:
    """Whether the tiles cut the sequence into runs, in order."""
    runs = run_tiles(seqlen, tiles.shape[1]).to(tiles.device)
    return tiles.shape == runs.shape and bool(torch.equal(tiles, runs.to(tiles.dtype)))


def _frame_span(key_tiles: torch.Tensor, coords: torch.Tensor) -> torch.Tensor:
    """Int32 [NK, 2]: first frame of each key tile and one past its last; empty where it holds no grid token."""
    frame = torch.where(key_tiles >= 0, coords[key_tiles.clamp_min(0).long(), 0], -1)
    first = torch.where(frame >= 0, frame, torch.iinfo(torch.int32).max).amin(1)
    last = frame.clamp_min(-1).amax(1) + 1
    return torch.stack([torch.minimum(first, last), last], 1).to(torch.int32).contiguous()
