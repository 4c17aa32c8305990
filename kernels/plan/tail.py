"""What stands in for the key tiles that a query tile does not visit: pseudo-keys, described to a kernel.

    query tile 3 visits key tiles 0 1 4          its words    bit j of the list says: tile j is stood in for
    key tiles 2, 3, 5                            101100       as one or two pseudo-keys each

A pseudo-key is the mean of the keys of a part of a tile, and counts as many times as the part has unmasked keys. The means
depend on the tensors and are made in every call (`kernels/reference/tail.py`, the definition); everything else is here.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from genattn.kernels.plan.element_rule import PADDING, BlockRule, CombinedRule, ElementRule, GridRule, PerHeadRule

if TYPE_CHECKING:
    from genattn.kernels.plan.block_plan import BlockPlan

TAILS = {"mean": 1, "mean2": 2}
WORD = 32
_TILES_AT_ONCE = 4096


@dataclass(frozen=True, eq=False)
class Tail:
    """The stand-in of a plan, next to its lists.

    kind: a key of `TAILS`. parts: pseudo-keys per key tile; pseudo-key p belongs to key tile p // parts.
    tokens: int32 [NK * parts, L], the keys of which a pseudo-key is the mean; -1 marks an unused lane. Never padding. With more
        than one part only the keys of a tile are fixed here: which part a key is in follows from its likeness to the others,
        per call (`kernels/reference/likeness.py`).
    skipped: int32 [N, NQ, ceil(NK / 32)], one bit per key tile, bit j % 32 of word j // 32: set where the query tile does not
        visit the key tile and the head has a tail. N as in the plan's lists.
    counted: bool [Sk], which of the tokens add to the weight of their pseudo-key; None for all. The mean is over all of them:
        a plan that is cut into pieces (by frame, say) keeps the pseudo-keys and shares out their weight.
    """

    kind: str
    parts: int
    tokens: torch.Tensor
    skipped: torch.Tensor
    counted: torch.Tensor | None = None

    @property
    def pseudo_keys(self) -> int:
        """P = NK * parts."""
        return self.tokens.shape[0]

    def to(self, device: torch.device | str) -> "Tail":
        """The same with its tables on `device`."""
        counted = None if self.counted is None else self.counted.to(device)
        return replace(self, tokens=self.tokens.to(device), skipped=self.skipped.to(device), counted=counted)

    def only(self, keys: torch.Tensor) -> "Tail":
        """The same pseudo-keys, weighed by their tokens among `keys`, bool [Sk]; those without one are not seen any more."""
        counted = keys if self.counted is None else self.counted & keys
        weighs = (counted[self.tokens.long().clamp_min(0)] & (self.tokens >= 0)).view(self.pseudo_keys // self.parts, -1).any(1)
        return replace(self, counted=counted, skipped=self.skipped & packed_bits(weighs))

    def stands_in(self, lists: slice = slice(None)) -> torch.Tensor:
        """Bool [N, NQ, P]: which pseudo-keys the queries of a tile see, for some of the lists."""
        tiles = self.pseudo_keys // self.parts
        return unpack_words(self.skipped[lists], tiles).repeat_interleave(self.parts, -1)


def tail_of_plan(
    plan: "BlockPlan", kind: str, heads: Sequence[bool] | None = None, among: tuple[torch.Tensor, torch.Tensor] | None = None
) -> Tail | None:
    """What stands in for the tiles that `plan` skips; None where it skips nothing that could be counted.

    heads: which heads have it, where the plan has a list per head; None for all. among: a number per query tile [NQ] and per
    key tile [NK]; only key tiles of the query tile's own number belong to its sequence (heads laid side by side). Raises
    ValueError for an unknown kind, or for heads that are not those of the plan.
    """
    if kind not in TAILS:
        raise ValueError(f"tail must be None or one of {', '.join(TAILS)}, got {kind!r}")
    if heads is not None and len(heads) != plan.num_heads:
        raise ValueError(f"a tail per head needs one entry for each of the plan's {plan.num_heads} lists, got {len(heads)}")
    tokens = _parts_of_tiles(without_padding(plan.key_tiles, plan.rule), TAILS[kind])
    empty = (tokens.view(plan.key_tiles.shape[0], -1) < 0).all(1)
    has = [True] * plan.num_heads if heads is None else list(heads)
    words = [_skipped_words(plan, head, empty, has[head]) for head in range(plan.num_heads)]
    skipped = torch.stack(words)
    if among is not None:
        own = [packed_bits(among[0][rows, None] == among[1]) for rows in torch.arange(len(among[0])).split(_TILES_AT_ONCE)]
        skipped = skipped & torch.cat(own).to(skipped.device)
    return Tail(kind, TAILS[kind], tokens, skipped) if bool(skipped.any()) else None


def unpack_words(words: torch.Tensor, count: int) -> torch.Tensor:
    """Bool [..., count] of int32 [..., ceil(count / 32)]."""
    bits = torch.arange(WORD, dtype=torch.int32, device=words.device)
    return ((words[..., None] >> bits) & 1).bool().flatten(-2)[..., :count]


def packed_bits(bits: torch.Tensor) -> torch.Tensor:
    """Int32 [..., ceil(n / 32)] of bool [..., n]."""
    bits = torch.nn.functional.pad(bits, (0, -bits.shape[-1] % WORD)).unflatten(-1, (-1, WORD))
    # bit 31 of an int32 is its sign: the conversion wraps
    return (bits * (1 << torch.arange(WORD, dtype=torch.int64, device=bits.device))).sum(-1).to(torch.int32)


def _skipped_words(plan: "BlockPlan", head: int, empty: torch.Tensor, has: bool) -> torch.Tensor:
    """Int32 [NQ, W] of one list, all zero without a tail; tiles without a token that counts are never stood in for."""
    rows, tiles = plan.query_tiles.shape[0], plan.key_tiles.shape[0]
    skipped = torch.full((rows, tiles), has, dtype=torch.bool, device=plan.device)
    ptr = plan.row_ptr[head].long()
    row = torch.repeat_interleave(torch.arange(rows, device=plan.device), ptr.diff())
    skipped[row, plan.columns[int(ptr[0]) : int(ptr[-1])].long()] = False
    skipped &= ~empty
    skipped &= (plan.query_tiles >= 0).any(1)[:, None]
    return packed_bits(skipped)


def _parts_of_tiles(tiles: torch.Tensor, parts: int) -> torch.Tensor:
    """Int32 [NK * parts, ceil(BK / parts)]: the lanes of each tile cut into runs of equal length."""
    missing = -tiles.shape[1] % parts
    return torch.nn.functional.pad(tiles, (0, missing), value=-1).view(len(tiles) * parts, -1).contiguous()


def without_padding(tiles: torch.Tensor, rule: ElementRule | None) -> torch.Tensor:
    """The tiles without tokens that no query may see."""
    hidden = None if rule is None else _padding(rule)
    if hidden is None:
        return tiles
    return torch.where((tiles >= 0) & hidden[tiles.clamp_min(0).long()], -1, tiles)


def _padding(rule: ElementRule) -> torch.Tensor | None:
    """Bool [S]: the tokens that a rule marks as padding; None where it marks none."""
    if isinstance(rule, GridRule):
        return rule.coords[:, 0] == PADDING
    if isinstance(rule, BlockRule):
        return None if rule.place is None else rule.place == PADDING
    if isinstance(rule, CombinedRule | PerHeadRule):
        found = [hidden for hidden in map(_padding, rule.rules) if hidden is not None]
        return torch.stack(found).any(0) if found else None
    return None
