"""Neighborhood windows along one axis, exactly as NATTEN defines them.

    L=10 K=4 stride=3      query   0 1 2 | 3 4 5 | 6 7 8 | 9        queries of a stride group share the window of their leader
                           leader    1   |   4   |   7   | 9        (the middle one, the right of two; the last one if causal)
                           window  0...3 | 2...5 | 5...8 | 6...9    an even window leans left; at borders it is pushed inwards

Hassani et al., "Generalized Neighborhood Attention: Multi-dimensional Sparse Attention at the Speed of Light" (arXiv
2504.16922), sections 3 and 4. Dilation d cuts the axis into d groups (tokens i, i + d, ...), of unequal length where d does not
divide the axis; windows and strides live inside a group. Beyond NATTEN: K = 1, axes of one token, and circular axes.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from genattn.errors import GenAttnError


@dataclass(frozen=True)
class AxisWindow:
    """Window along one axis: `length` tokens, `window` keys, `stride` >= 1 in queries, `dilation` >= 1.

    >>> AxisWindow("width", 6, 3).mask().astype(int)
    array([[1, 1, 1, 0, 0, 0],
           [1, 1, 1, 0, 0, 0],
           [0, 1, 1, 1, 0, 0],
           [0, 0, 1, 1, 1, 0],
           [0, 0, 0, 1, 1, 1],
           [0, 0, 0, 1, 1, 1]])

    Raises GenAttnError, with the nearest legal value, unless 1 <= window, window * dilation <= length, 1 <= stride <= window.
    """

    name: str
    length: int
    window: int
    stride: int = 1
    dilation: int = 1
    causal: bool = False
    circular: bool = False

    def __post_init__(self) -> None:
        fits = f"on the {self.name} axis of {self.length}"
        if self.dilation < 1:
            raise GenAttnError(f"dilation must be >= 1 {fits}, got {self.dilation}; nearest legal value: 1")
        if self.dilation > self.length:
            raise GenAttnError(
                f"dilation must be <= {self.length} {fits}, got {self.dilation}; nearest legal value: {self.length}"
            )
        if self.window < 1:
            raise GenAttnError(f"window_size must be >= 1 {fits}, got {self.window}; use -1 for the full axis")
        if self.window * self.dilation > self.length:
            most = self.length // self.dilation
            raise GenAttnError(
                f"window_size * dilation must be <= {self.length} {fits}, got {self.window} * {self.dilation}; "
                f"nearest legal window_size: {most} (or -1 for the full axis)"
            )
        if not 1 <= self.stride <= self.window:
            nearest = min(max(self.stride, 1), self.window)
            raise GenAttnError(
                f"stride must be between 1 and window_size = {self.window} {fits}, got {self.stride}; "
                f"nearest legal value: {nearest}"
            )
        if self.circular and self.causal:
            raise GenAttnError(f"a circular axis has no first token, so it cannot be causal {fits}; choose one of the two")
        if self.circular and self.length % self.dilation:
            raise GenAttnError(
                f"a circular axis needs a length divisible by its dilation, got {self.length} and {self.dilation} {fits}; "
                f"nearest legal dilation: {max(d for d in range(1, self.dilation) if self.length % d == 0)}"
            )

    @cached_property
    def groups(self) -> list["WindowGroup"]:
        """One per dilation group, in order."""
        return [self._group(g) for g in range(self.dilation)]

    @cached_property
    def order(self) -> np.ndarray:
        """Int64 [L]: coordinates, group after group; in this order every window is one run (unless it wraps around)."""
        return np.concatenate([group.members for group in self.groups])

    @cached_property
    def rank(self) -> np.ndarray:
        """Int64 [L]: place of each coordinate in `order`."""
        rank = np.empty(self.length, dtype=np.int64)
        rank[self.order] = np.arange(self.length)
        return rank

    def mask(self) -> np.ndarray:
        """Bool [L, L]: the definition."""
        seen = np.zeros((self.length, self.length), dtype=bool)
        for group in self.groups:
            seen[np.ix_(group.members, group.members)] = group.mask(self.circular)
        return seen

    def _group(self, first: int) -> "WindowGroup":
        members = np.arange(first, self.length, self.dilation, dtype=np.int64)
        size, index = members.size, np.arange(members.size, dtype=np.int64)
        start = index // self.stride * self.stride
        if self.causal:
            leader = np.minimum(start + self.stride - 1, size - 1)
            return WindowGroup(members, np.maximum(leader - self.window + 1, 0), index + 1)
        leader = np.minimum(start + self.stride // 2, size - 1)
        low = leader - self.window // 2
        if not self.circular:
            low = np.clip(low, 0, size - self.window)
        return WindowGroup(members, low, low + self.window)

    def inverse(self) -> tuple[np.ndarray, np.ndarray]:
        """(first, end), int64 [L]: the run of queries, counted inside the key's dilation group, that see each key.

        Closed form; not for circular axes.
        """
        if self.circular:
            raise GenAttnError(f"the inverse of a circular axis is not one run ({self.name}); use BlockPlan.transposed")
        first, end = np.empty(self.length, dtype=np.int64), np.empty(self.length, dtype=np.int64)
        for group in self.groups:
            first[group.members], end[group.members] = self._inverse(group.members.size)
        return first, end

    def _inverse(self, size: int) -> tuple[np.ndarray, np.ndarray]:
        key, window, stride = np.arange(size), self.window, self.stride
        if self.causal:
            last = (key + window) // stride + (key + window >= size)
            return key, np.minimum(last * stride, size)
        left, right, past = window // 2, window // 2 + window % 2 - 1, stride - stride // 2 - 1
        first = np.where(key < window, 0, (key - right + past) // stride * stride)
        end = np.where(key >= size - window, size, (key + left + past + 1) // stride * stride)
        return first, end


@dataclass(frozen=True)
class WindowGroup:
    """Windows of one dilation group. members: coordinates on the axis; low, high: per member, in group coordinates."""

    members: np.ndarray
    low: np.ndarray
    high: np.ndarray

    def mask(self, circular: bool) -> np.ndarray:
        """Bool [n, n]: who sees whom inside the group."""
        ahead = np.arange(self.members.size)[None, :] - self.low[:, None]
        if circular:
            ahead %= self.members.size
        return (ahead >= 0) & (ahead < (self.high - self.low)[:, None])
