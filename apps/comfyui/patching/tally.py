"""What became of the attention calls of a patched MODEL, for the Report node: counts, density, seconds, reasons."""

import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from genattn.layouts.site import AttentionSite
from genattn.seam.plugin import AttentionCall, Plugin
from genattn.seam.report import Report, SiteStats, event_pair

_LOG = logging.getLogger("genattn")


class Tally:
    """Counters of one sampler run."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """A new run starts."""
        self.stats: dict[str, SiteStats] = {}
        self.forwards, self.unreached, self.taken_by, self.device = 0, 0, "", "cpu"
        self.missed: set[str] = set()
        self.untold = 0
        self.notes: list[str] = []

    def timed(self, call: AttentionCall, answer: Callable[[], torch.Tensor]) -> torch.Tensor:
        """The answer of one call, counted at its site."""
        events, began = event_pair(call.query), time.perf_counter()
        out = answer()
        seconds = time.perf_counter() - began
        if events is not None:
            events[1].record()
        if call.site.name not in self.stats:
            self.stats[call.site.name] = SiteStats(call.site)
        self.stats[call.site.name].add(call.query, call.key.shape[1], call.record, seconds, events)
        self.device = call.query.device.type
        return out

    def forward_ended(self, calls: int, slot: Any, missed: Sequence[str] = (), untold: bool = False) -> None:
        """A forward is over in which the override saw `calls` calls.

        slot: what stands in ComfyUI's one override slot. missed: blocks whose self-attention somebody else answered.
        untold: whether ComfyUI never said which block runs.
        """
        self.forwards += 1
        known = self.removed
        if not calls:
            self.unreached += 1
        elif untold:
            self.untold += 1
        elif missed:
            self.missed.update(missed)
        if (self.unreached or self.untold or self.missed) and not known:
            self.taken_by = _name_of(slot)
            _LOG.warning("%s", self.removed)

    @property
    def removed(self) -> str:
        """What to tell when another node answers in our place; empty while ours is reached."""
        if self.unreached:
            return (
                f"NOT APPLIED in {self.unreached} of {self.forwards} forwards: a node after GenAttn's set the attention "
                f"override to {self.taken_by}, which does not hand on to it; put the GenAttn nodes after that node"
            )
        if self.untold:
            return (
                f"NOT APPLIED in {self.untold} of {self.forwards} forwards: this ComfyUI does not say which block of the model "
                "runs; update ComfyUI"
            )
        if self.missed:
            return (
                f"{self.taken_by} answered the self-attention of {len(self.missed)} blocks before GenAttn "
                f"({', '.join(sorted(self.missed)[:3])}{', ...' if len(self.missed) > 3 else ''}); "
                "switch that node off, or keep those calls from it"
            )
        return ""

    def report(self, plugins: Sequence[Plugin], sites: Sequence[AttentionSite]) -> Report:
        """The counters as the diffusers route reports them."""
        acting = [site for site in sites if any(plugin.wants(site) for plugin in plugins)]
        rows = [self.stats.get(site.name, SiteStats(site)).row() for site in acting]
        return Report(
            plugins=[plugin.describe() for plugin in plugins],
            sites=rows,
            forwards=self.forwards,
            runs=int(self.forwards > 0),
            flops=sum(s.flops for s in self.stats.values()),
            flops_dense=sum(s.flops_dense for s in self.stats.values()),
            device=self.device,
            notes=list(self.notes),
        )


def _name_of(slot: Any) -> str:
    if slot is None:
        return "nothing"
    named = slot if hasattr(slot, "__qualname__") else type(slot)
    # ComfyUI names the modules of custom nodes by their whole path
    return f"{Path(named.__module__).name}.{named.__qualname__}"
