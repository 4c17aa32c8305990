"""How much each layer, head and part of the run may have, and one global share spread where it helps most.

error                          Every head has a curve of error over share. Start all at the sparsest; again and again
 | *                           take the step that lowers the summed error most per share it costs, until the mean
 |   *                         share is spent. On convex curves this greedy choice is the best one (Fox 1966); other
 |       *       *             curves are replaced by their lower convex hull, whose corners are the only useful points.
 +------------------ share
"""

import heapq
import numbers
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from genattn.errors import GenAttnError
from genattn.settings import number, refuse, several


@dataclass(frozen=True)
class Budget:
    """Amounts of a rule that differ by layer and head, and factors on them that differ along the run.

    layers: per layer in execution order one amount, or one per head; empty: the rule's own everywhere. steps: (until, factor)
    in rising order of `until`, the end of a part of the run in (0, 1]; e.g. ((0.2, 2.0), (0.9, 1.0), (1.0, 1.5)).
    """

    layers: tuple[float | tuple[float, ...], ...] = ()
    steps: tuple[tuple[float, float], ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(_amounts(a) for a in several("layers", self.layers, _LAYERS)))
        object.__setattr__(self, "steps", tuple(_part(p) for p in several("steps", self.steps, _STEPS)))
        ends = [until for until, _ in self.steps]
        if ends and (ends != sorted(set(ends)) or ends[0] <= 0 or ends[-1] > 1):
            raise GenAttnError(f"steps must end in rising order within (0, 1], got {ends}; e.g. ((0.2, 2.0), (1.0, 1.0))")

    def factor(self, fraction: float | None) -> float:
        """The factor at `fraction` of the run in [0, 1); 1 where it is unknown or behind the last part."""
        if fraction is None:
            return 1.0
        return next((factor for until, factor in self.steps if fraction < until), 1.0)

    def of_layer(self, layer: int, num_layers: int) -> float | tuple[float, ...] | None:
        """The amount of one layer, None where all have the rule's own. Raises GenAttnError unless there is one per layer."""
        if not self.layers:
            return None
        if len(self.layers) != num_layers or not 0 <= layer < num_layers:
            raise GenAttnError(
                f"a budget needs one amount per layer, got {len(self.layers)} amounts for layer {layer} of {num_layers}"
            )
        return self.layers[layer]


_LAYERS = "a list with one amount of the rule per layer, or one per head of each layer"
_STEPS = "pairs (until, factor) such as ((0.2, 2.0), (1.0, 1.0))"
_MOST = sys.float_info.max


def _amounts(given: object) -> float | tuple[float, ...]:
    if isinstance(given, numbers.Real):
        return number("layers", given, -_MOST, _MOST, _LAYERS)
    each = several("layers", given, _LAYERS)
    if not each:
        raise refuse("layers", given, _LAYERS)
    return tuple(number("layers", amount, -_MOST, _MOST, _LAYERS) for amount in each)


def _part(given: object) -> tuple[float, float]:
    pair = several("steps", given, _STEPS)
    if len(pair) != 2:
        raise refuse("steps", given, _STEPS)
    factor = "> 0 and finite; 1 changes nothing"
    return number("steps", pair[0], -_MOST, _MOST, _STEPS), number("factors of steps", pair[1], 0, _MOST, factor, above=True)


def spread_shares(errors: torch.Tensor, shares: Sequence[float], target: float) -> torch.Tensor:
    """Float64 [layers, heads]: the share of each head such that their mean is `target` and the summed error least.

    The mean stays below the target only where more would help no head.


    errors: [layers, heads, C], squared error at each of the C `shares` (rising, in (0, 1]). Raises GenAttnError when the
    curves do not fit the shares, hold a value that is not finite, or the target is below the smallest share.
    """
    if errors.ndim != 3 or errors.shape[-1] != len(shares) or list(shares) != sorted(set(shares)):
        raise GenAttnError(f"errors must be [layers, heads, {len(shares)}] for rising shares, got {tuple(errors.shape)}")
    if not bool(torch.isfinite(errors).all()):
        raise GenAttnError("errors must be finite, got NaN or infinity; measure again on activations that are finite")
    if not shares[0] <= target <= 1:
        raise GenAttnError(f"target must be between the smallest share {shares[0]} and 1, got {target}; raise it")
    curves = errors.double().flatten(0, 1).tolist()
    corners = [_lower_hull(shares, curve) for curve in curves]
    place, part = [0] * len(curves), [0.0] * len(curves)
    left = target * len(curves) - sum(shares[hull[0]] for hull in corners)
    steps = [_step(head, 0, hull, shares, curves[head]) for head, hull in enumerate(corners) if len(hull) > 1]
    heapq.heapify(steps)
    while steps:
        _, head, cost = heapq.heappop(steps)
        if cost > left + 1e-12:
            part[head] = left / cost  # the last step is taken in part: between corners the curve counts as straight
            break
        left -= cost
        place[head] += 1
        if place[head] + 1 < len(corners[head]):
            heapq.heappush(steps, _step(head, place[head], corners[head], shares, curves[head]))
    ends = [(shares[hull[at]], shares[hull[min(at + 1, len(hull) - 1)]]) for hull, at in zip(corners, place)]
    chosen = [here + some * (there - here) for (here, there), some in zip(ends, part)]
    return torch.tensor(chosen, dtype=torch.float64).view(errors.shape[:2])


def _step(head: int, at: int, hull: list[int], shares: Sequence[float], curve: list[float]) -> tuple[float, int, float]:
    here, there = hull[at], hull[at + 1]
    cost = shares[there] - shares[here]
    return (curve[there] - curve[here]) / cost, head, cost


def _lower_hull(shares: Sequence[float], curve: list[float]) -> list[int]:
    """Indices of the corners of the falling part of the lower convex hull."""
    hull: list[int] = []
    for index in range(len(shares)):
        while len(hull) > 1 and _above(hull[-2], hull[-1], index, shares, curve):
            hull.pop()
        hull.append(index)
    return [i for n, i in enumerate(hull) if n == 0 or curve[i] < curve[hull[n - 1]]]


def _above(first: int, middle: int, last: int, shares: Sequence[float], curve: list[float]) -> bool:
    slope = (curve[last] - curve[first]) / (shares[last] - shares[first])
    return curve[middle] >= curve[first] + slope * (shares[middle] - shares[first])
