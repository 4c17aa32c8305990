"""README's picture: frames of one prompt, dense above sparse with their seconds, and how much of the scores was computed.

`python -m genattn.apps.pages.readme_picture` draws assets/figures/dense_beside_sparse.png with what `genattn generate` takes
where no model is named. Seconds are of a second call, by the clock: draw it on a quiet machine.
"""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from genattn.apps.sampling.first_run import first_run
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

PROMPT = "a large yellow ring moves right on a dark background"
OUT = Path(__file__).resolve().parents[2] / "assets" / "figures" / "dense_beside_sparse.png"


def draw(out: Path = OUT, prompt: str = PROMPT, seed: int = 0, shown: int = 6) -> None:
    """Sample dense and sparse with the shipped model and draw `shown` frames of each beside the visited share."""
    settings, attention = first_run(SamplingSettings(), AttentionSettings("sparse", None, 0, 0, given=frozenset()))
    assert isinstance(attention.pattern, Pattern)
    pipe = open_pipeline(settings)
    call = call_arguments(pipe, settings)
    for each in (DENSE, attention):  # the first call pays for plans and kernels
        run_once(pipe, call, prompt, seed, each, each.name)
    runs = [run_once(pipe, call, prompt, seed, each, each.name) for each in (DENSE, attention)]
    layout = TokenLayout.from_grid(latent_grid(pipe, call))
    visited = visited_shares(attention.pattern, layout, pipe.transformer.config.num_layers)
    out.parent.mkdir(parents=True, exist_ok=True)
    title = f"{Path(str(settings.model)).name}, {layout.seqlen:,} tokens: {prompt!r}, same seed"
    _figure(runs, visited, title, shown).savefig(out, dpi=110)


def latent_grid(pipe: Any, call: dict[str, Any]) -> tuple[int, int, int]:
    """Token grid (frames, height, width) of a Wan call."""
    frames = (call["num_frames"] - 1) // pipe.vae_scale_factor_temporal + 1
    step = pipe.vae_scale_factor_spatial * pipe.transformer.config.patch_size[-1]
    return frames, call["height"] // step, call["width"] // step


def visited_shares(pattern: Pattern, layout: TokenLayout, layers: int, cells: int = 32) -> npt.NDArray[np.float32]:
    """Float32 [cells, cells] in [0, 1]: share of the scores computed between parts of the sequence, all layers and heads.

    The middle of a run stands for it.
    """
    side = layout.seqlen // cells
    found = torch.zeros(cells, cells)
    for layer in range(layers):
        mask = pattern.for_layer(layer, layers).for_step(fraction=0.5).mask(layout)
        mask = mask.reshape(-1, layout.seqlen, layout.seqlen)[:, : side * cells, : side * cells]
        found += mask.float().view(-1, cells, side, cells, side).mean((0, 2, 4)) / layers
    return found.numpy()


def _figure(runs: list[RunResult], visited: npt.NDArray[np.float32], title: str, shown: int) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.4), layout="constrained")
    grid = figure.add_gridspec(2, shown + 3)
    for row, (run, name) in enumerate(zip(runs, ("dense", "sparse"), strict=True)):
        for column, at in enumerate(np.linspace(0, len(run.frames) - 1, shown).round().astype(int)):
            axis = figure.add_subplot(grid[row, column])
            axis.imshow(run.frames[at])
            axis.set(xticks=[], yticks=[])
            if column == 0:
                axis.set_ylabel(f"{name}\n{run.seconds:.1f} s", fontsize=12)
            if row == 0:
                axis.set_title(f"frame {at}", fontsize=8)
    axis = figure.add_subplot(grid[:, shown:])
    axis.imshow(visited, cmap="Blues", interpolation="nearest", vmin=0, vmax=1)
    axis.set_title(f"computed: {float(visited.mean()):.0%} of the scores", fontsize=9)
    axis.set(xticks=[], yticks=[])
    axis.set_xlabel("keys, frame by frame", fontsize=8)
    axis.set_ylabel("queries", fontsize=8)
    figure.suptitle(title, fontsize=10)
    return figure


if __name__ == "__main__":
    draw()
