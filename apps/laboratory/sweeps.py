"""Quality against dense attention on a small trained model, where the papers have theirs on large ones.

    steps      Radial with 0, 4, 8, 12 of 50 steps dense          (Radial's table B)
    layers     Radial with 0, 1, 2, 3 layers dense                (Radial's table on dense layers)
    windows    neighborhood attention by window and stride, Radial and a frame window of like density beside it
    error      what one attention call changes, per pattern, and how attention falls with distance in frames

    python -m genattn.apps.laboratory.sweeps steps --count 6

Rows go to assets/bench/sweep_NAME.csv. 95 % intervals over held-out captions, all from the same noise. Nearness and density
alone: what a call takes is measured by `genattn bench attention`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import typer

import genattn
from genattn.apps.sampling.compare import compare
from genattn.apps.sampling.measured_rows import append_rows, provenance
from genattn.apps.sampling.run import AttentionSettings, SamplingSettings, call_arguments, open_pipeline
from genattn.errors import GenAttnError
from genattn.fingerprint import model_fingerprint
from genattn.functional.planned import plan_for, planned_attention
from genattn.layouts.site import AttentionSite
from genattn.patterns.neighborhood import NeighborhoodPattern
from genattn.patterns.pattern import Pattern
from genattn.patterns.radial import RadialPattern
from genattn.pipelines.tiny.world import caption, sample_scene
from genattn.seam.plugin import AttentionCall, Inner, Plugin

FOLDER = Path("assets/bench")
SPARSE_RADIAL = RadialPattern(decay=0.1, floor=0)
WINDOWS: tuple[tuple[int, int, int], ...] = ((4, 8, 8), (8, 4, 4), (6, 6, 6), (4, 4, 4))
COSTS = ("seconds", "speedup", "peak_memory")
Sweep = Literal["steps", "layers", "windows"]


def attentions(sweep: Sweep) -> dict[str, AttentionSettings]:
    """What a sweep compares with dense, by name. 8 frames of 8 x 8 tokens are assumed."""
    if sweep == "steps":
        return {f"{n}": AttentionSettings(f"{n}", SPARSE_RADIAL, n / 50) for n in (0, 4, 8, 12)}
    if sweep == "layers":
        return {f"{n}": AttentionSettings(f"{n}", SPARSE_RADIAL, 0.25, n) for n in (0, 1, 2, 3)}
    found: dict[str, AttentionSettings] = {}
    for window in WINDOWS:
        strides = {"1": (1, 1, 1), "2": (2, 2, 2), "window": window}
        for label, stride in strides.items():
            name = f"{'x'.join(map(str, window))} stride {label}"
            found[name] = AttentionSettings(name, NeighborhoodPattern(window, stride))
    return found | {"radial": AttentionSettings("radial", SPARSE_RADIAL)}


def captions(count: int) -> list[str]:
    """Held-out captions with one object."""
    return [caption(sample_scene(20_000 + seed, held_out=True, two_objects=0.0)) for seed in range(count)]


class CallError(Plugin):
    """Lets every call through and notes what each pattern would have changed, and where attention goes.

    errors: pattern -> relative squared error of every call. by_distance: float64 [F], attention by frames apart, summed.
    """

    def __init__(self, patterns: dict[str, Pattern]) -> None:
        self.patterns = patterns
        self.errors: dict[str, list[float]] = {name: [] for name in patterns}
        self.density: dict[str, float] = {}
        self.by_distance: list[np.ndarray] = []

    def wants(self, site: AttentionSite) -> bool:
        """Self-attention over the grid."""
        return site.kind in ("self", "joint")

    def attention(self, call: AttentionCall, inner: Inner) -> torch.Tensor:
        """The dense answer."""
        out = inner(call)
        if call.layout is None or call.layout.grid is None:
            raise GenAttnError(f"the sweep needs a model whose token grid is known, got none at {call.site.name}")
        for name, pattern in self.patterns.items():
            plan = plan_for(call.query, call.key, pattern, call.layout, scale=call.scale)
            sparse = planned_attention(call.query, call.key, call.value, plan, scale=call.scale)
            assert isinstance(sparse, torch.Tensor)
            self.errors[name].append(float((sparse - out).square().sum() / out.square().sum()))
            self.density[name] = plan.density
        if call.site.depth > 0:
            self.by_distance.append(_by_distance(call.query, call.key, call.layout.grid3[0], call.scale))
        return out


def _by_distance(query: torch.Tensor, key: torch.Tensor, frames: int, scale: float | None) -> np.ndarray:
    """Mean attention of one query on one frame, by frames apart: float64 [F]."""
    scores = torch.einsum("bqhd,bkhd->bhqk", query.float(), key.float()) * (scale or query.shape[-1] ** -0.5)
    rows = scores.softmax(-1).unflatten(-1, (frames, -1)).sum(-1).unflatten(2, (frames, -1)).mean((0, 1, 3))
    apart = (torch.arange(frames)[:, None] - torch.arange(frames)).abs()
    return np.array([float(rows[apart == d].mean()) for d in range(frames)])


def error_rows(model: str | None, count: int, steps: int) -> list[dict[str, Any]]:
    """A row per pattern with the spread over calls, then a row per distance in frames with the spread over calls."""
    settings = SamplingSettings(model, steps=steps)
    pipe = open_pipeline(settings)
    pipe.set_progress_bar_config(disable=True)
    window, tile = NeighborhoodPattern((4, 8, 8)), NeighborhoodPattern((6, 6, 6), (2, 2, 2))
    plugin = CallError({"radial": SPARSE_RADIAL, "frame window 4x8x8": window, "window 6x6x6 stride 2": tile})
    with genattn.apply(pipe, plugin):
        for seed, text in enumerate(captions(count)):
            noise = torch.Generator().manual_seed(seed)
            pipe(**call_arguments(pipe, settings), prompt=text, generator=noise, output_type="latent")
    rows: list[dict[str, Any]] = []
    for name, errors in plugin.errors.items():
        found = {"error": float(np.mean(errors)), "low": np.quantile(errors, 0.25), "high": np.quantile(errors, 0.75)}
        rows.append({"kind": "pattern", "name": name, "density": plugin.density[name], **found, "calls": len(errors)})
    spread = np.stack(plugin.by_distance)
    for apart in range(spread.shape[1]):
        low, high = np.quantile(spread[:, apart], (0.25, 0.75))
        found = {"error": float(spread[:, apart].mean()), "low": low, "high": high}
        rows.append({"kind": "frames apart", "name": str(apart), "density": "", **found, "calls": len(spread)})
    return rows


def fingerprint(model: str | None) -> str:
    """Of the denoiser's weights, so that rows of other weights are told apart."""
    pipe = open_pipeline(SamplingSettings(model))
    return model_fingerprint({"transformer": pipe.transformer})


def newest(rows: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    """The rows of the last run: those that share date, commit and weights with the last one."""
    marks = ("date", "commit", "weights")
    return [row for row in rows if all(row.get(m) == rows[-1].get(m) for m in marks)]


def main(
    sweep: Annotated[str, typer.Argument(help="steps, layers, windows or error.")],
    model: Annotated[str | None, typer.Option(help="Folder of a tiny video pipeline; default: the shipped one.")] = None,
    count: Annotated[int, typer.Option(help="Held-out captions.")] = 6,
    steps: Annotated[int | None, typer.Option(help="Denoising steps; default: 50 for steps, else 12.")] = None,
    table: Annotated[Path | None, typer.Option(help="The file to add to.")] = None,
) -> None:
    """Run one sweep and append its rows."""
    if sweep not in ("steps", "layers", "windows", "error"):
        raise GenAttnError(f"the sweep must be steps, layers, windows or error, got {sweep!r}")
    steps = steps or (50 if sweep == "steps" else 12)
    mark = {"sweep": sweep, "weights": fingerprint(model)}
    if sweep == "error":
        rows = [mark | {"captions": count} | row | provenance("cpu") for row in error_rows(model, count, steps)]
    else:
        chosen = list(attentions(sweep).values())  # type: ignore[arg-type]
        found = compare(captions(count), chosen, SamplingSettings(model, steps=steps, device="cpu"))
        rows = [mark | {name: value for name, value in row.items() if not name.startswith(COSTS)} for row in found]
    append_rows(table or FOLDER / f"sweep_{sweep}.csv", rows)
    for row in rows:
        print({name: row[name] for name in ("attention", "name", "density", "psnr", "error") if name in row}, flush=True)


if __name__ == "__main__":
    typer.run(main)
