"""From an element rule and tiles to a block plan, exactly and without an S x S tensor.

A tile is split into pieces: boxes of grid coordinates inside one frame. For a pair of pieces a code says what the rule shows

    0  nothing        1  something, ask the rule        2  everything

and it depends only on the class of the two frames and on the two boxes, so it is tabulated per class over the distinct boxes
(29 of them for 128 frames of 3600 tokens) and looked up for every pair. A tile pair is full if all its pieces are, and listed
if any is.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from genattn.geometry.axis_codes import box_codes
from genattn.geometry.pair_kinds import pair_kinds
from genattn.kernels.plan.block_plan import BlockPlan
from genattn.kernels.plan.element_rule import BlockRule, CombinedRule, ElementRule, GridRule, PerHeadRule, rule_of_head

_CHUNK = 4_000_000
_SAMPLED_LANES = 16
_LOOKED_UP = 1_000_000  # elements at a time: a few of them fit the cache
EXACT_ELEMENTS = 100_000_000
NONE, SOME, ALL = 0, 1, 2


class TileCodes(Protocol):
    """Codes of all tile pairs, a few query tiles at a time."""

    @property
    def num_heads(self) -> int: ...

    def rows(self, head: int, start: int, stop: int) -> np.ndarray:
        """Uint8 [stop - start, NK] for query tiles start..stop."""
        ...


@dataclass(frozen=True)
class Pieces:
    """Boxes that make up the tiles, in tile order. frame: int64 [P], -1 global, -2 padding. box: int64 [P, 4] y0 y1 x0 x1.

    tile: int64 [P]. first: int64 [NT + 1], the pieces of tile i are first[i]..first[i + 1].
    """

    tile: np.ndarray
    frame: np.ndarray
    box: np.ndarray
    first: np.ndarray

    @property
    def one_each(self) -> bool:
        return self.tile.size == self.first.size - 1


def split_into_pieces(coords: np.ndarray, tiles: np.ndarray) -> Pieces:
    """Cut every tile into boxes of one frame each. coords: [S, 3]; tiles: [NT, B] token indices, -1 unused."""
    used = tiles >= 0
    owner = np.repeat(np.arange(tiles.shape[0]), used.sum(1))
    spot = coords[tiles[used]].astype(np.int64)
    spot[spot[:, 0] < 0, 1:] = 0
    frame, y, x = spot.T
    same = (np.diff(owner) == 0) & (np.diff(frame) == 0)
    joined = same & (np.diff(y) == 0) & ((np.diff(x) == 1) | (frame[1:] < 0))
    start = np.flatnonzero(np.r_[True, ~joined])
    stop = np.r_[start[1:], owner.size] - 1
    owner, frame, y, x0, x1 = owner[start], frame[start], y[start], x[start], x[stop] + 1
    stacked = (np.diff(owner) == 0) & (np.diff(frame) == 0) & (np.diff(y) == 1) & (np.diff(x0) == 0) & (np.diff(x1) == 0)
    start = np.flatnonzero(np.r_[True, ~stacked])
    stop = np.r_[start[1:], owner.size] - 1
    box = np.stack([y[start], y[stop] + 1, x0[start], x1[start]], axis=1)
    first = np.searchsorted(owner[start], np.arange(tiles.shape[0] + 1))
    return Pieces(owner[start], frame[start], box, first)


@dataclass(frozen=True)
class Layers:
    """The tokens of a tile in one frame, in tile order, and the distinct sets of places that such tokens have.

    tile, frame, first: as in `Pieces`. kind: int64 [L], which set. box: int64 [B, 4], the boxes of the sets; set i has boxes
    start[i]..start[i + 1]. A frame cut alike in every frame has few sets, however many tiles there are.
    """

    tile: np.ndarray
    frame: np.ndarray
    kind: np.ndarray
    first: np.ndarray
    box: np.ndarray
    start: np.ndarray

    @property
    def one_each(self) -> bool:
        return self.tile.size == self.first.size - 1


def join_into_layers(pieces: Pieces) -> Layers:
    """Put together the boxes of a tile that lie in one frame."""
    head = np.flatnonzero(np.r_[True, (np.diff(pieces.tile) != 0) | (np.diff(pieces.frame) != 0)])
    counts = np.diff(np.r_[head, pieces.tile.size])
    padded = np.full((head.size, int(counts.max()), 4), -1, dtype=np.int64)
    within = np.arange(pieces.tile.size) - np.repeat(head, counts)
    padded[np.repeat(np.arange(head.size), counts), within] = pieces.box
    sets, kind = np.unique(padded.reshape(head.size, -1), axis=0, return_inverse=True)
    box = sets.reshape(-1, 4)
    used = box[:, 0] >= 0
    start = np.r_[0, np.cumsum(used.reshape(len(sets), -1).sum(1))]
    tile = pieces.tile[head]
    first = np.searchsorted(tile, np.arange(pieces.first.size))
    return Layers(tile, pieces.frame[head], kind.reshape(-1), first, box[used], start)


class GridCodes:
    """Codes of a `GridRule`."""

    def __init__(self, rule: GridRule, query_tiles: torch.Tensor, key_tiles: torch.Tensor) -> None:
        coords = rule.coords.numpy()
        self.rule, self.num_heads = rule, rule.num_heads
        self.query = join_into_layers(split_into_pieces(coords, query_tiles.numpy()))
        same = key_tiles is query_tiles
        self.key = self.query if same else join_into_layers(split_into_pieces(coords, key_tiles.numpy()))
        self.classes = rule.low.shape[1]
        self.pairs = _pair_classes(rule.frame_class.numpy(), self.classes)

    def rows(self, head: int, start: int, stop: int) -> np.ndarray:
        first, last = int(self.query.first[start]), int(self.query.first[stop])
        kinds, kind = np.unique(self.query.kind[first:last], return_inverse=True)
        table = self._table(head, kinds)
        frames = self.query.frame[first:last]
        codes = np.empty((last - first, self.key.tile.size), dtype=np.uint8)
        for frame in np.unique(frames):
            rows = np.flatnonzero(frames == frame)
            column = self.pairs[head, frame, self.key.frame] * (self.key.start.size - 1) + self.key.kind
            codes[rows] = np.take(table[kind.reshape(-1)[rows]], column, axis=1, mode="clip")
        # along whole rows first: that is quick, and leaves less to do across them
        return _merge(_merge(codes, self.query, 0, start, stop), self.key, 1)

    def _table(self, head: int, kinds: np.ndarray) -> np.ndarray:
        """Uint8 [kinds, (classes + 2) * key sets]; the two extra classes are everything and nothing."""
        sets_k = self.key.start.size - 1
        sizes = self.query.start[kinds + 1] - self.query.start[kinds]
        begin = np.cumsum(sizes) - sizes
        boxes = self.query.box[np.repeat(self.query.start[kinds] - begin, sizes) + np.arange(int(sizes.sum()))]
        table = np.empty((len(kinds), self.classes + 2, sets_k), dtype=np.uint8)
        table[:, -2], table[:, -1] = ALL, NONE
        for cls in range(self.classes):
            codes = box_codes(self.rule, head, cls, boxes, self.key.box)
            table[:, cls] = _reduced(_reduced(codes, self.key.start[:-1], 1), begin, 0)
        return table.reshape(len(kinds), -1)


def _pair_classes(frame_class: np.ndarray, classes: int) -> np.ndarray:
    """Int64 [N, T + 2, T + 2]: class of a pair of frames; the last two rows and columns are padding (-2) and global (-1)."""
    heads, frames, _ = frame_class.shape
    pairs = np.full((heads, frames + 2, frames + 2), classes, dtype=np.int64)
    pairs[:, :frames, :frames] = np.where(frame_class < 0, classes + 1, frame_class)
    pairs[:, :, -2] = classes + 1
    return pairs


class BlockCodes:
    """Codes of a `BlockRule`: pieces are runs of tokens of the same rule block."""

    def __init__(self, rule: BlockRule, query_tiles: torch.Tensor, key_tiles: torch.Tensor) -> None:
        self.num_heads = rule.num_heads
        blocks = rule.table.shape[1]
        self.table = np.zeros((rule.num_heads, blocks + 2, blocks + 2), dtype=np.uint8)
        self.table[:, :blocks, :blocks] = rule.table.numpy() * np.uint8(ALL)
        # as in the rule: the last two rows and columns are padding (-2) and global (-1)
        self.table[:, -2:, :] = ALL
        self.table[:, :, -1] = ALL
        self.table[:, :, -2] = NONE
        tokens = max(int(query_tiles.max()), int(key_tiles.max())) + 1
        place = np.arange(tokens) if rule.place is None else rule.place.numpy()
        block = np.where(place >= 0, place // rule.block, place)
        coords = np.stack([block, block * 0, block * 0], axis=1)
        self.query, self.key = (_same_block_pieces(coords, tiles.numpy()) for tiles in (query_tiles, key_tiles))

    def rows(self, head: int, start: int, stop: int) -> np.ndarray:
        first, last = int(self.query.first[start]), int(self.query.first[stop])
        codes = self.table[head][self.query.frame[first:last]][:, self.key.frame]
        return _merge(_merge(codes, self.key, 1), self.query, 0, start, stop)


def _same_block_pieces(coords: np.ndarray, tiles: np.ndarray) -> Pieces:
    used = tiles >= 0
    owner = np.repeat(np.arange(tiles.shape[0]), used.sum(1))
    block = coords[tiles[used], 0].astype(np.int64)
    start = np.flatnonzero(np.r_[True, (np.diff(owner) != 0) | (np.diff(block) != 0)])
    first = np.searchsorted(owner[start], np.arange(tiles.shape[0] + 1))
    return Pieces(owner[start], block[start], np.zeros((start.size, 4), dtype=np.int64), first)


def _merge(codes: np.ndarray, pieces: Pieces | Layers, axis: int, start: int = 0, stop: int | None = None) -> np.ndarray:
    """Codes of pieces to codes of tiles along `axis`."""
    if pieces.one_each:
        return codes
    first = pieces.first[start : pieces.first.size - 1 if stop is None else stop] - pieces.first[start]
    return _reduced(codes, first, axis)


def _reduced(codes: np.ndarray, first: np.ndarray, axis: int) -> np.ndarray:
    """One code for each run of `axis` that begins at `first`."""
    if first.size == codes.shape[axis]:
        return codes
    most = np.maximum.reduceat(codes, first, axis=axis)
    least = np.minimum.reduceat(codes, first, axis=axis)
    return np.where(least == ALL, ALL, np.minimum(most, SOME)).astype(np.uint8)


def plan_from_codes(
    codes: TileCodes,
    query_tiles: torch.Tensor,
    key_tiles: torch.Tensor,
    rule: ElementRule | None,
    seqlen: int,
    choice: Sequence[int] | None = None,
) -> BlockPlan:
    """Compress the codes into lists, a few query tiles at a time. choice: per head, which of the codes' heads it follows."""
    tiles, per_head = query_tiles.shape[0], []
    step = max(1, _CHUNK // max(1, key_tiles.shape[0]))
    for head in range(codes.num_heads):
        chunks = [_compress(codes.rows(head, i, min(i + step, tiles))) for i in range(0, tiles, step)]
        per_head.append(tuple(np.concatenate(part) for part in zip(*chunks)))
    per_head = per_head if choice is None else [per_head[c] for c in choice]
    return _to_plan(per_head, query_tiles, key_tiles, rule, seqlen)


def _compress(codes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(visits, full visits, columns) of some rows; in each row the full columns come first."""
    full, full_columns = _nonzero_by_row(codes == ALL)
    partly = codes == SOME
    if not partly.any():
        return full, full, full_columns
    some, some_columns = _nonzero_by_row(partly)
    out = np.empty(full_columns.size + some_columns.size, dtype=np.int32)
    behind = np.cumsum(some) - some
    out[np.arange(full_columns.size) + np.repeat(behind, full)] = full_columns
    out[np.arange(some_columns.size) + np.repeat(np.cumsum(full), some)] = some_columns
    return full + some, full, out


def _nonzero_by_row(hit: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(count per row, columns in row order, int32)."""
    counts = np.count_nonzero(hit, axis=1)
    columns = np.flatnonzero(hit).astype(np.int32 if hit.size < 2**31 else np.int64)
    columns = columns - np.repeat(np.arange(len(hit), dtype=columns.dtype) * hit.shape[1], counts)
    return counts, columns.astype(np.int32, copy=False)


def _to_plan(
    per_head: Sequence[tuple[np.ndarray, ...]],
    query_tiles: torch.Tensor,
    key_tiles: torch.Tensor,
    rule: ElementRule | None,
    seqlen: int,
) -> BlockPlan:
    visits = np.stack([head[0] for head in per_head])
    full = np.stack([head[1] for head in per_head])
    ends = np.cumsum(visits.reshape(-1)).reshape(visits.shape)
    ptr = np.concatenate([ends[:, :1] - visits[:, :1], ends], axis=1)
    all_full = int(full.sum()) == int(visits.sum())
    return BlockPlan(
        query_tiles,
        key_tiles,
        torch.from_numpy(ptr.astype(np.int32)),
        torch.from_numpy(np.concatenate([head[2] for head in per_head])),
        torch.from_numpy(full.astype(np.int32)),
        None if all_full else rule,
        seqlen,
        seqlen,
    )


def tile_codes(rule: ElementRule, query_tiles: torch.Tensor, key_tiles: torch.Tensor) -> TileCodes:
    """Codes of every tile pair under `rule`. Raises TypeError for rules that are not defined by geometry."""
    if isinstance(rule, GridRule):
        return GridCodes(rule, query_tiles, key_tiles)
    if isinstance(rule, BlockRule):
        return BlockCodes(rule, query_tiles, key_tiles)
    if isinstance(rule, CombinedRule):
        return CombinedCodes(rule, query_tiles, key_tiles)
    if isinstance(rule, PerHeadRule):
        each = [tile_codes(part, query_tiles, key_tiles) for part in rule.rules]
        return StackedCodes([each[choice] for choice in rule.choice])
    raise TypeError(f"no analytic tile codes for {type(rule).__name__}")


def plan_from_rule(rule: ElementRule, query_tiles: torch.Tensor, key_tiles: torch.Tensor, seqlen: int) -> BlockPlan:
    """The exact plan of `rule` on given tiles: listed iff the rule sees any pair, full iff it sees all."""
    if not isinstance(rule, PerHeadRule):
        return plan_from_codes(tile_codes(rule, query_tiles, key_tiles), query_tiles, key_tiles, rule, seqlen)
    each = StackedCodes([tile_codes(r, query_tiles, key_tiles) for r in rule.rules])
    return plan_from_codes(each, query_tiles, key_tiles, rule, seqlen, rule.choice)


class StackedCodes:
    """Codes of several rules of one head each, a rule per head."""

    def __init__(self, parts: Sequence[TileCodes]) -> None:
        self.parts, self.num_heads = parts, len(parts)

    def rows(self, head: int, start: int, stop: int) -> np.ndarray:
        return self.parts[head].rows(0, start, stop)


class CombinedCodes:
    """Codes of a union or an intersection.

    Where all parts see something but none everything, the parts do not tell; those tile pairs are looked up element by
    element, each kind of pair once (see `PairKinds`), up to `EXACT_ELEMENTS` per plan. Beyond that they count as partly
    visible, which is safe: the rule decides inside.
    """

    def __init__(self, rule: CombinedRule, query_tiles: torch.Tensor, key_tiles: torch.Tensor) -> None:
        self.rule, self.num_heads = rule, rule.num_heads
        self.parts = [tile_codes(r, query_tiles, key_tiles) for r in rule.rules]
        self.tiles = query_tiles, key_tiles
        self.budget = EXACT_ELEMENTS
        self.kinds = [pair_kinds(rule_of_head(rule, h), query_tiles, key_tiles) for h in range(rule.num_heads)]
        self.known: list[dict[int, int]] = [{} for _ in range(rule.num_heads)]

    def rows(self, head: int, start: int, stop: int) -> np.ndarray:
        parts = [p.rows(head if p.num_heads > 1 else 0, start, stop) for p in self.parts]
        codes = np.maximum.reduce(parts) if self.rule.op == "any" else np.minimum.reduce(parts)
        open_parts = np.sum([part == SOME for part in parts], axis=0, dtype=np.uint8)
        row, column = np.nonzero((codes == SOME) & (open_parts > 1))
        if row.size:
            codes[row, column] = self._settled(head, row + start, column)
        return codes

    def _settled(self, head: int, row: np.ndarray, column: np.ndarray) -> np.ndarray:
        """Codes of tile pairs that the parts leave open."""
        kinds, known = self.kinds[head], self.known[head]
        names = np.arange(row.size) if kinds is None else kinds.of(row, column)
        each, first, which = np.unique(names, return_index=True, return_inverse=True)
        new = np.array([i for i, name in enumerate(each.tolist()) if kinds is None or name not in known], dtype=np.int64)
        found = np.full(each.size, SOME, dtype=np.uint8)
        for some in self._turns(self._undecided(head, row[first], column[first], new), 1):
            lanes = self.tiles[0].shape[1] * self.tiles[1].shape[1]
            self.budget -= some.size * lanes
            if self.budget < 0:
                break
            any_seen, all_seen = self._look(head, row[first[some]], column[first[some]])
            found[some] = any_seen.astype(np.uint8) + all_seen
        if kinds is not None:
            known.update(zip(each[new].tolist(), found[new].tolist()))
            found = np.array([known[name] for name in each.tolist()], dtype=np.uint8)
        return found[which.reshape(-1)]

    def _undecided(self, head: int, row: np.ndarray, column: np.ndarray, new: np.ndarray) -> np.ndarray:
        """Those of `new` that a few of their elements do not settle. Where all parts show something there is one question: does
        a union show all, does an intersection show nothing?"""
        left = [new[:0]]
        for some in self._turns(new, _SAMPLED_LANES):
            any_seen, all_seen = self._look(head, row[some], column[some], _SAMPLED_LANES)
            left.append(some[all_seen if self.rule.op == "any" else ~any_seen])
        return np.concatenate(left)

    def _turns(self, pairs: np.ndarray, step: int) -> list[np.ndarray]:
        """The pairs in turns of a million elements, where every `step`-th lane is looked at."""
        lanes = -(-self.tiles[0].shape[1] // step) * -(-self.tiles[1].shape[1] // step)
        size = max(1, _LOOKED_UP // lanes)
        return np.split(pairs, range(size, pairs.size, size))

    def _look(self, head: int, row: np.ndarray, column: np.ndarray, step: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """Bool [n] twice, for tile pairs of `row` and `column`: whether anything is seen, and whether everything is."""
        query, key = self.tiles[0][row, ::step].long()[:, :, None], self.tiles[1][column, ::step].long()[:, None, :]
        used = (query >= 0) & (key >= 0)
        seen = rule_of_head(self.rule, head)(query.clamp_min(0), key.clamp_min(0))[0]
        return (seen & used).flatten(1).any(1).numpy(), (seen | ~used).flatten(1).all(1).numpy()
