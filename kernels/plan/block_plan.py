"""What a block-sparse kernel eats: tiles of tokens and, per query tile, the list of key tiles to visit.

    query tile 0:  full [0 1]   partial [5]        full tiles run without a mask,
    query tile 1:  full [1 2]   partial [0 6]      partial ones ask the element rule

A tile is a list of token indices, so tiles may be boxes of a grid as well as runs of the sequence; rows are gathered by
address and nothing is permuted or padded in memory. No S x S tensor anywhere.
"""

import itertools
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch

from genattn.kernels.plan.element_rule import ElementRule
from genattn.kernels.plan.fade import Fade
from genattn.kernels.plan.lasting import lasting
from genattn.kernels.plan.tail import Tail, tail_of_plan, without_padding

_HANDLES: "weakref.WeakValueDictionary[int, BlockPlan]" = weakref.WeakValueDictionary()
_NEXT_HANDLE = itertools.count(1)


@dataclass(frozen=True, eq=False)
class BlockPlan:
    """Compressed lists of key tiles.

    query_tiles: int32 [NQ, BQ] and key_tiles: int32 [NK, BK], token indices; -1 marks an unused lane. Every token stands in
        exactly one query tile; a key in at most one key tile.
    row_ptr: int32 [N, NQ + 1], offsets into `columns`; N = 1, or one row of lists per query head.
    columns: int32 [nnz], key tiles; in each list the full ones come first.
    num_full: int32 [N, NQ], how many of a list's tiles are full (every used lane sees every used lane).
    rule: decides inside the other tiles; may be None when there are none.
    seqlen_q, seqlen_k: lengths of the sequences the indices point into.
    tail: what stands in for the key tiles that are not listed; None: nothing, they are as hidden.
    fade: which tile pairs have their logits lowered; None: none.
    handle: int64 scalar on the CPU that names this plan inside a library op; see `plan_of_handle`.
    mask_heads: 1 when lists and rule are the same for all heads, else the number of query heads.
    """

    query_tiles: torch.Tensor
    key_tiles: torch.Tensor
    row_ptr: torch.Tensor
    columns: torch.Tensor
    num_full: torch.Tensor
    rule: ElementRule | None
    seqlen_q: int
    seqlen_k: int
    tail: Tail | None = None
    fade: Fade | None = None
    handle: torch.Tensor = field(init=False, repr=False)
    mask_heads: int = field(init=False)

    def __post_init__(self) -> None:
        rows, tiles = self.num_full.shape
        if self.row_ptr.shape != (rows, tiles + 1) or self.query_tiles.shape[0] != tiles:
            raise ValueError(
                f"row_ptr must be [N, NQ + 1] and num_full [N, NQ] for {self.query_tiles.shape[0]} query tiles, "
                f"got {tuple(self.row_ptr.shape)} and {tuple(self.num_full.shape)}"
            )
        if self.rule is None and int(self.num_full.sum()) != self.columns.numel():
            raise ValueError("a plan with partial tiles needs an element rule, got rule=None")
        words = -(-self.key_tiles.shape[0] // 32)
        if self.tail is not None and self.tail.skipped.shape != (rows, tiles, words):
            raise ValueError(
                f"the tail must be one for these lists, with skipped [{rows}, {tiles}, {words}], "
                f"got {list(self.tail.skipped.shape)}; make it with with_tail"
            )
        if self.fade is not None and (len(self.fade.window), len(self.fade.span)) != (tiles, len(self.key_tiles)):
            raise ValueError(
                f"the fade must be one for {tiles} query tiles and {len(self.key_tiles)} key tiles, "
                f"got {len(self.fade.window)} windows and {len(self.fade.span)} spans"
            )
        number = next(_NEXT_HANDLE)
        _HANDLES[number] = self
        object.__setattr__(self, "handle", _named(number))
        object.__setattr__(self, "mask_heads", max(rows, 1 if self.rule is None else self.rule.num_heads))

    @property
    def block_q(self) -> int:
        """Lanes of a query tile."""
        return self.query_tiles.shape[1]

    @property
    def block_k(self) -> int:
        """Lanes of a key tile."""
        return self.key_tiles.shape[1]

    @property
    def num_heads(self) -> int:
        """1 when all heads share the lists."""
        return self.num_full.shape[0]

    @property
    def device(self) -> torch.device:
        return self.columns.device

    @cached_property
    def cache(self) -> dict[object, object]:
        """Room for what a backend derives from this plan once: packed tables, groups, copies on other devices."""
        return {}

    @cached_property
    @lasting
    def row_lengths(self) -> torch.Tensor:
        """Int64 [N, NQ]: key tiles per query tile."""
        return self.row_ptr.long().diff(dim=1)

    @cached_property
    @lasting
    def entries(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Per entry of `columns`: int64 row of the list it stands in (head * NQ + query tile), bool whether it is partial."""
        lengths = self.row_lengths.flatten()
        row = torch.repeat_interleave(torch.arange(lengths.numel(), device=self.device), lengths)
        place = torch.arange(row.numel(), device=self.device) - (lengths.cumsum(0) - lengths)[row]
        return row, place >= self.num_full.flatten().long()[row]

    @cached_property
    def covers_queries(self) -> bool:
        """Whether every query stands in a tile, so that a kernel writes every row of the output."""
        return int((self.query_tiles >= 0).sum()) == self.seqlen_q

    @cached_property
    @lasting
    def _pairs(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(query lanes, key lanes) in use, per visited tile pair, int64 [nnz]."""
        lanes_q = (self.query_tiles >= 0).sum(1).repeat(self.num_heads)
        return lanes_q.repeat_interleave(self.row_lengths.flatten()), (self.key_tiles >= 0).sum(1)[self.columns.long()]

    @cached_property
    def density(self) -> float:
        """Share of the Sq x Sk scores that lies in visited tiles, in (0, 1]; mean over heads."""
        lanes_q, lanes_k = self._pairs
        return float((lanes_q * lanes_k).sum()) / (self.num_heads * self.seqlen_q * self.seqlen_k)

    @cached_property
    def computed_density(self) -> float:
        """Work of the visited tiles with their unused lanes and of the tail, over Sq x Sk: what a kernel really multiplies."""
        work = self.columns.numel() * self.block_q * self.block_k
        if self.tail is not None:
            work += self.num_heads * self.query_tiles.numel() * self.tail.pseudo_keys
        return work / (self.num_heads * self.seqlen_q * self.seqlen_k)

    @cached_property
    def full_share(self) -> float:
        """Share of visited tiles that need no mask."""
        return float(self.num_full.sum()) / max(1, self.columns.numel())

    def flops(self, head_dim: int, heads: int = 1, batch: int = 1) -> float:
        """Multiply-adds times two of both products over the visited tiles."""
        return 4.0 * batch * heads * head_dim * self.density * self.seqlen_q * self.seqlen_k

    def with_tail(self, tail: "str | Tail | None", heads: Sequence[bool] | None = None) -> "BlockPlan":
        """The same lists with a stand-in for what they skip, None for none. A plan that skips nothing has none.

        tail: a name of `TAILS`, or one made for these lists. heads: which of the lists' heads have it, default all. Raises
        ValueError for other names.
        """
        found = tail_of_plan(self, tail, heads) if isinstance(tail, str) else tail
        return self if found is self.tail else replace(self, tail=found)

    def with_fade(self, fade: Fade | None) -> "BlockPlan":
        """The same lists with the logits of some tile pairs lowered, None for none; none either where no pair is outside."""
        found = fade if fade is not None and fade.acts() else None
        return self if found is self.fade else replace(self, fade=found)

    def seen_whole(self, heads: Sequence[bool]) -> "BlockPlan":
        """The same lists for some heads without the element rule: every key of a listed tile is seen, but never padding.

        heads: one entry per list. For plans that stand for dense attention: what a tile hides costs as much as what it shows.
        """
        if self.rule is None:
            return self
        whole = torch.tensor(heads, device=self.device)[:, None]
        num_full = torch.where(whole, self.row_lengths.to(torch.int32), self.num_full)
        rule = None if int(num_full.sum()) == self.columns.numel() else self.rule
        return replace(self, key_tiles=without_padding(self.key_tiles, self.rule), num_full=num_full, rule=rule)

    def to(self, device: torch.device | str) -> "BlockPlan":
        """The plan with its lists on `device`; the copy is kept."""
        device = torch.empty(0, device=device).device
        if device == self.device:
            return self
        if device not in self.cache:
            self.cache[device] = self._copy_to(device)
        return self.cache[device]  # type: ignore[return-value]

    @lasting
    def _copy_to(self, device: torch.device) -> "BlockPlan":
        return BlockPlan(
            self.query_tiles.to(device),
            self.key_tiles.to(device),
            self.row_ptr.to(device),
            self.columns.to(device),
            self.num_full.to(device),
            None if self.rule is None else self.rule.to(device),
            self.seqlen_q,
            self.seqlen_k,
            None if self.tail is None else self.tail.to(device),
            None if self.fade is None else self.fade.to(device),
        )

    @cached_property
    @lasting
    def transposed_order(self) -> torch.Tensor:
        """Int64 [nnz]: which entry of this plan stands at each place of `transposed.columns`."""
        row, partial = self.entries
        tiles, keys = self.query_tiles.shape[0], self.key_tiles.shape[0]
        head = torch.div(row, tiles, rounding_mode="floor")
        rank = ((head * keys + self.columns.long()) * 2 + partial.long()) * tiles + row % tiles
        return torch.argsort(rank)

    @cached_property
    @lasting
    def transposed(self) -> "BlockPlan":
        """The inverse lists: per key tile the query tiles that visit it (for dK, dV); same rule, roles not swapped; no tail, no
        fade."""
        row, partial = self.entries
        tiles, keys = self.query_tiles.shape[0], self.key_tiles.shape[0]
        owner = torch.div(row, tiles, rounding_mode="floor") * keys + self.columns.long()
        visits = torch.bincount(owner, minlength=self.num_heads * keys).view(self.num_heads, keys)
        full = torch.bincount(owner[~partial], minlength=self.num_heads * keys).view(self.num_heads, keys)
        ends = visits.flatten().cumsum(0).view(self.num_heads, keys)
        row_ptr = torch.cat([ends[:, :1] - visits[:, :1], ends], 1).to(torch.int32)
        columns = (row % tiles)[self.transposed_order].to(torch.int32)
        return BlockPlan(
            self.key_tiles, self.query_tiles, row_ptr, columns, full.to(torch.int32), self.rule, self.seqlen_k, self.seqlen_q
        )


@lasting
def _named(number: int) -> torch.Tensor:
    return torch.tensor(number)


def plan_of_handle(handle: torch.Tensor) -> BlockPlan:
    """The living plan that `BlockPlan.handle` names."""
    plan = _HANDLES.get(int(handle))
    if plan is None:
        raise ValueError(f"the plan behind handle {int(handle)} must be alive, it is gone; keep a reference to the BlockPlan")
    return plan


def dense_plan(seqlen_q: int, seqlen_k: int, block_q: int = 128, block_k: int = 128) -> BlockPlan:
    """Every query tile visits every key tile."""
    query_tiles, key_tiles = run_tiles(seqlen_q, block_q), run_tiles(seqlen_k, block_k)
    rows, cols = query_tiles.shape[0], key_tiles.shape[0]
    return BlockPlan(
        query_tiles,
        key_tiles,
        (torch.arange(rows + 1, dtype=torch.int32) * cols)[None],
        torch.arange(cols, dtype=torch.int32).repeat(rows),
        torch.full((1, rows), cols, dtype=torch.int32),
        None,
        seqlen_q,
        seqlen_k,
    )


def run_tiles(seqlen: int, block: int) -> torch.Tensor:
    """Int32 [ceil(S / block), block]: the sequence cut into runs; -1 fills the last one."""
    if seqlen < 1 or block < 1:
        raise ValueError(f"seqlen and block must be >= 1, got {seqlen} and {block}")
    index = torch.arange(-(-seqlen // block) * block, dtype=torch.int32)
    return torch.where(index < seqlen, index, -1).view(-1, block)
