"""Which query may see which key, element by element: what a kernel evaluates inside a partly visible tile.

One form carries neighborhood and radial patterns alike. A grid token has a frame t and two places (y, x). A pair of frames
(t_q, t_k) belongs to a class, or to none (not visible). A class holds, per place axis and per query coordinate, the window of
visible key coordinates:

    visible(q, k)  <=>  c = frame_class[t_q, t_k] >= 0
                        and  0 <= wrap(k_a - low[c, a, q_a]) < width[c, a, q_a]   for both place axes a
                        and  (k_a - q_a) mod dilation_a == 0                       for both place axes a

Tokens with frame -1 are global (they see and are seen), frame -2 is padding (never a key).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch

GLOBAL, PADDING = -1, -2


class ElementRule(Protocol):
    """A callable on token indices; the slow twin that defines every kernel's partial tile."""

    @property
    def num_heads(self) -> int:
        """1, or the number of query heads when heads differ."""
        ...

    def __call__(self, query_index: torch.Tensor, key_index: torch.Tensor) -> torch.Tensor:
        """Visibility for int64 indices that broadcast to [...]: bool [num_heads, ...]."""
        ...

    def to(self, device: torch.device | str) -> "ElementRule":
        """The same rule with its tables on `device`."""
        ...


@dataclass(frozen=True, eq=False)
class GridRule:
    """The form above.

    coords: int32 [S, 3], (t, y, x) per token; t = -1 global, -2 padding.
    frame_class: int32 [N, T, T] with N = 1 or heads; -1 hides the pair of frames.
    low, width: int32 [N, C, 2, L], window of key coordinates per class, place axis and query coordinate (L = longest axis).
    extent: the two place axes' lengths; dilation: per place axis; circular: whether the axis wraps around.
    """

    coords: torch.Tensor
    frame_class: torch.Tensor
    low: torch.Tensor
    width: torch.Tensor
    extent: tuple[int, int]
    dilation: tuple[int, int] = (1, 1)
    circular: tuple[bool, bool] = (False, False)

    @property
    def num_heads(self) -> int:
        return self.frame_class.shape[0]

    def __call__(self, query_index: torch.Tensor, key_index: torch.Tensor) -> torch.Tensor:
        query, key = self.coords[query_index].long(), self.coords[key_index].long()
        t_q, t_k = query[..., 0], key[..., 0]
        in_grid = (t_q >= 0) & (t_k >= 0)
        cls = self.frame_class[:, t_q.clamp_min(0), t_k.clamp_min(0)].long()
        visible = cls >= 0
        heads = torch.arange(self.num_heads, device=cls.device).view(-1, *[1] * (cls.ndim - 1))
        for axis in (0, 1):
            q, k = query[..., axis + 1].clamp_min(0), key[..., axis + 1].clamp_min(0)
            low = self.low[heads, cls.clamp_min(0), axis, q]
            ahead = k - low
            if self.circular[axis]:
                ahead = ahead.remainder(self.extent[axis])
            visible = visible & (ahead >= 0) & (ahead < self.width[heads, cls.clamp_min(0), axis, q])
            if self.dilation[axis] > 1:
                visible = visible & ((k - q).remainder(self.dilation[axis]) == 0)
        return torch.where(in_grid, visible, t_k != PADDING) & (t_k != PADDING)

    def to(self, device: torch.device | str) -> "GridRule":
        return GridRule(
            self.coords.to(device),
            self.frame_class.to(device),
            self.low.to(device),
            self.width.to(device),
            self.extent,
            self.dilation,
            self.circular,
        )


@dataclass(frozen=True, eq=False)
class BlockRule:
    """Visibility given per block of `block` places: table bool [N, NB, NB].

    place: int32 [S], where each token stands when the blocks are cut; -1 global, -2 padding. None: its index in the sequence.
    """

    table: torch.Tensor
    block: int
    place: torch.Tensor | None = None

    @property
    def num_heads(self) -> int:
        return self.table.shape[0]

    def __call__(self, query_index: torch.Tensor, key_index: torch.Tensor) -> torch.Tensor:
        if self.place is not None:
            query_index, key_index = self.place[query_index].long(), self.place[key_index].long()
        query, key = torch.broadcast_tensors(query_index, key_index)
        seen = self.table[:, query.clamp_min(0) // self.block, key.clamp_min(0) // self.block]
        return (seen | (query < 0) | (key < 0)) & (key != PADDING)

    def to(self, device: torch.device | str) -> "BlockRule":
        place = None if self.place is None else self.place.to(device)
        return BlockRule(self.table.to(device), self.block, place)


@dataclass(frozen=True, eq=False)
class CombinedRule:
    """`op` "any" sees what one of the rules sees, "all" what all of them see."""

    rules: tuple[ElementRule, ...]
    op: str = "any"

    def __post_init__(self) -> None:
        if self.op not in ("any", "all"):
            raise ValueError(f"op must be 'any' or 'all', got {self.op!r}")
        if not self.rules:
            raise ValueError("a combined rule needs at least one rule, got none")
        _common_heads(self.rules)

    @property
    def num_heads(self) -> int:
        return _common_heads(self.rules)

    def __call__(self, query_index: torch.Tensor, key_index: torch.Tensor) -> torch.Tensor:
        visible = self.rules[0](query_index, key_index)
        for rule in self.rules[1:]:
            other = rule(query_index, key_index)
            visible = visible | other if self.op == "any" else visible & other
        return visible

    def to(self, device: torch.device | str) -> "CombinedRule":
        return CombinedRule(tuple(rule.to(device) for rule in self.rules), self.op)


@dataclass(frozen=True, eq=False)
class PerHeadRule:
    """Head h follows `rules[choice[h]]`; every rule is one for all heads (num_heads 1)."""

    rules: tuple[ElementRule, ...]
    choice: tuple[int, ...]

    def __post_init__(self) -> None:
        if any(rule.num_heads != 1 for rule in self.rules):
            raise ValueError(f"each rule must serve all heads, got num_heads {[r.num_heads for r in self.rules]}")
        if not self.choice or not all(0 <= c < len(self.rules) for c in self.choice):
            raise ValueError(f"choice must name rules 0..{len(self.rules) - 1} for every head, got {self.choice}")

    @property
    def num_heads(self) -> int:
        return len(self.choice)

    def __call__(self, query_index: torch.Tensor, key_index: torch.Tensor) -> torch.Tensor:
        seen = [rule(query_index, key_index)[0] for rule in self.rules]
        return torch.stack([seen[c] for c in self.choice])

    def to(self, device: torch.device | str) -> "PerHeadRule":
        return PerHeadRule(tuple(rule.to(device) for rule in self.rules), self.choice)


def rule_of_head(rule: ElementRule, head: int) -> ElementRule:
    """The rule that one head follows, for all heads (num_heads 1), so that the others' need not be evaluated."""
    if rule.num_heads == 1:
        return rule
    one = slice(head, head + 1)
    if isinstance(rule, PerHeadRule):
        return rule.rules[rule.choice[head]]
    if isinstance(rule, GridRule):
        return replace(rule, frame_class=rule.frame_class[one], low=rule.low[one], width=rule.width[one])
    if isinstance(rule, BlockRule):
        return replace(rule, table=rule.table[one])
    if isinstance(rule, CombinedRule):
        return CombinedRule(tuple(rule_of_head(part, head) for part in rule.rules), rule.op)
    return HeadOf(rule, head)


@dataclass(frozen=True, eq=False)
class HeadOf:
    """One head of a rule of any kind."""

    rule: ElementRule
    head: int
    num_heads: int = 1

    def __call__(self, query_index: torch.Tensor, key_index: torch.Tensor) -> torch.Tensor:
        return self.rule(query_index, key_index)[self.head : self.head + 1]

    def to(self, device: torch.device | str) -> "HeadOf":
        return HeadOf(self.rule.to(device), self.head)


def _common_heads(rules: Sequence[ElementRule]) -> int:
    counts = {rule.num_heads for rule in rules} - {1}
    if len(counts) > 1:
        raise ValueError(f"rules must agree on the number of heads, got {sorted(counts)}")
    return counts.pop() if counts else 1
