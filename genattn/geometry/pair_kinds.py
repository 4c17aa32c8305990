"""Tile pairs that no grid rule can tell apart: what is worked out for one of them holds for all.

What a pair of tiles sees of each other depends on where their tokens lie in their frames, on the classes of their pairs of
frames, and on nothing else. A video is cut alike in every frame, so of millions of pairs a few thousand kinds remain.
"""

from dataclasses import dataclass

import numpy as np
import torch

from genattn.kernels.plan.element_rule import CombinedRule, ElementRule, GridRule


@dataclass(frozen=True)
class PairKinds:
    """kind_q, kind_k: int64 [tiles], how the tokens of a tile lie relative to its first frame, base_q, base_k.

    window: int64 [T, T], number of the table of frame classes that starts at a pair of first frames.
    """

    kind_q: np.ndarray
    kind_k: np.ndarray
    base_q: np.ndarray
    base_k: np.ndarray
    window: np.ndarray

    def of(self, row: np.ndarray, column: np.ndarray) -> np.ndarray:
        """Int64 [n]: a number per pair of query tile `row` and key tile `column`, the same for pairs of one kind."""
        window = self.window[self.base_q[row], self.base_k[column]]
        return (window * (self.kind_q.max() + 1) + self.kind_q[row]) * (self.kind_k.max() + 1) + self.kind_k[column]


def pair_kinds(rule: ElementRule, query_tiles: torch.Tensor, key_tiles: torch.Tensor) -> PairKinds | None:
    """The kinds of pairs of tiles, int32 [tiles, lanes], under a rule for all heads; None unless it is made of grid rules that
    count frames alike."""
    leaves = grid_leaves(rule)
    if leaves is None or any(not torch.equal(leaf.coords[:, 0], leaves[0].coords[:, 0]) for leaf in leaves[1:]):
        return None
    coords = [leaf.coords.numpy() for leaf in leaves]
    (kind_q, base_q, span_q), (kind_k, base_k, span_k) = (_kinds(coords, tiles.numpy()) for tiles in (query_tiles, key_tiles))
    classes = np.zeros(leaves[0].frame_class.shape[1:], dtype=np.int64)
    for leaf in leaves:
        table = leaf.frame_class[0].numpy().astype(np.int64)
        classes = classes * (int(table.max()) + 2) + table + 1
    return PairKinds(kind_q, kind_k, base_q, base_k, _windows(classes, base_q, base_k, span_q, span_k))


def grid_leaves(rule: ElementRule) -> list[GridRule] | None:
    """The grid rules that a rule is put together from; None when some part is of another kind."""
    if isinstance(rule, GridRule):
        return [rule]
    if not isinstance(rule, CombinedRule):
        return None
    parts = [grid_leaves(part) for part in rule.rules]
    return None if any(part is None for part in parts) else [leaf for part in parts for leaf in part or ()]


def _kinds(coords: list[np.ndarray], tiles: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    """(kind, first frame) of each tile, and over how many frames the widest one reaches."""
    used = tiles >= 0
    at = np.where(used, tiles, 0)
    frame = np.where(used, coords[0][at, 0].astype(np.int64), -3)
    base = np.where(frame >= 0, frame, np.iinfo(np.int64).max).min(1)
    base[base == np.iinfo(np.int64).max] = 0
    step = np.where(frame >= 0, frame - base[:, None], frame)
    places = [np.where(frame >= 0, c[at, axis], 0) for c in coords for axis in (1, 2)]
    lanes = np.stack([step, *places], axis=2).astype(np.int32).reshape(len(tiles), -1)
    rows = np.ascontiguousarray(lanes).view(np.dtype((np.void, lanes.shape[1] * 4))).reshape(-1)
    return np.unique(rows, return_inverse=True)[1].reshape(-1), base, int(step.max()) + 1


def _windows(classes: np.ndarray, base_q: np.ndarray, base_k: np.ndarray, span_q: int, span_k: int) -> np.ndarray:
    """Int64 [T, T]: at each pair of first frames, the number of the span_q x span_k classes from there on."""
    padded = np.pad(classes, ((0, max(1, span_q)), (0, max(1, span_k))), constant_values=-1)
    first_q, first_k = np.unique(base_q), np.unique(base_k)
    tables = [padded[first_q + i][:, first_k + j].reshape(-1) for i in range(max(1, span_q)) for j in range(max(1, span_k))]
    numbers = np.unique(np.stack(tables, axis=1), axis=0, return_inverse=True)[1].reshape(first_q.size, first_k.size)
    window = np.zeros(classes.shape, dtype=np.int64)
    window[np.ix_(first_q, first_k)] = numbers
    return window
