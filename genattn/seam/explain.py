"""What would happen, before it does: sites, layout, density, predicted work, and which calls will stay dense and why.

The pipeline is called as for real, up to the first forward of its denoiser: prompts are encoded and latents prepared, so the
layout is the true one, and nothing is denoised.
"""

import contextlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from genattn.errors import GenAttnError
from genattn.functional.planned import tile_size
from genattn.geometry.token_layout import TokenLayout
from genattn.layouts.family import Family
from genattn.layouts.site import AttentionSite
from genattn.patterns.dense import DensePattern
from genattn.seam.plugin import Run
from genattn.seam.sites import layout_at
from genattn.seam.sparse_plugin import SparsePlugin


class FirstForward(BaseException):
    """Carries the first run out of a pipeline call; not an Exception, so that no pipeline catches it."""

    def __init__(self, run: Run, family: Family | None, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__("stopped before the first forward")
        self.run, self.family, self.dtype, self.device = run, family, dtype, device


@contextlib.contextmanager
def without_bar(target: Any) -> Iterator[None]:
    """A diffusers pipeline draws no progress bar meanwhile: one that stops before its first step would leave an empty bar."""
    if not hasattr(target, "progress_bar"):  # a bare model, or a modular pipeline, whose blocks have the bars
        yield
        return
    had = getattr(target, "_progress_bar_config", None) or {}
    target.set_progress_bar_config(**{**had, "disable": True})
    try:
        yield
    finally:
        target.set_progress_bar_config(**had)


@dataclass
class SiteForecast:
    """calls: attention calls of one run at this site (one guidance pass). reasons: for the dense ones."""

    site: AttentionSite
    layout: str
    tokens: int
    density: float | None
    sparse: int = 0
    dense: int = 0
    flops: float = 0.0
    flops_dense: float = 0.0
    reasons: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class Explanation:
    """A forecast for one guidance pass of one sampling run. grid: tokens (frames, height, width), None where unknown."""

    sites: list[SiteForecast]
    layout: str
    num_steps: int | None
    notes: tuple[str, ...]
    grid: tuple[int, int, int] | None = None

    @property
    def flops_share(self) -> float | None:
        """Predicted attention FLOPs over dense ones."""
        dense = sum(site.flops_dense for site in self.sites)
        return sum(site.flops for site in self.sites) / dense if dense else None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        rows = [{**vars(site), "site": vars(site.site), "reasons": dict(site.reasons)} for site in self.sites]
        return {
            "layout": self.layout,
            "num_steps": self.num_steps,
            "flops_share": self.flops_share,
            "notes": list(self.notes),
            "sites": rows,
        }

    def to_json(self, indent: int | None = 2) -> str:
        """The same as text."""
        return json.dumps(self.to_dict(), indent=indent)

    def table(self) -> str:
        """The same for a terminal."""
        share = self.flops_share
        lines = [f"tokens: {self.layout}; steps: {self.num_steps if self.num_steps is not None else 'unknown'}"]
        lines.append("nothing would run" if share is None else f"predicted attention FLOPs: {share:.0%} of dense")
        lines += [f"note: {note}" for note in self.notes]
        width = max((len(site.site.name) for site in self.sites), default=4)
        lines.append(f"{'site':{width}}  tokens  sparse  dense  density  dense because")
        for site in self.sites:
            density = "-" if site.density is None else f"{site.density:.3f}"
            why = "; ".join(f"{count} x {reason}" for reason, count in site.reasons.items())
            lines.append(f"{site.site.name:{width}} {site.tokens:7} {site.sparse:7} {site.dense:6}  {density:>7}  {why}")
        return "\n".join(lines)

    __str__ = table


def explain_run(stop: FirstForward, sites: list[AttentionSite], plugin: SparsePlugin, head_dims: dict[str, int]) -> Explanation:
    """The forecast of `plugin` for the run that began with `stop`."""
    run = stop.run
    notes = [run.why_no_layout] if run.why_no_layout else []
    if stop.family is not None and stop.family.note:
        notes.append(stop.family.note)
    if run.num_steps is None:
        notes.append("the number of steps is unknown: give num_steps=...")
    forecasts = [_site_forecast(stop, site, plugin, head_dims.get(site.name, 64)) for site in sites]
    layout = run.layout.describe() if run.layout is not None else "unknown"
    grid = None if run.layout is None or run.layout.grid is None else run.layout.grid3
    return Explanation(forecasts, layout, run.num_steps, tuple(notes), grid)


def _site_forecast(stop: FirstForward, site: AttentionSite, plugin: SparsePlugin, head_dim: int) -> SiteForecast:
    layout = _own_layout(stop, site)
    tokens = layout.seqlen if layout is not None else 0
    blocks = plugin.blocks_of(stop.run.model)
    why, density = site.unreachable, None
    if not why:
        why, density = _density(plugin, site, blocks, layout, stop)
    forecast = SiteForecast(site, layout.describe() if layout is not None else "unknown", tokens, density)
    schedule = plugin.schedule.with_options(stop.run.options_of(plugin))
    full = 4.0 * site.heads * head_dim * tokens * tokens
    for step in range(stop.run.num_steps or 1):
        at = replace(stop.run, step=step)
        reason = why or schedule.why_dense(at, site, tokens, blocks)
        forecast.flops_dense += full
        forecast.flops += full * (1.0 if reason or density is None else density)
        if reason:
            forecast.dense += 1
            forecast.reasons[reason] += 1
        else:
            forecast.sparse += 1
    return forecast


def _own_layout(stop: FirstForward, site: AttentionSite) -> TokenLayout | None:
    whole = stop.run.layout
    if whole is None:
        return None
    if stop.family is not None and stop.family.site_tokens is not None:
        length = stop.family.site_tokens(stop.run.model, site.name, whole)
        return layout_at(site, stop.family, stop.run, length, length)
    lengths = [whole.seqlen]
    if whole.grid is not None:
        frames, height, width = whole.grid3
        lengths += [frames * height * width, height * width]
    if site.kind == "self":
        lengths = lengths[1:] + lengths[:1]
    found = (layout_at(site, stop.family, stop.run, length, length) for length in lengths)
    return next((layout for layout in found if layout is not None), None)


def _density(
    plugin: SparsePlugin, site: AttentionSite, blocks: int, layout: TokenLayout | None, stop: FirstForward
) -> tuple[str, float | None]:
    """(why the site can never run sparse, density of its plan); none for a pattern that looks at the tensors."""
    if isinstance(plugin.pattern, DensePattern):
        return "the pattern is dense", None
    if layout is None:
        return stop.run.why_no_layout or "the layout of this site is known only when it runs", None
    pattern = plugin.pattern.for_layer(site.depth, blocks)
    try:
        pattern.check(layout)
    except GenAttnError as error:
        return f"{type(pattern).__name__} does not serve this layout: {error}", None
    block = tile_size(layout.seqlen, stop.device.type)
    try:
        return "", float(pattern.plan(layout, block, block).density)
    except GenAttnError:
        return "", None
