"""Tiles that differ by head, for kernels whose tiles are the same for all heads: heads laid into the sequence.

    tokens      a b c                   one head, tokens  a0 a1 b0 b1 c0 c1        token t of head h stands at t H + h
    heads       0 1                     the same memory, read as [B, S H, 1, D]

A tile then holds tokens of one head, a list only names tiles of its own head, and nothing is copied or permuted: heads-last
tensors are laid out like that already. Every kernel serves such a plan, with one head and a sequence H times as long.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from genattn.kernels.plan.block_plan import BlockPlan
from genattn.kernels.plan.element_rule import ElementRule
from genattn.kernels.plan.tail import Tail, tail_of_plan


@dataclass(frozen=True, eq=False)
class HeadTiles:
    """folded: the plan over [B, S H, 1, D]; heads: H of queries, keys and values alike; seqlen: S."""

    folded: BlockPlan
    heads: int
    seqlen: int

    def __post_init__(self) -> None:
        if self.folded.num_heads != 1 or self.folded.seqlen_q != self.heads * self.seqlen:
            raise ValueError(
                f"a plan of head tiles needs one list over {self.heads} x {self.seqlen} places, "
                f"got {self.folded.num_heads} lists over {self.folded.seqlen_q}"
            )

    @cached_property
    def density(self) -> float:
        """Share of the H x S x S scores that lies in visited tiles, in (0, 1]."""
        return self.folded.density * self.heads

    @cached_property
    def computed_density(self) -> float:
        """The same with the unused lanes of the tiles."""
        return self.folded.computed_density * self.heads

    @property
    def full_share(self) -> float:
        """Share of visited tiles that need no mask."""
        return self.folded.full_share

    @property
    def num_heads(self) -> int:
        """Heads, each with lists of its own."""
        return self.heads

    @property
    def device(self) -> torch.device:
        return self.folded.device

    def flops(self, head_dim: int, heads: int = 1, batch: int = 1) -> float:
        """Multiply-adds times two of both products over the visited tiles, for `heads` heads at the mean density."""
        return 4.0 * batch * heads * head_dim * self.density * self.seqlen**2

    @property
    def tail(self) -> Tail | None:
        """What stands in for the skipped tiles of each head."""
        return self.folded.tail

    def with_tail(self, tail: str | None, heads: Sequence[bool] | None = None) -> "HeadTiles":
        """The same tiles with a stand-in for those of the own head that are skipped, None for none.

        Raises ValueError for an unknown name, or for a choice of heads, which share the list.
        """
        if heads is not None:
            raise ValueError(f"tiles of each head's own have a tail in all heads or in none, got {list(heads)}")
        if tail is None:
            folded = self.folded.with_tail(None)
        else:
            owners = tuple(_head_of(tiles, self.heads) for tiles in (self.folded.query_tiles, self.folded.key_tiles))
            folded = self.folded.with_tail(tail_of_plan(self.folded, tail, among=owners))  # type: ignore[arg-type]
        return self if folded is self.folded else replace(self, folded=folded)

    def seen_whole(self, heads: Sequence[bool]) -> "HeadTiles":
        """See BlockPlan.seen_whole; these plans have a tail in all heads or in none."""
        return replace(self, folded=self.folded.seen_whole([any(heads)]))

    def to(self, device: torch.device | str) -> "HeadTiles":
        """The plan with its lists on `device`."""
        moved = self.folded.to(device)
        return self if moved is self.folded else replace(self, folded=moved)

    def fold(self, x: torch.Tensor) -> torch.Tensor:
        """[B, S, H, D] as [B, S H, 1, D]; key heads fewer than H are repeated for their group."""
        if x.shape[2] != self.heads:
            x = x.repeat_interleave(self.heads // x.shape[2], dim=2)
        return x.reshape(x.shape[0], self.seqlen * self.heads, 1, x.shape[-1])

    def fold_mask(self, key_mask: torch.Tensor | None) -> torch.Tensor | None:
        """Bool [B, S] as [B, S H]."""
        return None if key_mask is None else key_mask.repeat_interleave(self.heads, dim=1)

    def unfold(self, x: torch.Tensor) -> torch.Tensor:
        """[B, S H, 1, ...] as [B, S, H, ...]."""
        return x.reshape(x.shape[0], self.seqlen, self.heads, *x.shape[3:])


@dataclass(frozen=True, eq=False)
class HeadTileRule:
    """`rule`, which speaks of tokens and heads, for places of a folded sequence of `heads` heads."""

    rule: ElementRule
    heads: int

    @property
    def num_heads(self) -> int:
        """One: the place says which head it is."""
        return 1

    def __call__(self, query_index: torch.Tensor, key_index: torch.Tensor) -> torch.Tensor:
        """Bool [1, ...]; the two places are of one head."""
        seen = self.rule(query_index // self.heads, key_index // self.heads)
        if seen.shape[0] == 1:
            return seen
        head = (query_index % self.heads).expand(seen.shape[1:])
        return seen.gather(0, head[None])

    def to(self, device: torch.device | str) -> "HeadTileRule":
        """The same on `device`."""
        return replace(self, rule=self.rule.to(device))


def _head_of(tiles: torch.Tensor, heads: int) -> torch.Tensor:
    """Int64 [N]: the head whose tokens a tile holds; -1 where it holds none."""
    first = tiles.amax(1).long()
    return torch.where(first >= 0, first % heads, -1)


def check_head_tiles(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, plan: HeadTiles) -> None:
    """Raise ValueError unless the tensors fit the plan."""
    good = query.ndim == 4 and query.shape[1:3] == (plan.seqlen, plan.heads)
    good = good and key.shape == value.shape and key.ndim == 4 and key.shape[1] == plan.seqlen
    if not good or plan.heads % key.shape[2]:
        raise ValueError(
            f"query must be [B, {plan.seqlen}, {plan.heads}, D] and key heads a divisor of {plan.heads}, "
            f"got {tuple(query.shape)}, {tuple(key.shape)} and {tuple(value.shape)}"
        )
