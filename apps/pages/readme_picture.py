"""README's picture: frames of one prompt, dense above radial, and the mask that lies between them.

`python -m genattn.apps.pages.readme_picture` draws assets/figures/dense_beside_radial.png with the shipped model.
"""

from pathlib import Path
from typing import Any

import numpy as np

from genattn.apps.sampling.attention_names import pattern_from_name
from genattn.apps.sampling.run import (
    DENSE,
    AttentionSettings,
    RunResult,
    SamplingSettings,
    call_arguments,
    open_pipeline,
    run_once,
)
from genattn.geometry.token_layout import TokenLayout
from genattn.patterns.pattern import Pattern

PROMPT = "a red circle moves right on a dark background"
OUT = Path(__file__).resolve().parents[2] / "assets" / "figures" / "dense_beside_radial.png"


def draw(out: Path = OUT, prompt: str = PROMPT, seed: int = 0, shown: int = 6) -> None:
    """Sample dense and radial with the shipped model and draw `shown` frames of each beside the mask."""
    settings = SamplingSettings()
    pipe = open_pipeline(settings)
    call = call_arguments(pipe, settings)
    pattern = pattern_from_name("radial")
    assert pattern is not None
    runs = [run_once(pipe, call, prompt, seed, a, a.name) for a in (DENSE, AttentionSettings("radial", pattern))]
    layout = TokenLayout.from_grid(latent_grid(pipe, call))
    out.parent.mkdir(parents=True, exist_ok=True)
    figure = _figure(runs, pattern, layout, prompt, shown)
    figure.savefig(out, dpi=110)


def latent_grid(pipe: Any, call: dict[str, Any]) -> tuple[int, int, int]:
    """Token grid (frames, height, width) of a Wan call."""
    frames = (call["num_frames"] - 1) // pipe.vae_scale_factor_temporal + 1
    step = pipe.vae_scale_factor_spatial * pipe.transformer.config.patch_size[-1]
    return frames, call["height"] // step, call["width"] // step


def _figure(runs: list[RunResult], pattern: Pattern, layout: TokenLayout, prompt: str, shown: int) -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure = pyplot.figure(figsize=(10, 3.4), layout="constrained")
    grid = figure.add_gridspec(2, shown + 3)
    for row, run in enumerate(runs):
        for column, at in enumerate(np.linspace(0, len(run.frames) - 1, shown).round().astype(int)):
            axis = figure.add_subplot(grid[row, column])
            axis.imshow(run.frames[at])
            axis.set(xticks=[], yticks=[])
            if column == 0:
                axis.set_ylabel(run.attention, fontsize=12)
            if row == 0:
                axis.set_title(f"frame {at}", fontsize=8)
    axis = figure.add_subplot(grid[:, shown:])
    mask = pattern.mask(layout)
    axis.imshow(mask, cmap="Blues", interpolation="nearest")
    axis.set_title(f"radial mask: {float(mask.float().mean()):.0%} of the scores", fontsize=9)
    tokens = layout.seqlen // layout.grid3[0]
    axis.set(xticks=range(0, layout.seqlen + 1, tokens), yticks=range(0, layout.seqlen + 1, tokens))
    axis.tick_params(labelsize=6)
    axis.set_xlabel("key token (a tick every frame)", fontsize=8)
    axis.set_ylabel("query token", fontsize=8)
    figure.suptitle(f"tiny-wan: {prompt!r}, same seed", fontsize=10)
    return figure


if __name__ == "__main__":
    draw()
