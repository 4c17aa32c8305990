"""A plan in the forms in which other kernels take block lists: pure functions, nothing of theirs is imported.

    flashinfer_bsr(plan)         FlashInfer's BlockSparseAttentionWrapper: row pointers and columns, a mask for partial tiles
    flashinfer_variable(plan)    FlashInfer's VariableBlockSparseAttentionWrapper: a map of tile pairs, tiles of any size
    flash_attention_4(plan)      FlashAttention-4's mask_block_cnt/idx and full_block_cnt/idx, and what its mask_mod reads
    flex_block_mask(plan)        torch's BlockMask for flex_attention

These kernels know tiles that are runs of the sequence. A plan whose tiles are gathered (boxes of a grid, clusters) is for the
sequence put in the order of its tiles: `order` says which token stands at each place, see `reordered` and `restored`. A plan
of head tiles is exported as its `folded` plan, for tensors folded alike. None of these kernels has a stand-in for skipped
tiles, or a factor per tile pair, so plans with a tail or a fade are refused.
"""

from dataclasses import dataclass
from typing import Any

import torch

from genattn.kernels.plan.block_plan import BlockPlan
from genattn.kernels.plan.lasting import lasting
from genattn.kernels.plan.packed_masks import empty_masks, packed, packed_masks, unpacked
from genattn.kernels.reference.attention import tile_states
from genattn.kernels.triton.tables import are_runs


@dataclass(frozen=True, eq=False)
class Order:
    """Int64 tokens by place, -1 where a place holds none. queries: [NQ BQ], keys: [NK BK], or as many as there are tokens."""

    queries: torch.Tensor
    keys: torch.Tensor


@dataclass(frozen=True, eq=False)
class FlashInferBSR:
    """Compressed rows of tiles, by the names of `BlockSparseAttentionWrapper.plan`.

    indptr: int32 [N, NQ + 1], row i of head n stands at indptr[n, i] .. indptr[n, i + 1] of `indices`; N = 1 or heads.
    indices: int32 [nnz], key tiles. mask: bool [M, nnz, R, C] with M = 1 or heads, None where every tile is full.
    M, N, R, C: queries, keys, rows and columns of a tile; M and N count filled-up places. order: None for the sequence as is.
    """

    indptr: torch.Tensor
    indices: torch.Tensor
    mask: torch.Tensor | None
    M: int
    N: int
    R: int
    C: int
    order: Order | None

    @property
    def heads(self) -> int:
        """1 when one call serves all heads, else as many as there are lists or masks."""
        return max(self.indptr.shape[0], 1 if self.mask is None else self.mask.shape[0])

    def of_head(self, head: int) -> dict[str, Any]:
        """Arguments of `plan` for one head (their row pointers begin at 0), or for all heads when `heads` is 1."""
        row = self.indptr[head if self.indptr.shape[0] > 1 else 0]
        span = slice(int(row[0]), int(row[-1]))
        given = {"indptr": row - row[0], "indices": self.indices[span], "M": self.M, "N": self.N, "R": self.R, "C": self.C}
        if self.mask is not None:
            given["mask"] = self.mask[head if self.mask.shape[0] > 1 else 0, span]
        return given


@dataclass(frozen=True, eq=False)
class FlashInferVariable:
    """A map of tile pairs, by the names of `VariableBlockSparseAttentionWrapper.plan`, N = 1 or heads.

    block_mask_map: bool [N, NQ, NK]. block_row_sz: int32 [N, NQ], block_col_sz: int32 [N, NK], tokens per tile, ragged tiles as
    they are. order: None for the sequence as it is; no place is empty.
    """

    block_mask_map: torch.Tensor
    block_row_sz: torch.Tensor
    block_col_sz: torch.Tensor
    order: Order | None


@dataclass(frozen=True, eq=False)
class FlashAttention4:
    """Lists by the names of FlashAttention-4's `BlockSparseTensorsTorch`, for all samples; N = 1 or heads.

    mask_block_cnt: int32 [1, N, NQ], mask_block_idx: int32 [1, N, NQ, most], partial key tiles; full_block_*: the full ones.
    Entries behind the count are 0 and never read. block_size: (BQ, BK). bits: int16 [P, BQ, words], the masks of partial tiles
    with lane 0 in the lowest bit. slots: int32 [M, NQ, NK], which of them a tile pair has, -1 where it is skipped, -2 where it
    is full; M = 1 or heads. The two are what a mask_mod takes as aux_tensors. order: None for the sequence as it is.
    """

    mask_block_cnt: torch.Tensor
    mask_block_idx: torch.Tensor
    full_block_cnt: torch.Tensor
    full_block_idx: torch.Tensor
    block_size: tuple[int, int]
    bits: torch.Tensor
    slots: torch.Tensor
    order: Order | None

    def mask_mod(
        self, batch: torch.Tensor, head: torch.Tensor, query_index: torch.Tensor, key_index: torch.Tensor
    ) -> torch.Tensor:
        """Whether a query sees a key, bool, for places that broadcast: flex's mask_mod, and what FlashAttention-4's must do."""
        rows, columns = self.block_size
        slot = self.slots[head if self.slots.shape[0] > 1 else 0, query_index // rows, key_index // columns]
        lane = key_index % columns
        word = self.bits[slot.clamp_min(0).long(), query_index % rows, lane // 16]
        return (((word.int() >> (lane % 16)) & 1) == 1) & (slot >= 0) | (slot == -2)


def flashinfer_bsr(plan: BlockPlan) -> FlashInferBSR:
    """The lists of `plan` as they are. Raises ValueError for a plan with a tail."""
    _refuse_extras(plan)
    ragged = bool((plan.query_tiles < 0).any() or (plan.key_tiles < 0).any())
    whole = plan.rule is None and not ragged
    return FlashInferBSR(
        plan.row_ptr,
        plan.columns,
        None if whole else _entry_masks(plan),
        plan.query_tiles.numel(),
        plan.key_tiles.numel(),
        plan.block_q,
        plan.block_k,
        _lanes(plan) if ragged else lane_order(plan),
    )


def flashinfer_variable(plan: BlockPlan) -> FlashInferVariable:
    """Tiles of their own sizes. Raises ValueError for a plan with a tail, or with tiles that are seen in part."""
    _refuse_extras(plan)
    if plan.full_share < 1.0:
        raise ValueError(
            f"variable blocks are seen whole, and {1 - plan.full_share:.0%} of this plan's tiles need the element rule; "
            "use flashinfer_bsr"
        )
    tiles = plan.query_tiles, plan.key_tiles
    sizes = [(lanes >= 0).sum(1).to(torch.int32).expand(plan.num_heads, -1) for lanes in tiles]
    runs = are_runs(plan.query_tiles, plan.seqlen_q) and are_runs(plan.key_tiles, plan.seqlen_k)
    order = None if runs else Order(*(lanes[lanes >= 0].long() for lanes in tiles))
    return FlashInferVariable(tile_states(plan) > 0, sizes[0], sizes[1], order)


def flash_attention_4(plan: BlockPlan) -> FlashAttention4:
    """Full and partial tiles apart, with the masks of the partial ones. Raises ValueError for a plan with a tail.

    Its kernels want BK of their own tile (128) and BQ a multiple of theirs (128, 256 on sm_100): plan with those.
    """
    _refuse_extras(plan)
    states = states_of_lanes(plan)
    partial, full = (_padded_lists(states == kind) for kind in (1, 2))
    return FlashAttention4(*partial, *full, (plan.block_q, plan.block_k), *_bits_and_slots(plan), lane_order(plan))


def flex_block_mask(plan: BlockPlan) -> tuple[Any, Order | None]:
    """(torch's BlockMask, order). Raises ValueError for a plan with a tail; `impl="flex"` serves those itself."""
    from torch.nn.attention.flex_attention import BlockMask

    lists, states = flash_attention_4(plan), states_of_lanes(plan)
    order = lists.order
    mask = BlockMask.from_kv_blocks(
        *counts_and_indices(states == 1),
        *counts_and_indices(states == 2),
        BLOCK_SIZE=lists.block_size,
        mask_mod=lists.mask_mod,
        seq_lengths=(plan.seqlen_q, plan.seqlen_k) if order is None else (len(order.queries), len(order.keys)),
    )
    return mask, order


def reordered(x: torch.Tensor, places: torch.Tensor | None) -> torch.Tensor:
    """[B, S, ...] in the order of the tiles, [B, places, ...]; an empty place repeats token 0, which every mask hides."""
    return x if places is None else x[:, places.clamp_min(0)]


def restored(x: torch.Tensor, places: torch.Tensor | None, tokens: int) -> torch.Tensor:
    """The answers [B, places, ...] back at their tokens, [B, tokens, ...]."""
    if places is None:
        return x
    used = places >= 0
    return x.new_zeros(x.shape[0], tokens, *x.shape[2:]).index_copy(1, places[used], x[:, used])


def lane_order(plan: BlockPlan) -> Order | None:
    """The tokens in the order of the tiles, -1 in unused lanes; None where that is the sequence as it is."""
    if "lane order" not in plan.cache:
        runs = are_runs(plan.query_tiles, plan.seqlen_q) and are_runs(plan.key_tiles, plan.seqlen_k)
        plan.cache["lane order"] = None if runs else _lanes(plan)
    return plan.cache["lane order"]  # type: ignore[return-value]


@lasting
def _lanes(plan: BlockPlan) -> Order:
    return Order(plan.query_tiles.flatten().long(), plan.key_tiles.flatten().long())


def states_of_lanes(plan: BlockPlan) -> torch.Tensor:
    """Int8 [N, NQ, NK]: 0 skipped, 1 partial, 2 full, for kernels that take a full tile's unused lanes for tokens."""
    states = lasting(tile_states)(plan)
    if lane_order(plan) is None:
        return states  # a ragged end is masked by the length
    return states.clamp_max(torch.where((plan.key_tiles < 0).any(1), 1, 2).to(states.dtype))


def counts_and_indices(chosen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(counts [1, N, NQ], tile numbers [1, N, NQ, NK]), int32, the chosen ones first and in order."""
    order = torch.argsort(chosen.int(), dim=-1, descending=True, stable=True)
    return chosen.sum(-1).to(torch.int32)[None], order.to(torch.int32)[None]


def _padded_lists(chosen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same cut to the longest list, zeros behind each."""
    counts, indices = counts_and_indices(chosen)
    most = max(1, int(counts.max()))
    used = torch.arange(most, device=counts.device) < counts[..., None]
    return counts, torch.where(used, indices[..., :most], 0)


@lasting
def _entry_masks(plan: BlockPlan) -> torch.Tensor:
    """Bool [M, nnz, BQ, BK]: what each listed tile shows, unused lanes hidden."""
    row, partial = plan.entries
    tile = row % plan.query_tiles.shape[0]
    lanes = (plan.query_tiles >= 0)[tile][:, :, None] & (plan.key_tiles >= 0)[plan.columns.long()][:, None, :]
    if plan.rule is None:
        return lanes[None]
    slots, bits = packed_masks(plan)
    seen = unpacked(bits, plan.block_k)[slots.clamp_min(0).long()]
    return torch.where(partial[None, :, None, None], seen, lanes[None])


@lasting
def _bits_and_slots(plan: BlockPlan) -> tuple[torch.Tensor, torch.Tensor]:
    """(bits int16 [P, BQ, words], slots int32 [M, NQ, NK]), see FlashAttention4."""
    row, partial = plan.entries
    tiles, columns = plan.query_tiles.shape[0], plan.columns.long()
    slots, bits = packed_masks(plan) if plan.rule is not None else (row.new_full((1, row.numel()), -1), empty_masks(plan, 1))
    slots = torch.where(partial, slots.int(), -2)
    if lane_order(plan) is not None:
        used = plan.key_tiles >= 0
        holed = ~used.all(1)
        # a full tile with unused lanes: one mask per key tile, the same for all rows
        own = (holed.cumsum(0) - 1 + bits.shape[0])[columns]
        slots = torch.where(~partial & holed[columns], own.int(), slots)
        bits = torch.cat([bits, packed(used[holed])[:, None].expand(-1, plan.block_q, -1)])
    table = slots.new_full((slots.shape[0] * plan.num_heads, tiles, plan.key_tiles.shape[0]), -1)
    head = torch.div(row, tiles, rounding_mode="floor")
    for number, of_rule in enumerate(slots):
        table[head + number, row % tiles, columns] = of_rule
    return bits, table


def _refuse_extras(plan: BlockPlan) -> None:
    if plan.tail is not None:
        raise ValueError(
            f"block lists have no stand-in for skipped tiles, the plan has tail={plan.tail.kind!r}; plan with tail=None"
        )
    if plan.fade is not None:
        raise ValueError(
            "block lists have no factor per tile pair, the plan lowers logits outside a window; use plan.with_fade(None)"
        )
