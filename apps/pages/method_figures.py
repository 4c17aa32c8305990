"""The pictures of docs/: each method's idea, drawn from the code that runs, not by hand.

    python -m genattn.apps.pages.method_figures              writes assets/figures/idea_*.png

Inputs are small made-up maps and noise with a fixed seed, and say so; nothing here is a measurement.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

FIGURES = Path(__file__).resolve().parents[2] / "assets" / "figures"


def _figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _map(axes: Any, values: Any, title: str, colours: str = "Blues", **limits: float) -> Any:
    picture = axes.imshow(np.array(values.tolist()), cmap=colours, interpolation="nearest", **limits)
    axes.set_title(title, fontsize=9)
    axes.set(xticks=[], yticks=[])
    return picture


def _local_map(tokens: int, reach: float) -> torch.Tensor:
    """A made-up attention map [S, S] that prefers near keys."""
    place = torch.arange(tokens)
    noise = torch.rand(tokens, tokens, generator=torch.Generator().manual_seed(0))
    return torch.softmax(-((place[:, None] - place[None]) / reach).square() + 1.5 * noise, dim=-1)


def softpag() -> Any:
    """A map on its way to the identity, and the prediction pushed away from what that gives."""
    figure = _figure(10, 2.6)
    axes = figure.subplots(1, 4, gridspec_kw={"width_ratios": [1, 1, 1, 1.7]})
    clean = _local_map(16, 4.0)
    for slot, u in zip(axes, (0.0, 0.5, 1.0)):
        _map(slot, torch.lerp(clean, torch.eye(16), u), f"head's map, u = {u:g}", vmin=0, vmax=0.5)
        slot.set_xlabel("key", fontsize=8)
    axes[0].set_ylabel("query", fontsize=8)
    last = axes[3]
    perturbed, prediction = np.array([0.25, 0.15]), np.array([0.45, 0.45])
    guided = prediction + 1.2 * (prediction - perturbed)
    for name, point, colour in (("perturbed", perturbed, "C3"), ("clean", prediction, "C0"), ("guided", guided, "C2")):
        last.plot(*point, "o", color=colour)
        last.annotate(name, point, textcoords="offset points", xytext=(8, -4), fontsize=9, color=colour)
    last.annotate("", guided, prediction, arrowprops={"arrowstyle": "->", "color": "C2"})
    last.annotate("", prediction, perturbed, arrowprops={"arrowstyle": "->", "color": "0.6", "linestyle": "--"})
    last.set_title("prediction + w (clean - perturbed)", fontsize=9)
    last.set(xlim=(0.1, 1.0), ylim=(0, 0.95), xticks=[], yticks=[])
    return figure


def headhunter() -> Any:
    """Rounds of the greedy search over made-up scores: what is tried, what joins."""
    generator = np.random.default_rng(3)
    scores = generator.normal(0, 1, (6, 8)) + np.linspace(-0.6, 0.9, 6)[:, None]
    figure = _figure(10, 2.8)
    chosen: list[tuple[int, int]] = []
    for i, slot in enumerate(figure.subplots(1, 3)):
        left = scores + generator.normal(0, 0.25, scores.shape) * i
        for place in chosen:
            left[place] = np.nan
        best = np.argsort(np.where(np.isnan(left), -np.inf, left), axis=None)[::-1][:2]
        _map(slot, left, f"round {i + 1}: each head tried with the {len(chosen)} chosen", "RdYlGn", vmin=-2, vmax=2)
        for layer, head in chosen:
            slot.text(head, layer, "in", ha="center", va="center", fontsize=7)
        new = [tuple(int(n) for n in np.unravel_index(at, scores.shape)) for at in best]
        for layer, head in new:
            slot.add_patch(_frame(head, layer))
        chosen += new  # type: ignore[arg-type]
        slot.set_xlabel("head", fontsize=8)
        slot.set_ylabel("layer" if i == 0 else "", fontsize=8)
    figure.suptitle("the best two of each round join (framed); scores here are made up", fontsize=9)
    return figure


def _frame(x: int, y: int) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((x - 0.5, y - 0.5), 1, 1, fill=False, edgecolor="black", linewidth=2)


def broadway() -> Any:
    """One map of frames through the two steps, by the functions that edit real ones."""
    from genattn.guidance.broadway.temporal_map import band_projection, energy

    figure = _figure(10, 2.6)
    axes = figure.subplots(1, 4)
    anchor, rows = _local_map(16, 2.0), _local_map(16, 6.0)
    guided = torch.lerp(rows, anchor, 0.6)
    high = guided @ band_projection(16, 7.0).to(guided.dtype)
    enhanced = guided + 0.5 * high
    named = (("A, a guided block", rows), ("A2, drawn to the anchor's map", guided), ("A3, band enhanced", enhanced))
    for slot, (name, values) in zip((axes[0], axes[1], axes[3]), named):
        _map(slot, values, f"{name}\nenergy {float(energy(values).mean()):.3f}", vmin=0, vmax=0.4)
    _map(axes[2], high, "high(A2)\nthe band near Nyquist", "RdBu_r", vmin=-0.2, vmax=0.2)
    axes[0].set_ylabel("query frame", fontsize=8)
    axes[0].set_xlabel("key frame", fontsize=8)
    return figure


def long_video() -> Any:
    """The queue over ticks: every latent one level cleaner each tick, one leaves, one enters."""
    figure = _figure(10, 2.9)
    left, right = figure.subplots(1, 2, gridspec_kw={"width_ratios": [2.2, 1]})
    levels, ticks = 12, 6
    grid = np.full((ticks, levels + ticks), np.nan)
    for tick in range(ticks):
        grid[tick, tick : tick + levels] = np.linspace(1 / levels, 1, levels)
        grid[tick, :tick] = 0
    picture = _map(left, grid, "queue: one denoising step a tick for all, the cleanest leaves, noise enters", "viridis")
    for tick in range(ticks):
        for position in range(tick):
            left.text(position, tick, "out", ha="center", va="center", fontsize=6, color="white")
    for start in (0, 4, 8):
        left.plot([start - 0.5, start + 3.5], [-0.62, -0.62], linewidth=3, solid_capstyle="butt", clip_on=False)
    left.set_xlabel("latent frame (bars: the model's windows at tick 0)", fontsize=8)
    left.set_ylabel("tick", fontsize=8)
    figure.colorbar(picture, ax=left, label="noise level", pad=0.01)
    _tail(right)
    return figure


def _tail(axes: Any) -> None:
    """Ouroboros' new latent: low frequencies of the last one, high ones of fresh noise."""
    from genattn.pipelines.long_video.ouroboros.coherent_tail import low_pass, mix_frequencies

    generator = torch.Generator().manual_seed(0)
    last, noise = torch.randn(2, 32, 32, generator=generator)
    smooth = mix_frequencies(last, torch.zeros_like(last), low_pass(32, 32, 0.25), keep_variance=True)
    new = mix_frequencies(last, noise, low_pass(32, 32, 0.25), keep_variance=True)
    gap = torch.full((32, 3), float("nan"))
    row = torch.cat([last, gap, smooth * 2, gap, new], dim=1)
    _map(axes, row, "coherent tail: last latent,\nits low frequencies, the new latent", "gray", vmin=-2.5, vmax=2.5)


IDEAS: dict[str, Callable[[], Any]] = {
    "idea_softpag.png": softpag,
    "idea_headhunter.png": headhunter,
    "idea_broadway.png": broadway,
    "idea_long_video.png": long_video,
}


def main(folder: Path = FIGURES) -> list[Path]:
    """Draw all of them into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, draw in IDEAS.items():
        draw().savefig(folder / name, dpi=90)
    return [folder / name for name in IDEAS]


if __name__ == "__main__":
    print(*main(*map(Path, sys.argv[1:])), sep="\n")
