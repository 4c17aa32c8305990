"""What the Triton kernels read of a plan, derived once and kept in the plan: launch order, frame spans, masks, tile facts."""

from dataclasses import dataclass
from typing import Any

import torch

from genattn.kernels.plan.block_plan import BlockPlan, run_tiles
from genattn.kernels.plan.element_rule import ElementRule, GridRule, PerHeadRule
from genattn.kernels.plan.packed_masks import mask_bytes, packed_masks

_MOST_FRAMES, _LONGEST_AXIS = 509, 1023
_BITS_LIMIT = 1 << 30


@dataclass(frozen=True, eq=False)
class KeyLanes:
    """The key tiles as a loop reads them, the same for all samples or one set per sample.

    lanes: int32 [..., NK, BK], token, or -1 - t where a lane is not in use (see `lane_tokens` in forward_kernel.py).
    words: int32 alike, see `hide_by_grid`, 0 where nothing is to be seen. counts: int32 [..., NK], lanes in use.
    holes: 0 none, 1 behind the used lanes, 2 anywhere. least: lanes in use of the emptiest tile, rounded down to 16.
    """

    lanes: torch.Tensor
    words: torch.Tensor
    counts: torch.Tensor
    holes: int
    least: int
    may_be_empty: bool


@dataclass(frozen=True, eq=False)
class TritonTables:
    """What the forward reads. `rule`: 0 none, 1 grid, 2 bits; the tensors that a rule does not use are placeholders.

    query_lanes, words_q: as in `KeyLanes`. The other tables of a grid rule are those of `GridRule`.
    """

    order: torch.Tensor
    query_lanes: torch.Tensor
    keys: KeyLanes
    runs_q: bool
    runs_k: bool
    rule: int
    frame_class: torch.Tensor
    low: torch.Tensor
    width: torch.Tensor
    words_q: torch.Tensor
    frame_span: torch.Tensor
    slots: torch.Tensor
    bits: torch.Tensor
    extent: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    circular: tuple[bool, bool] = (False, False)


@dataclass(frozen=True, eq=False)
class InverseTables:
    """What only the gradient of keys and values reads: the inverse lists, and which entry of the plan each of theirs is."""

    row_ptr: torch.Tensor
    columns: torch.Tensor
    num_full: torch.Tensor
    order: torch.Tensor
    entry: torch.Tensor


def triton_tables(plan: BlockPlan) -> TritonTables:
    """The tables of `plan`, on its device."""
    if "triton" not in plan.cache:
        plan.cache["triton"] = _build(plan)
    return plan.cache["triton"]  # type: ignore[return-value]


def inverse_tables(plan: BlockPlan) -> InverseTables:
    """The inverse lists of `plan`, on its device; built when a gradient is first asked for."""
    if "triton inverse" not in plan.cache:
        inverse = plan.transposed
        order = _longest_first(inverse.row_lengths.sum(0, keepdim=True))
        entry = plan.transposed_order.to(torch.int32)
        plan.cache["triton inverse"] = InverseTables(inverse.row_ptr, inverse.columns, inverse.num_full, order, entry)
    return plan.cache["triton inverse"]  # type: ignore[return-value]


def why_not_masks(plan: BlockPlan, device: torch.device) -> str | None:
    """The reason why the packed masks of a plan, if it needs any, are too large for a device, or None."""
    if _kind(plan)[0] != 2:
        return None
    size, limit = mask_bytes(plan), _bits_limit(device)
    if size > limit:
        return f"the packed masks of its partial tiles must stay under {limit >> 20} MiB on this device, got {size >> 20} MiB"
    return None


def _bits_limit(device: torch.device) -> int:
    """Bytes of packed masks that a device may hold: an eighth of a GPU."""
    if device.type != "cuda":
        return _BITS_LIMIT
    return torch.cuda.get_device_properties(device).total_memory // 8


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


def _kind(plan: BlockPlan) -> tuple[int, GridRule | None]:
    """(0 no partial tiles, 1 a grid rule that fits words, 2 anything else, the grid rule); kept in the plan."""
    if "triton kind" not in plan.cache:
        plan.cache["triton kind"] = _find_kind(plan)
    return plan.cache["triton kind"]  # type: ignore[return-value]


def _find_kind(plan: BlockPlan) -> tuple[int, GridRule | None]:
    if int(plan.num_full.sum()) == plan.columns.numel():
        return 0, None
    grid = as_grid_rule(plan.rule)
    return (2, None) if grid is None or not _fits_words(grid) else (1, grid)


def _build(plan: BlockPlan) -> TritonTables:
    kind, grid = _kind(plan)
    # kernels take a pointer for every table, used or not
    nothing = torch.zeros(1, dtype=torch.int32, device=plan.device)
    slots, bits = packed_masks(plan) if kind == 2 else (nothing[None], nothing.to(torch.int16))
    words = nothing if grid is None else _words(grid.coords)
    facts: dict[str, Any] = {
        "order": _longest_first(plan.row_lengths),
        "query_lanes": _lanes(plan.query_tiles),
        "keys": _key_lanes(plan.key_tiles, kind, words),
        "runs_q": are_runs(plan.query_tiles, plan.seqlen_q),
        "runs_k": are_runs(plan.key_tiles, plan.seqlen_k),
        "rule": kind,
        "slots": slots.contiguous(),
        "bits": bits,
    }
    if grid is None:
        flat, table = nothing.view(1, 1, 1), nothing.view(1, 1, 1, 1)
        return TritonTables(**facts, frame_class=flat, low=table, width=table, words_q=nothing, frame_span=nothing)
    return TritonTables(
        **facts,
        frame_class=_packed(grid.frame_class),
        low=_packed(grid.low),
        width=_packed(grid.width),
        words_q=_by_lane(words, plan.query_tiles),
        frame_span=_frame_span(plan.key_tiles, grid.coords),
        extent=grid.extent,
        dilation=grid.dilation,
        circular=grid.circular,
    )


def _lanes(tiles: torch.Tensor) -> torch.Tensor:
    """Int32 [tiles, lanes] as `KeyLanes.lanes`: an unused lane names a token of its own tile, whose row is at hand anyway."""
    return torch.where(tiles >= 0, tiles, -1 - tiles.amax(1, keepdim=True).clamp_min(0)).to(torch.int32)


def _key_lanes(tiles: torch.Tensor, kind: int, words: torch.Tensor) -> KeyLanes:
    used = tiles >= 0
    counts = used.sum(1).to(torch.int32)
    behind = bool((used == (torch.arange(tiles.shape[1], device=tiles.device) < counts[:, None])).all())
    if not behind and kind != 2:  # packed bits are by lane, so lanes must stay where they are
        tiles, behind = tiles.gather(1, _used_first(used)), True
    fewest = int(counts.min())
    holes = 0 if fewest == tiles.shape[1] else 1 if behind else 2
    least = fewest // 16 * 16 if holes == 1 else 0
    return KeyLanes(_lanes(tiles), _by_lane(words, tiles) if kind == 1 else words, counts, holes, least, fewest == 0)


def masked_keys(tables: TritonTables, key_mask: torch.Tensor) -> KeyLanes:
    """The key tiles of each sample without what `key_mask`, bool [B, Sk], hides."""
    lanes, words = tables.keys.lanes, tables.keys.words
    seen = key_mask[:, lanes.clamp_min(0).long()] & (lanes >= 0)
    counts = seen.sum(2).to(torch.int32)
    lanes = torch.where(seen, lanes, -1)
    if tables.rule == 2:
        return KeyLanes(lanes, words, counts, 2, 0, True)
    order = _used_first(seen)
    if tables.rule == 1:
        words = torch.where(seen, words, 0).gather(2, order)
    return KeyLanes(lanes.gather(2, order), words, counts, 1, 0, True)


def _used_first(used: torch.Tensor) -> torch.Tensor:
    """Order of the lanes of each tile in which the used ones come first, else as they were."""
    return torch.argsort((~used).to(torch.uint8), dim=-1, stable=True)


def _by_lane(words: torch.Tensor, tiles: torch.Tensor) -> torch.Tensor:
    """The word of each lane of each tile, 0 where a lane is not in use: one load away once the tile is known."""
    return torch.where(tiles >= 0, words[tiles.clamp_min(0).long()], 0)


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
