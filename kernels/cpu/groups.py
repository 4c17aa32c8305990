"""Which query tiles of a plan share one batched product on the CPU.

    tile 0   full [0 1]  partial [4]      run of three: keys that all its queries see   [0]
    tile 1   full [0 2]  partial [5]                    keys that some of them see      [1 2 4 5]     masked
    tile 2   full [0 2]  partial [5]                    the rest                        not computed

Matrix products are slower for few queries and keys must be fetched for each run, so neighbours are merged where the scores that
are computed for nothing cost less than that. Runs are cut where the estimated cost is least. Then keys that several runs see
whole are taken out of them into a group of their own, fetched once, and the two answers of each query are joined.
"""

import functools
import hashlib
import itertools
from dataclasses import dataclass, replace

import torch

from genattn.kernels.plan.block_plan import BlockPlan
from genattn.kernels.plan.lasting import lasting

_MOST_UNITS, _MOST_QUERIES = 16, 512
# time per score against a square call's is about 1 + 8 / queries; fetching a key costs about as much as six queries
# (one thread of a Zen 4 core, torch 2.13; two threads and the other types are much the same)
_ROWS_OF_KEY = 14
_MASKED = 0.04  # what adding a mask costs, in scores
_JOIN = 60  # what joining two answers of a query costs, in scores
_CALL = 6000.0  # scores that could be computed in the time of a call's overhead
_CHAIN_SCORES = 1 << 26
_FEW = 0.7  # share of the pseudo-keys below which runs take only those that they see
LINE = 16  # rows of so many scores, or multiples, begin on a cache line each: products of others take 5 to 10 % longer


@dataclass(frozen=True, eq=False)
class Group:
    """Runs of query tiles of the same shape, served by one batched product.

    queries: int64 [G, Lq]. keys: int64 [G, Lk], the first `whole` of which every query of the run sees. masks: bool
    [U, Lq, Lk - whole], the different ones, U = 0 when every query sees all keys. mask_ends: the runs up to
    mask_ends[u] from the last end have mask u. again: a group before has answered for these queries with other keys.
    tail: the last so many keys are places of pseudo-keys, seen or not by query tile, and not part of the masks.
    tail_alike: all queries of a run see the same pseudo-keys.
    """

    queries: torch.Tensor
    keys: torch.Tensor
    whole: int
    masks: torch.Tensor
    mask_ends: tuple[int, ...]
    again: bool
    tail: int = 0
    tail_alike: bool = False

    @functools.cached_property
    def all_see(self) -> bool:
        """Whether every query sees some key of the sequence."""
        return self.whole > 0 or (self.keys.shape[1] > self.tail and bool(self.masks.any(-1).all()))

    def spans(self, first: int, last: int) -> list[tuple[int, int, int]]:
        """(first, last, mask) of the runs in [first, last) with one mask."""
        starts = (0, *self.mask_ends[:-1])
        cut = [(max(a, first), min(b, last), place) for place, (a, b) in enumerate(zip(starts, self.mask_ends))]
        return [span for span in cut if span[0] < span[1]]


@dataclass(frozen=True, eq=False)
class _Unit:
    """Query tiles with the same lists. seen: bool [Lq, len(ragged)]."""

    queries: torch.Tensor
    whole: torch.Tensor
    ragged: torch.Tensor
    seen: torch.Tensor


@dataclass(frozen=True, eq=False)
class _Run:
    """Merged units. queries: int64 [Lq]. keys: int64 [Lk]. mask: bool [Lq, Lk - whole]."""

    queries: torch.Tensor
    keys: torch.Tensor
    whole: int
    mask: torch.Tensor


def groups_of_plan(plan: BlockPlan) -> list[list[Group]]:
    """Per list of the plan (one, or one per head) its groups, without the tail; kept in the plan."""
    if "groups" not in plan.cache:
        plan.cache["groups"] = [_groups_of(plan, head) for head in range(plan.mask_heads)]
    return plan.cache["groups"]  # type: ignore[return-value]


def groups_with_tail(plan: BlockPlan) -> list[list[Group]]:
    """`groups_of_plan` with the plan's pseudo-keys behind the keys, each query meeting them once; kept in the plan.

    Pseudo-keys stand in places seqlen_k, seqlen_k + 1, ...; they are filled up to whole cache lines of scores.
    """
    if plan.tail is None:
        return groups_of_plan(plan)
    if "groups with tail" not in plan.cache:
        plan.cache["groups with tail"] = [_with_tail(plan, head, some) for head, some in enumerate(groups_of_plan(plan))]
    return plan.cache["groups with tail"]  # type: ignore[return-value]


def _with_tail(plan: BlockPlan, head: int, groups: list[Group]) -> list[Group]:
    """Groups whose runs see the pseudo-keys too, and one more for queries that see no other key."""
    assert plan.tail is not None
    seen = plan.tail.stands_in(slice(head, head + 1) if plan.num_heads > 1 else slice(1))[0]
    found = [group if group.again else _tailed(plan, group, seen) for group in groups]
    alone = torch.zeros(plan.seqlen_q, dtype=torch.bool)
    alone[plan.query_tiles[plan.query_tiles >= 0].long()] = True
    for group in groups:
        alone[group.queries.flatten()] = False
    if alone.any():
        nothing = torch.empty(1, 0, dtype=torch.int64), 0, torch.empty(0, 0, 0, dtype=torch.bool), ()
        found.append(_tailed(plan, Group(alone.nonzero().T, *nothing, again=False), seen))
    return found


def _tailed(plan: BlockPlan, group: Group, seen: torch.Tensor) -> Group:
    """The group with pseudo-keys behind its keys: all of them, or those that each run sees, if they are much fewer."""
    count = len(seen[0])
    of_runs = [seen[tile_of_query(plan)[row].unique()] for row in group.queries]
    wanted = torch.stack([of_run.any(0) for of_run in of_runs])
    alike = all(bool((of_run == of_run[:1]).all()) for of_run in of_runs)
    most = -(-int(wanted.sum(1).max()) // LINE) * LINE
    if not most and group.keys.shape[1]:
        return group
    places = torch.arange(-(-count // LINE) * LINE).expand(len(wanted), -1)
    if most < _FEW * count:
        # in order, then some that nobody sees
        places = torch.argsort((~wanted).to(torch.uint8), dim=1, stable=True)[:, : max(most, LINE)]
    keys = torch.cat([group.keys, plan.seqlen_k + places], 1)
    return replace(group, tail=places.shape[1], tail_alike=alike, keys=keys)


def tile_of_query(plan: BlockPlan) -> torch.Tensor:
    """Int64 [Sq]: the query tile of each token, 0 for those without; kept in the plan."""
    if "tile of query" not in plan.cache:
        tile = torch.zeros(plan.seqlen_q, dtype=torch.int64)
        used = plan.query_tiles >= 0
        tile[plan.query_tiles[used].long()] = torch.nonzero(used)[:, 0]
        plan.cache["tile of query"] = tile
    return plan.cache["tile of query"]  # type: ignore[return-value]


@lasting
def _groups_of(plan: BlockPlan, head: int) -> list[Group]:
    units = _units(plan, head)
    if not units:
        return []
    runs = [_merged([units[i] for i in chosen], plan.seqlen_k) for chosen in _runs(units, plan.seqlen_k)]
    once, again = _shared(runs, plan.seqlen_k)
    return [_stacked(same, late) for late, some in ((False, once), (True, again)) for same in _alike(some)]


def _alike(runs: list[_Run]) -> list[list[_Run]]:
    """Runs of the same shape together."""
    alike: dict[tuple[int, int, int], list[_Run]] = {}
    for run in runs:
        alike.setdefault((run.queries.numel(), run.keys.numel(), run.whole), []).append(run)
    return list(alike.values())


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


def _runs(units: list[_Unit], seqlen: int) -> list[list[int]]:
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
    found = [(*_cut(rows[order], some[order], every[order]), order) for order in orders]
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


def _cut(rows: torch.Tensor, some: torch.Tensor, every: torch.Tensor) -> tuple[float, list[tuple[int, int]]]:
    """(least cost, runs [first, last)) of merging neighbours in a sequence of units."""
    union, shared = some, every
    costs = []
    for length in range(1, min(_MOST_UNITS, len(rows)) + 1):
        if length > 1:
            union, shared = union[:-1] | some[length - 1 :], shared[:-1] & every[length - 1 :]
        costs.append(_cost(_sums(rows, length), union.sum(1), shared.sum(1), length).tolist())
    return _cheapest(costs)


def _sums(values: torch.Tensor, length: int) -> torch.Tensor:
    """Sums of `length` neighbours."""
    return values.unfold(0, length, 1).sum(1)


def _cheapest(costs: list[list[float]]) -> tuple[float, list[tuple[int, int]]]:
    """(cost, segments [first, last)) of the cheapest way to cut a sequence; costs[n - 1][first] is that of n from first on."""
    count = len(costs[0])
    best, cut = [0.0], [0]
    for last in range(1, count + 1):
        value, first = min((best[last - n] + costs[n - 1][last - n], last - n) for n in range(1, min(len(costs), last) + 1))
        best.append(value)
        cut.append(first)
    segments, last = [], count
    while last:
        segments.append((cut[last], last))
        last = cut[last]
    return best[-1], segments[::-1]


def _cost(rows: torch.Tensor, union: torch.Tensor, shared: torch.Tensor, length: int) -> torch.Tensor:
    """Estimated cost of runs, in scores at the full rate."""
    cost = (rows + _ROWS_OF_KEY) * union + _MASKED * rows * (union - shared) + _CALL
    return cost.masked_fill(rows > _MOST_QUERIES, float("inf")) if length > 1 else cost


def _merged(units: list[_Unit], seqlen: int) -> _Run:
    """One run of units; its keys are sorted where all see them and sorted again where some do."""
    rows = []
    for unit in units:
        seen = torch.zeros(unit.queries.numel(), seqlen, dtype=torch.bool)
        seen[:, unit.whole] = True
        seen[:, unit.ragged] = unit.seen
        rows.append(seen)
    seen = torch.cat(rows)
    every = seen.all(0)
    whole, ragged = torch.nonzero(every).flatten(), torch.nonzero(seen.any(0) & ~every).flatten()
    mask = seen[:, ragged]
    missing = -(whole.numel() + ragged.numel()) % LINE
    if missing and ragged.numel():  # filled up with a key that nobody sees in these places
        ragged, mask = torch.cat([ragged, ragged[-1:].expand(missing)]), torch.nn.functional.pad(mask, (0, missing))
    return _Run(torch.cat([unit.queries for unit in units]), torch.cat([whole, ragged]), whole.numel(), mask)


def _shared(runs: list[_Run], seqlen: int) -> tuple[list[_Run], list[_Run]]:
    """Keys that several neighbours see whole, fetched once for all, beside runs by themselves; and what is left of each."""
    every = torch.zeros(len(runs), seqlen, dtype=torch.bool)
    for row, run in enumerate(runs):
        every[row, run.keys[: run.whole]] = True
    once, again = [], []
    for first, last in _cheapest(_shared_costs(runs, every))[1]:
        some = runs[first:last]
        both = torch.nonzero(every[first:last].all(0)).flatten()
        both = both[: len(both) // LINE * LINE]
        if len(some) == 1 or not len(both):
            once += some
            continue
        once.append(_Run(torch.cat([run.queries for run in some]), both, len(both), torch.empty(0, 0, dtype=torch.bool)))
        again += [left for left in (_without(run, both, seqlen) for run in some) if left.keys.numel()]
    return once, again


def _shared_costs(runs: list[_Run], every: torch.Tensor) -> list[list[float]]:
    """Estimated cost of serving 1, 2, ... neighbours together, for every first one."""
    rows, keys = (torch.tensor([getattr(run, name).numel() for run in runs]) for name in ("queries", "keys"))
    alone, shared = (rows + _ROWS_OF_KEY) * keys, every
    costs = [alone.tolist()]
    for length in range(2, min(_MOST_UNITS, len(runs)) + 1):
        shared = shared[:-1] & every[length - 1 :]
        both, served = shared.sum(1), _sums(rows, length)
        left = _sums(alone, length) - _sums(rows + _ROWS_OF_KEY, length) * both
        cost = left + (served + _ROWS_OF_KEY) * both + _JOIN * served + length * _CALL
        costs.append(cost.masked_fill(served > _MOST_QUERIES, float("inf")).tolist())
    return costs


def _without(run: _Run, keys: torch.Tensor, seqlen: int) -> _Run:
    """A run without some of the keys that all its queries see."""
    kept = torch.ones(seqlen, dtype=torch.bool)
    kept[keys] = False
    whole = run.keys[: run.whole]
    whole = whole[kept[whole]]
    return _Run(run.queries, torch.cat([whole, run.keys[run.whole :]]), len(whole), run.mask)


def _stacked(runs: list[_Run], again: bool) -> Group:
    """Runs of the same shape, those with the same mask beside each other."""
    alike: dict[bytes, list[_Run]] = {}
    for run in runs:
        alike.setdefault(hashlib.blake2b(run.mask.contiguous().numpy().data).digest(), []).append(run)
    ordered = [run for same in alike.values() for run in same]
    queries, keys = (torch.stack([getattr(run, name) for run in ordered]) for name in ("queries", "keys"))
    if not runs[0].mask.numel():
        return Group(queries, keys, runs[0].whole, torch.empty(0, 0, 0, dtype=torch.bool), (), again)
    masks = torch.stack([same[0].mask for same in alike.values()])
    return Group(queries, keys, runs[0].whole, masks, tuple(itertools.accumulate(map(len, alike.values()))), again)
