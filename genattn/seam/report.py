"""What was done: per site how often the attention ran sparse or dense, why dense, at what density, in what time."""

import json
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from genattn.layouts.site import AttentionSite
from genattn.seam.plugin import CallRecord


class GenAttnWarning(UserWarning):
    """Something that was asked for did not happen, or not as named."""


@dataclass
class SiteStats:
    """Counters of one site. seconds: time inside the attention call, on CUDA measured with events and summed when read."""

    site: AttentionSite
    calls: int = 0
    sparse: int = 0
    edited: int = 0
    density: float = 0.0
    seconds: float = 0.0
    tokens: int = 0
    flops_dense: float = 0.0
    flops: float = 0.0
    reasons: Counter[str] = field(default_factory=Counter)
    tails: Counter[str] = field(default_factory=Counter)
    _events: deque[tuple[Any, Any]] = field(default_factory=deque, repr=False)

    def add(self, query: torch.Tensor, keys: int, record: CallRecord, seconds: float, events: tuple[Any, Any] | None) -> None:
        """One finished call: query [B, Sq, H, D] on `keys` keys."""
        batch, queries, heads, dim = query.shape
        full = 4.0 * batch * heads * dim * queries * keys
        self.calls += 1
        self.tokens = queries
        self.flops_dense += full
        self.flops += full * (record.density if record.sparse else 1.0)
        self.edited += record.edited
        if record.sparse:
            self.sparse += 1
            self.density += record.density
            self.tails[record.tail or "none"] += 1
        elif record.reason:
            self.reasons[record.reason] += 1
        if events is None:
            self.seconds += seconds
        else:
            self._events.append(events)
            self._settle(lambda end: end.query())  # those that are done; nothing waits, and a server's do not pile up

    def settle(self) -> None:
        """Add up the CUDA events that wait."""
        self._settle(lambda end: end.synchronize() or True)

    def _settle(self, is_done: Callable[[Any], bool]) -> None:
        while self._events and is_done(self._events[0][1]):
            begin, end = self._events.popleft()
            self.seconds += begin.elapsed_time(end) / 1000

    def row(self) -> dict[str, Any]:
        """JSON-ready."""
        self.settle()
        return {
            "model": self.site.model,
            "site": self.site.name,
            "kind": self.site.kind,
            "depth": self.site.depth,
            "tokens": self.tokens,
            "calls": self.calls,
            "sparse": self.sparse,
            "dense": self.calls - self.sparse,
            "density": self.density / self.sparse if self.sparse else None,
            "tail": "/".join(sorted(self.tails)) if self.tails else None,
            "seconds": self.seconds,
            "dense_reasons": dict(self.reasons),
        }


@dataclass(frozen=True)
class Report:
    """The counters of a handle at one moment."""

    plugins: list[dict[str, Any]]
    sites: list[dict[str, Any]]
    forwards: int
    runs: int
    flops: float
    flops_dense: float
    device: str
    notes: list[str] = field(default_factory=list)  # what was asked for and did not happen

    @property
    def calls(self) -> int:
        """Attention calls at the plugins' sites."""
        return sum(row["calls"] for row in self.sites)

    @property
    def sparse_calls(self) -> int:
        """Those that ran under a pattern."""
        return sum(row["sparse"] for row in self.sites)

    @property
    def density(self) -> float | None:
        """Mean density of the sparse calls; None when there were none."""
        weights = [(row["density"], row["sparse"]) for row in self.sites if row["sparse"]]
        return sum(d * n for d, n in weights) / sum(n for _, n in weights) if weights else None

    @property
    def dense_reasons(self) -> dict[str, int]:
        """Every reason for a dense call, over all sites, most frequent first."""
        total: Counter[str] = Counter()
        for row in self.sites:
            total.update(row["dense_reasons"])
        return dict(total.most_common())

    @property
    def verdict(self) -> str:
        """One line that cannot be misread."""
        if not self.forwards and not self.calls:  # a decoder is entered by its decode()
            return "NOT APPLIED YET: no forward of the denoiser since apply()"
        if not self.calls:
            return (
                f"NOT APPLIED: {self.forwards} forwards of the denoiser, and none of the selected attention sites was reached"
            )
        if not any(p.get("pattern") for p in self.plugins):
            return f"{self.calls} attention calls at {sum(bool(r['calls']) for r in self.sites)} sites"
        if not self.sparse_calls:
            return f"DENSE THROUGHOUT: 0 of {self.calls} attention calls ran sparse"
        share = self.flops / self.flops_dense
        return (
            f"{self.sparse_calls} of {self.calls} attention calls ran sparse; {share:.0%} of the dense attention FLOPs computed"
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "verdict": self.verdict,
            "forwards": self.forwards,
            "runs": self.runs,
            "calls": self.calls,
            "sparse_calls": self.sparse_calls,
            "density": self.density,
            "flops": self.flops,
            "flops_dense": self.flops_dense,
            "dense_reasons": self.dense_reasons,
            "device": self.device,
            "notes": self.notes,
            "plugins": self.plugins,
            "sites": self.sites,
        }

    def to_json(self, indent: int | None = 2) -> str:
        """The same as text."""
        return json.dumps(self.to_dict(), indent=indent)

    def table(self) -> str:
        """The same for a terminal."""
        lines = [self.verdict]
        lines += [f"  {plugin['preset']}" for plugin in self.plugins if plugin.get("preset")]
        lines += [f"  {note}" for note in self.notes]
        lines += [f"  dense {count:4} x  {reason}" for reason, count in self.dense_reasons.items()]
        width = max((len(_place(row)) for row in self.sites), default=4)
        lines.append(f"{'site':{width}}  kind      tokens  calls  sparse  density  tail   seconds")
        for row in self.sites:
            density = "-" if row["density"] is None else f"{row['density']:.3f}"
            lines.append(
                f"{_place(row):{width}}  {row['kind']:8} {row['tokens']:7} {row['calls']:6} {row['sparse']:7}  {density:>7}"
                f"  {row['tail'] or '-':5}  {row['seconds']:7.3f}"
            )
        return "\n".join(lines)

    __str__ = table


def _place(row: dict[str, Any]) -> str:
    return f"{row['model']}.{row['site']}" if row["model"] else str(row["site"])


def event_pair(tensor: torch.Tensor) -> tuple[Any, Any] | None:
    """Two CUDA events with the first recorded, None on other devices."""
    if not tensor.is_cuda or torch.cuda.is_current_stream_capturing():
        return None
    pair = (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
    pair[0].record()
    return pair
