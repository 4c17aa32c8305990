"""Which query tiles of a plan share one dense call on the CPU.

    tile 0   full [0 1]  partial [4]      run of three: keys that all its queries see   [0]           one call without a mask
    tile 1   full [0 2]  partial [5]                    keys that some of them see      [1 2 4 5]     one call with a mask
    tile 2   full [0 2]  partial [5]                    the rest                        not computed

A CPU's dense attention is slower for few queries, and with a mask, by factors that depend on type and head dim, so neighbours
are merged where the keys that are computed for nothing cost less than that. Runs are cut where the estimated cost is least. A
call is dealt to threads in slices of 32, 64 or 256 queries (below 192, below 768, above): three slices keep two threads busy
for as long as four, which counts where there are few heads.
"""

from dataclasses import dataclass

import torch

from genattn.kernels.block_plan import BlockPlan

_MOST_UNITS, _MOST_QUERIES = 16, 2048
_GATHER_ROWS = 8  # fetching the keys costs about as much as this many queries
_CHAIN_SCORES = 1 << 26
_CALL = 6000.0  # scores that could be computed in the time of a call's overhead
_SLICES = ((192, 32), (768, 64), (1 << 30, 256))  # below so many queries, slices of so many
_SHARED_CALL = (1.2, 1.05, 1.0)  # several threads on one call, by the same classes
_MANY_HEADS = 16
# time per score over that of a square call, without and with a mask, by the same classes; (16-bit type, head dim above 64).
# Measured on one thread of a Zen 4 core with torch 2.13.
_RATES = {
    (False, False): ((1.25, 1.1, 1.0), (1.3, 1.2, 1.1)),
    (False, True): ((1.25, 1.12, 1.0), (1.25, 1.15, 1.05)),
    (True, False): ((1.2, 1.07, 0.9), (1.1, 1.05, 1.0)),
    (True, True): ((1.17, 1.07, 1.03), (1.2, 1.12, 1.08)),
}


@dataclass(frozen=True)
class CallRates:
    """What decides how fast a dense call is: 16-bit type, head dim above 64, samples x heads in a call, threads."""

    half: bool
    wide: bool
    heads: int
    threads: int

    @classmethod
    def of(cls, query: torch.Tensor, plan: BlockPlan) -> "CallRates":
        """For calls on tensors like `query`, [B, S, H, D], on this machine."""
        heads = min(query.shape[0] * query.shape[2] // plan.mask_heads, _MANY_HEADS)
        return cls(query.dtype.itemsize == 2, query.shape[3] > 64, heads, torch.get_num_threads())

    def factors(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Time per score over that of a large square call, without and with a mask, for int64 [n] queries in a call."""
        kind = torch.bucketize(rows, torch.tensor([below for below, _ in _SLICES[:-1]]), right=True)
        slices = torch.tensor([size for _, size in _SLICES])[kind]
        units = self.heads * (rows + slices - 1).div(slices, rounding_mode="floor")
        idle = (units + self.threads - 1).div(self.threads, rounding_mode="floor") * self.threads / units
        if self.threads > 1:
            idle = idle * torch.tensor(_SHARED_CALL)[kind]
        plain, masked = (torch.tensor(rates, dtype=torch.float64)[kind] for rates in _RATES[self.half, self.wide])
        return plain * idle, masked * idle


@dataclass(frozen=True, eq=False)
class Group:
    """Runs of query tiles of the same shape, served by one call or two.

    queries: int64 [G, Lq]. keys: int64 [G, Lk], the first `whole` of which every query of the run sees. mask: bool
    [G, Lq, Lk - whole], or None when that is all of them.
    """

    queries: torch.Tensor
    keys: torch.Tensor
    whole: int
    mask: torch.Tensor | None


@dataclass(frozen=True, eq=False)
class _Unit:
    """Query tiles with the same lists. seen: bool [Lq, len(ragged)]."""

    queries: torch.Tensor
    whole: torch.Tensor
    ragged: torch.Tensor
    seen: torch.Tensor


def groups_of_plan(plan: BlockPlan, rates: CallRates) -> list[list[Group]]:
    """Per list of the plan (one, or one per head) its groups; kept in the plan."""
    name = ("groups", rates)
    if name not in plan.cache:
        plan.cache[name] = [_groups_of(plan, head, rates) for head in range(plan.mask_heads)]
    return plan.cache[name]  # type: ignore[return-value]


def _groups_of(plan: BlockPlan, head: int, rates: CallRates) -> list[Group]:
    units = _units(plan, head)
    if not units:
        return []
    alike: dict[tuple[int, int, int], list[Group]] = {}
    for run in _runs(units, plan.seqlen_k, rates):
        group = _merged([units[i] for i in run], plan.seqlen_k)
        alike.setdefault((group.queries.shape[1], group.keys.shape[1], group.whole), []).append(group)
    return [_stacked(groups) for groups in alike.values()]


def _units(plan: BlockPlan, head: int) -> list[_Unit]:
    row = head if plan.num_heads > 1 else 0
    ptr, full, columns = plan.row_ptr[row].tolist(), plan.num_full[row].tolist(), plan.columns.tolist()
    same: dict[tuple[tuple[int, ...], tuple[int, ...]], list[int]] = {}
    for tile, count in enumerate(full):
        first, last = ptr[tile], ptr[tile + 1]
        lists = (tuple(sorted(columns[first : first + count])), tuple(sorted(columns[first + count : last])))
        same.setdefault(lists, []).append(tile)
    units = [_unit(plan, head, tiles, *lists) for lists, tiles in same.items()]
    return [unit for unit in units if unit.queries.numel() and unit.whole.numel() + unit.ragged.numel()]


def _unit(plan: BlockPlan, head: int, tiles: list[int], full: tuple[int, ...], partial: tuple[int, ...]) -> _Unit:
    queries = _lanes(plan.query_tiles, tiles)
    whole, ragged = _lanes(plan.key_tiles, list(full)), _lanes(plan.key_tiles, list(partial))
    if not ragged.numel() or plan.rule is None:
        return _Unit(queries, whole, ragged[:0], torch.empty(queries.numel(), 0, dtype=torch.bool))
    seen = plan.rule(queries[:, None], ragged[None, :])
    seen = seen[head if seen.shape[0] > 1 else 0]
    kept = seen.any(0)
    return _Unit(queries, whole, ragged[kept], seen[:, kept])


def _lanes(tiles: torch.Tensor, chosen: list[int]) -> torch.Tensor:
    """Token indices of the used lanes of the chosen tiles, int64."""
    lanes = tiles[chosen].flatten() if chosen else tiles.new_empty(0)
    return lanes[lanes >= 0].long()


def _runs(units: list[_Unit], seqlen: int, rates: CallRates) -> list[list[int]]:
    """The units dealt into runs so that the estimated cost is least: neighbours in the sequence, or in what they see."""
    some, every = (torch.zeros(len(units), seqlen, dtype=torch.bool) for _ in range(2))
    for row, unit in enumerate(units):
        some[row, unit.whole] = every[row, unit.whole] = True
        some[row, unit.ragged] = True
        every[row, unit.ragged] = unit.seen.all(0)
    rows = torch.tensor([unit.queries.numel() for unit in units])
    orders = [list(range(len(units)))]
    if 2 < len(units) <= _CHAIN_SCORES // seqlen:
        orders.append(_chain(some))
    found = [(*_cut(rows[order], some[order], every[order], rates), order) for order in orders]
    _, runs, order = min(found, key=lambda way: way[0])
    return [order[first:last] for first, last in runs]


def _chain(some: torch.Tensor) -> list[int]:
    """Units one after the other, each the one that shares the most keys with the last (frames of one place, say)."""
    seen = some.float()
    both = seen @ seen.T
    size = both.diagonal()
    alike = both / (size[:, None] + size - both).clamp_min(1.0)
    order = [0]
    while len(order) < len(some):
        alike[:, order[-1]] = -1.0
        order.append(int(alike[order[-1]].argmax()))
    return order


def _cut(rows: torch.Tensor, some: torch.Tensor, every: torch.Tensor, rates: CallRates) -> tuple[float, list[tuple[int, int]]]:
    """(least cost, runs [first, last)) of cutting a sequence of units."""
    count = len(rows)
    ends = torch.cat([rows.new_zeros(1), rows.cumsum(0)])
    union, shared = some, every
    costs = []
    for length in range(1, min(_MOST_UNITS, count) + 1):
        if length > 1:
            union, shared = union[:-1] | some[length - 1 :], shared[:-1] & every[length - 1 :]
        costs.append(_cost(ends[length:] - ends[:-length], union.sum(1), shared.sum(1), length, rates).tolist())
    best, cut = [0.0], [0]
    for last in range(1, count + 1):
        value, first = min((best[last - n] + costs[n - 1][last - n], last - n) for n in range(1, min(len(costs), last) + 1))
        best.append(value)
        cut.append(first)
    runs, last = [], count
    while last:
        runs.append((cut[last], last))
        last = cut[last]
    return best[-1], runs[::-1]


def _cost(rows: torch.Tensor, union: torch.Tensor, shared: torch.Tensor, length: int, rates: CallRates) -> torch.Tensor:
    """Estimated cost of runs, in scores at the full rate."""
    plain, masked = rates.factors(rows)
    cost = (rows + _GATHER_ROWS) * (plain * shared + masked * (union - shared)) + _CALL * (1 + (shared < union))
    return cost.masked_fill(rows > _MOST_QUERIES, float("inf")) if length > 1 else cost


def _merged(units: list[_Unit], seqlen: int) -> Group:
    """One run of units as a group of its own."""
    rows = []
    for unit in units:
        seen = torch.zeros(unit.queries.numel(), seqlen, dtype=torch.bool)
        seen[:, unit.whole] = True
        seen[:, unit.ragged] = unit.seen
        rows.append(seen)
    seen = torch.cat(rows)
    every = seen.all(0)
    whole, ragged = torch.nonzero(every).flatten(), torch.nonzero(seen.any(0) & ~every).flatten()
    mask = seen[None, :, ragged] if ragged.numel() else None
    return Group(torch.cat([unit.queries for unit in units])[None], torch.cat([whole, ragged])[None], whole.numel(), mask)


def _stacked(groups: list[Group]) -> Group:
    first = groups[0]
    masks = [group.mask for group in groups if group.mask is not None]
    queries, keys = (torch.cat([getattr(group, name) for group in groups]) for name in ("queries", "keys"))
    return Group(queries, keys, first.whole, torch.cat(masks) if masks else None)
