"""Greedy search for heads worth perturbing: the bookkeeping of HeadHunter, with no model in it.

    S = {}; repeat R times: score S + {c} for every head c left in the pool; move the best k from the pool to S

(arXiv 2506.10978, algorithm 1.) On top of it: several objectives at once, as mean z-scores against the unguided result
on the same prompt and seed, with floors; successive halving (few prompts for many heads, all prompts for the best); a
cheap probe that picks who gets the full check; a held-out check with a bootstrap interval; the weight u tuned last.

Everything is decided by the scores of `Trial`s, which a caller provides. The same scores give the same answer, so a
search is resumed by replaying the scores it has.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from genattn.errors import GenAttnError
from genattn.guidance.heads.names import Head, check_weight, head_name

TrialKind = Literal["full", "probe"]
Scores = dict[str, float]


@dataclass(frozen=True)
class Trial:
    """One picture to make and judge.

    Attributes:
        heads: sorted heads to perturb; none for the unguided picture.
        prompt: index of the prompt (and its seed).
        kind: a full generation, or the cheap probe.
        u: weight of the heads, None for the search's own.
        base: for the probe, the heads chosen so far: the trajectory that all candidates of a round share.
    """

    heads: tuple[Head, ...]
    prompt: int
    kind: TrialKind = "full"
    u: float | None = None
    base: tuple[Head, ...] = ()

    @property
    def key(self) -> str:
        """A name that is unique within a search."""
        names = "+".join(head_name(head) for head in self.heads) or "none"
        base = "on " + "+".join(head_name(head) for head in self.base) if self.base else ""
        return "/".join(
            part for part in (self.kind, str(self.prompt), names, base, "" if self.u is None else f"u={self.u:g}") if part
        )


ScoresOf = Callable[[Sequence[Trial]], Sequence[Scores]]


@dataclass(frozen=True)
class SearchSettings:
    """What to search for, and how thoroughly.

    Attributes:
        objectives: {name: weight of its z-score}, weights finite and not zero.
        prompts: number of prompts that decide, >= 1; indices 0 to prompts - 1.
        held_out: number of prompts of the last check, >= 0; indices from `prompts` on.
        rounds: R >= 1.
        top_k: heads added per round, >= 1.
        floors: {objective: least mean score}; heads below are passed over.
        halving: factor by which candidates fall and prompts grow, >= 2; 1 for none.
        probe_keep: heads that the probe leaves to the full check, 0 to trust the probe alone; None for no probe.
        u_grid: weights to try on the final set, each in [0, 1]; none to keep the search's own.
        patience: end after this many rounds in a row whose set did not beat the best one, 0 to do all rounds.
        returned: "best", the set of the round that scored best, or "all", the heads of all rounds as algorithm 1 of the
            paper returns them, also where the later ones cost score.
    """

    objectives: Mapping[str, float]
    prompts: int
    held_out: int = 0
    rounds: int = 1
    top_k: int = 3
    floors: Mapping[str, float] = field(default_factory=dict)
    halving: int = 1
    probe_keep: int | None = None
    u_grid: tuple[float, ...] = ()
    patience: int = 0
    returned: str = "best"

    def __post_init__(self) -> None:
        if not self.objectives or not all(math.isfinite(w) and w for w in self.objectives.values()):
            raise GenAttnError(
                f"objectives must have finite weights other than 0, got {dict(self.objectives)}; name at least one"
            )
        for name in ("prompts", "rounds", "top_k", "halving"):
            if getattr(self, name) < 1:
                raise GenAttnError(f"{name} must be >= 1, got {getattr(self, name)}; raise it")
        if self.held_out < 0 or self.patience < 0 or (self.probe_keep or 0) < 0:
            raise GenAttnError(
                f"held_out, patience and probe_keep must be >= 0, got {self.held_out}, {self.patience}, {self.probe_keep}"
            )
        unknown = sorted(set(self.floors) - set(self.objectives))
        if unknown:
            raise GenAttnError(
                f"a floor needs an objective of the same name, got {unknown}; known are {sorted(self.objectives)}"
            )
        for u in self.u_grid:
            check_weight("u_grid", u)
        if self.returned not in ("best", "all"):
            raise GenAttnError(f"returned must be 'best' or 'all', got {self.returned!r}; choose one of those")

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; two searches with the same dict may share scores."""
        return {
            name: dict(value) if isinstance(value, Mapping) else list(value) if isinstance(value, tuple) else value
            for name, value in ((name, getattr(self, name)) for name in self.__dataclass_fields__)
        }

    def rungs(self, candidates: int) -> list[tuple[int, int]]:
        """(prompts, candidates to keep) of each stage of a round; the last one uses all prompts."""
        sizes = [self.prompts]
        while self.halving > 1 and sizes[0] > 1 and candidates > 2 * self.top_k * self.halving ** (len(sizes) - 1):
            sizes.insert(0, math.ceil(sizes[0] / self.halving))
        kept, rungs = candidates, []
        for size in sizes[:-1]:
            kept = max(self.top_k, math.ceil(kept / self.halving))
            rungs.append((size, kept))
        return [*rungs, (self.prompts, self.top_k)]

    def trials(self, pool: int) -> dict[str, int]:
        """How many pictures of each kind a search of a pool of this size makes at most, beside those of the unguided."""
        count = {"full": self.prompts + 2 * self.held_out + len(self.u_grid) * self.prompts, "probe": 0}
        for done in range(self.rounds):
            left = pool - done * self.top_k
            if left < self.top_k:
                break
            if self.probe_keep is not None:
                count["probe"] += (left + (done == 0)) * self.prompts
                left = min(left, self.probe_keep)
            seen = 0
            for size, kept in self.rungs(left) if left else []:
                count["full"] += left * (size - seen)
                left, seen = kept, size
            count["full"] += self.prompts
        return count


@dataclass(frozen=True)
class Round:
    """What a round found.

    Attributes:
        added: the heads that joined, best first.
        scores: combined score of every candidate, from the most prompts that it was given, None below a floor; with a
            probe, the probe's.
        total: combined score of the whole set after the round.
        means: mean of every objective for the whole set.
    """

    added: tuple[Head, ...]
    scores: dict[Head, float | None]
    total: float
    means: Scores


@dataclass(frozen=True)
class HeldOut:
    """The final set on prompts that did not decide: mean gain over the unguided pictures per objective.

    `low` and `high` bound the mean at 95 %, by bootstrap over the prompts.
    """

    gain: Scores
    low: Scores
    high: Scores


@dataclass(frozen=True)
class SearchResult:
    """The heads found, in the order of discovery, and how.

    `heads` is the best set of all rounds, or with `returned="all"` that of all rounds together. `u` is the tuned weight,
    None when it was not tuned. `stopped` says why the search ended.
    """

    heads: tuple[Head, ...]
    rounds: tuple[Round, ...]
    baseline: Scores
    u: float | None
    held_out: HeldOut | None
    stopped: str


class HeadSearch:
    """One greedy search.

    Args:
        settings: what to search for.
        pool: heads to choose from, at least `top_k`.
        scores_of: gives the scores of trials, in order; asked in batches, never twice for one trial.
    """

    def __init__(self, settings: SearchSettings, pool: Sequence[Head], scores_of: ScoresOf) -> None:
        if len(set(pool)) < settings.top_k:
            raise GenAttnError(f"the pool must hold at least top_k={settings.top_k} heads, got {len(set(pool))}; widen it")
        self.settings, self.pool, self.scores_of = settings, sorted(set(pool)), scores_of
        self.known: dict[Trial, Scores] = {}
        self._base: tuple[Head, ...] = ()

    def run(self) -> SearchResult:
        """Search to the end."""
        settings, chosen, rounds, pool = self.settings, list[Head](), list[Round](), list(self.pool)
        stopped, without_gain, best = f"all {settings.rounds} rounds done", 0, -1
        for _ in range(settings.rounds):
            if len(pool) < settings.top_k:
                stopped = f"only {len(pool)} heads left in the pool"
                break
            done = self._round(chosen, pool)
            if not done.added:
                stopped = "no head left above the floors"
                break
            rounds.append(done)
            chosen += done.added
            pool = [head for head in pool if head not in done.added]
            without_gain = 0 if best < 0 or done.total > rounds[best].total else without_gain + 1
            best = len(rounds) - 1 if without_gain == 0 else best
            if settings.patience and without_gain >= settings.patience:
                stopped = f"{without_gain} rounds without gain"
                break
        kept = rounds if settings.returned == "all" else rounds[: best + 1]
        heads = tuple(head for done in kept for head in done.added)
        u = self._tune(heads) if heads and settings.u_grid else None
        baseline = self._means((), range(settings.prompts), "full")
        return SearchResult(heads, tuple(rounds), baseline, u, self._held_out(heads, u), stopped)

    def _round(self, chosen: list[Head], pool: list[Head]) -> Round:
        settings, left, scores = self.settings, list(pool), dict[Head, float | None]()
        self._base = tuple(sorted(chosen))
        if settings.probe_keep is not None:
            scores = self._combined(chosen, left, range(settings.prompts), "probe")
            left = _best(scores, settings.probe_keep or settings.top_k)
        if settings.probe_keep != 0:
            for size, keep in settings.rungs(len(left)) if left else []:
                stage = self._combined(chosen, left, range(size), "full")
                # a probe's scores stand alone: they are no estimate of the full ones' size, only of their order
                scores = scores if settings.probe_keep is not None else {**scores, **stage}
                left = _best(stage, keep)
        added = tuple(left[: settings.top_k])
        total = tuple(sorted((*chosen, *added)))
        combined = self._gain(total, range(settings.prompts), "full") if added else -math.inf
        return Round(added, scores, combined, self._means(total, range(settings.prompts), "full") if added else {})

    def _combined(self, chosen: list[Head], heads: list[Head], prompts: range, kind: TrialKind) -> dict[Head, float | None]:
        """Combined score of each candidate set, None below a floor."""
        sets = [tuple(sorted((*chosen, head))) for head in heads]
        self._ask([self._trial(heads_, p, kind) for p in prompts for heads_ in [(), *sets]])
        found: dict[Head, float | None] = {}
        for head, heads_ in zip(heads, sets, strict=True):
            means = self._means(heads_, prompts, kind)
            # the probe's blurred pictures say nothing of an absolute level
            below = kind == "full" and any(means[name] < floor for name, floor in self.settings.floors.items())
            found[head] = None if below else self._gain(heads_, prompts, kind)
        return found

    def _gain(self, heads: tuple[Head, ...], prompts: range, kind: TrialKind, u: float | None = None) -> float:
        """Weighted sum over the objectives of the mean z-score against the unguided pictures."""
        plain = self._table((), prompts, kind)
        guided = self._table(heads, prompts, kind, u)
        spread = self._spread(kind)
        return sum(
            weight * float(np.mean(guided[name] - plain[name])) / spread[name]
            for name, weight in self.settings.objectives.items()
        )

    def _spread(self, kind: TrialKind) -> Scores:
        """What a z-score counts in: the standard deviation of the unguided pictures over the prompts."""
        plain = self._table((), range(self.settings.prompts), kind)
        spread = {name: float(np.std(values, ddof=1)) if len(values) > 1 else 0.0 for name, values in plain.items()}
        # with one prompt, or all alike, nothing says how much is much
        return {name: value if value > 1e-9 else 1.0 for name, value in spread.items()}

    def _tune(self, heads: tuple[Head, ...]) -> float:
        ordered, prompts = tuple(sorted(heads)), range(self.settings.prompts)
        self._ask([Trial(ordered, p, "full", u) for u in self.settings.u_grid for p in prompts])
        return max(self.settings.u_grid, key=lambda u: (self._gain(ordered, prompts, "full", u), -u))

    def _held_out(self, heads: tuple[Head, ...], u: float | None) -> HeldOut | None:
        prompts = range(self.settings.prompts, self.settings.prompts + self.settings.held_out)
        if not heads or not prompts:
            return None
        plain, guided = self._table((), prompts, "full"), self._table(tuple(sorted(heads)), prompts, "full", u)
        gains = {name: guided[name] - plain[name] for name in self.settings.objectives}
        bounds = {name: bootstrap_interval(values) for name, values in gains.items()}
        return HeldOut(
            {name: float(values.mean()) for name, values in gains.items()},
            {name: bound[0] for name, bound in bounds.items()},
            {name: bound[1] for name, bound in bounds.items()},
        )

    def _means(self, heads: tuple[Head, ...], prompts: range, kind: TrialKind) -> Scores:
        return {name: float(values.mean()) for name, values in self._table(heads, prompts, kind).items()}

    def _table(self, heads: tuple[Head, ...], prompts: range, kind: TrialKind, u: float | None = None) -> dict[str, np.ndarray]:
        trials = [self._trial(heads, p, kind, u) for p in prompts]
        self._ask(trials)
        return {name: np.array([self.known[t][name] for t in trials]) for name in self.settings.objectives}

    def _trial(self, heads: tuple[Head, ...], prompt: int, kind: TrialKind, u: float | None = None) -> Trial:
        return Trial(heads, prompt, kind, u, self._base if heads and kind == "probe" else ())

    def _ask(self, trials: Sequence[Trial]) -> None:
        new = list(dict.fromkeys(t for t in trials if t not in self.known))
        if not new:
            return
        found = self.scores_of(new)
        if len(found) != len(new):
            raise GenAttnError(f"every trial must get its scores, got {len(found)} for {len(new)}; check the evaluation")
        for trial, scores in zip(new, found, strict=True):
            bad = [name for name in self.settings.objectives if not math.isfinite(scores.get(name, math.nan))]
            if bad:
                raise GenAttnError(f"every objective must give a finite score, got none for {bad} in {trial.key}; check it")
            self.known[trial] = dict(scores)


def bootstrap_interval(values: Sequence[float] | np.ndarray, draws: int = 10_000, seed: int = 0) -> tuple[float, float]:
    """Bounds of the mean at 95 %, by drawing the values with replacement."""
    numbers = np.asarray(values, np.float64)
    picks = np.random.default_rng(seed).integers(len(numbers), size=(draws, len(numbers)))
    low, high = np.quantile(numbers[picks].mean(1), [0.025, 0.975])
    return float(low), float(high)


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Spearman's rank correlation in [-1, 1], ties sharing their mean rank; NaN if either is constant."""
    ranks = [_ranks(np.asarray(values, np.float64)) for values in (first, second)]
    if any(rank.std() == 0 for rank in ranks):
        return math.nan
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return (ends - (counts - 1) / 2)[inverse]


def _best(scores: Mapping[Head, float | None], count: int) -> list[Head]:
    """The best heads that passed the floors, the lower name first among equals."""
    passed = [(-score, head) for head, score in scores.items() if score is not None]
    return [head for _, head in sorted(passed)[:count]]
