"""What BroadWay costs: one attention, one forward of a motion UNet, one forward of a video DiT; random weights.

    python -m genattn.apps.laboratory.broadway --table assets/bench/broadway_cost.csv

Each measurement first checks the result against its definition and stops where it is wrong. Stock and guided take turns; the
best time of each counts. `run_overhead` is what a sampling run pays when the given share of its steps is guided.
"""

import argparse
import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import UNetMotionModel, WanTransformer3DModel
from torch import nn

import genattn
from genattn.apps.sampling.measured_rows import append_rows, provenance
from genattn.errors import GenAttnError
from genattn.geometry.token_layout import TokenLayout
from genattn.guidance.broadway.broadway import BroadWay
from genattn.guidance.broadway.frame_marginal import edited_attention
from genattn.guidance.broadway.frame_marginal_approx import pooled_edit
from genattn.guidance.broadway.frame_marginal_reference import reference_edit
from genattn.guidance.broadway.key_frames import KeyFrames, key_frames
from genattn.guidance.broadway.temporal_map import MapEdit

Row = dict[str, Any]
Method = Callable[[], torch.Tensor]


def best_times(methods: dict[str, Method], repeats: int) -> dict[str, float]:
    """Seconds of the fastest of `repeats` calls of each, taking turns after one call of each that is not timed.

    Without a GPU it is the processor's time over all threads, which others on the machine disturb less than the clock.
    """
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    best = dict.fromkeys(methods, float("inf"))
    for turn in range(repeats + 1):
        for name, method in methods.items():
            _settle()
            begun = clock()
            method()
            _settle()
            if turn:
                best[name] = min(best[name], clock() - begun)
    return best


@torch.no_grad()
def attention_rows(grid: tuple[int, int, int], heads: int, dim: int, repeats: int, device: str) -> list[Row]:
    """One attention over `grid`: stock SDPA, the exact edit, and the pooled ones, which pay for the stock output as well."""
    layout = TokenLayout.from_grid(grid)
    frames = key_frames(layout).to(torch.device(device))
    _check(heads, dim)
    query, key, value, other = (_tokens(grid, heads, dim, seed).to(device) for seed in range(4))
    anchor = edited_attention(other, key, value, frames, MapEdit(0.0, 1.0)).rows
    stock, edit = _sdpa(query, key, value), MapEdit()
    methods: dict[str, Method] = {
        "stock": lambda: _sdpa(query, key, value),
        "exact": lambda: edited_attention(query, key, value, frames, edit, anchor=anchor).out,
    }
    for pool in (2, 4, max(grid)):
        name = f"pooled {pool}" if pool < max(grid) else "pooled frame"
        methods[name] = partial(_pooled, (query, key, value), frames, grid, stock, pool, anchor)
    times = best_times(methods, repeats)
    shape = {"tokens": layout.seqlen, "frames": grid[0], "heads": heads, "dim": dim}
    rows = []
    for name, seconds in times.items():
        total = seconds + (times["stock"] if name.startswith("pooled") else 0.0)
        added = {"seconds": round(total, 4), "over_stock": round(total / times["stock"], 3)}
        rows.append({"measured": "attention", "method": name, **shape, **added})
    return rows


def _pooled(
    tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    frames: KeyFrames,
    grid: tuple[int, int, int],
    base: torch.Tensor,
    pool: int,
    anchor: torch.Tensor,
) -> torch.Tensor:
    return pooled_edit(*tensors, frames, grid[1:], MapEdit(), base, pool, anchor=anchor).out


def model_row(name: str, model: nn.Module, inputs: dict[str, Any], tokens: int, repeats: int, share: float = 0.2) -> Row:
    """One forward, stock and guided with the defaults; `share` of a run's steps is guided.

    Raises:
        GenAttnError: where the guided model with nothing edited is not the stock one.
    """

    @torch.no_grad()
    def run() -> torch.Tensor:
        return model(**inputs, return_dict=False)[0]

    def guided(plugin: BroadWay) -> torch.Tensor:
        with genattn.apply(model, plugin).set(num_steps=1):
            return run()

    stock, neutral = run(), guided(BroadWay(0.0, 1.0, stop=1.0))
    difference = float((stock - neutral).abs().max() / stock.abs().max())
    if difference > 1e-4:
        raise GenAttnError(f"a guided {name} with nothing edited must be stock within 1e-4, got {difference:.1e}; not measured")
    times = best_times({"stock": run, "guided": lambda: guided(BroadWay(stop=1.0))}, repeats)
    added = times["guided"] / times["stock"] - 1
    return {
        "measured": name,
        "method": "defaults",
        "tokens": tokens,
        "seconds": round(times["guided"], 4),
        "over_stock": round(1 + added, 4),
        "guided_steps": share,
        "run_overhead": round(share * added, 5),
    }


def motion_unet_row(size: int, channels: tuple[int, ...], repeats: int, device: str) -> Row:
    """A motion UNet with a guidance batch of 16 frames; Stable Diffusion's shape at a fraction of its channels."""
    torch.manual_seed(0)
    model: Any = UNetMotionModel(
        block_out_channels=channels,
        layers_per_block=2,
        cross_attention_dim=64,
        num_attention_heads=8,
        motion_num_attention_heads=8,
        sample_size=size,
    )
    inputs = {
        "sample": torch.randn(2, 4, 16, size, size, device=device),
        "timestep": torch.tensor(500, device=device),
        "encoder_hidden_states": torch.randn(32, 16, 64, device=device),
    }
    row = model_row("motion UNet", model.eval().to(device), inputs, size * size, repeats)
    return row | {"frames": 16, "heads": 8, "dim": channels[0] // 8}


def video_dit_row(grid: tuple[int, int, int], heads: int, dim: int, layers: int, repeats: int, device: str) -> Row:
    """A Wan transformer over `grid` tokens."""
    torch.manual_seed(0)
    model: Any = WanTransformer3DModel(
        num_attention_heads=heads,
        attention_head_dim=dim,
        num_layers=layers,
        ffn_dim=4 * heads * dim,
        text_dim=64,
        freq_dim=64,
    )
    frames, height, width = grid
    inputs = {
        "hidden_states": torch.randn(1, 16, frames, 2 * height, 2 * width, device=device),
        "timestep": torch.tensor([500], device=device),
        "encoder_hidden_states": torch.randn(1, 32, 64, device=device),
    }
    row = model_row("video DiT", model.eval().to(device), inputs, frames * height * width, repeats)
    return row | {"frames": frames, "heads": heads, "dim": dim}


def _check(heads: int, dim: int) -> None:
    """Refuse to time a wrong result."""
    layout = TokenLayout.from_grid((5, 2, 3))
    query, key, value = (_tokens((5, 2, 3), heads, dim, seed) for seed in range(3))
    frames = key_frames(layout)
    anchor = torch.rand(1, layout.seqlen, heads, 5).softmax(-1)
    got = edited_attention(query, key, value, frames, MapEdit(), anchor=anchor).out
    want, _ = reference_edit(query, key, value, frames, MapEdit(), anchor=anchor)
    error = float((got - want).abs().max())
    if error > 1e-4:
        raise GenAttnError(f"the exact edit must equal the full map within 1e-4, got {error:.1e}; not measured")


def _tokens(grid: tuple[int, int, int], heads: int, dim: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, math.prod(grid), heads, dim, generator=generator)


def _sdpa(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)).transpose(1, 2)


def _settle() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    summary = (__doc__ or "").split("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m genattn.apps.laboratory.broadway", description=summary)
    parser.add_argument("--grid", type=int, nargs=3, default=(16, 16, 32), help="frames, height, width in tokens")
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--layers", type=int, default=4, help="blocks of the video DiT")
    parser.add_argument("--latent", type=int, default=32, help="height and width of the motion UNet's latents")
    parser.add_argument("--channels", type=int, nargs="+", default=(64, 128, 256, 256), help="channels of the motion UNet")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--note", default="", help="written into every row, e.g. that the machine was busy")
    parser.add_argument("--table", type=Path, help="CSV file to append the rows to")
    return parser


def main(arguments: Sequence[str] | None = None) -> list[Row]:
    """Entry point of `python -m genattn.apps.laboratory.broadway`; returns the rows."""
    options = build_parser().parse_args(arguments)
    frames, height, width = options.grid
    grid = (frames, height, width)
    steps: list[Callable[[], list[Row]]] = [
        lambda: attention_rows(grid, options.heads, options.dim, options.repeats, options.device),
        lambda: [video_dit_row(grid, options.heads, options.dim, options.layers, options.repeats, options.device)],
        lambda: [motion_unet_row(options.latent, tuple(options.channels), options.repeats, options.device)],
    ]
    rows: list[Row] = []
    for step in steps:
        measured = step()
        for row in measured:
            print("  ".join(f"{key}={value}" for key, value in row.items()), flush=True)
        if options.table is not None:
            append_rows(options.table, [{**provenance(options.device), "note": options.note, **row} for row in measured])
        rows += measured
    return rows


if __name__ == "__main__":
    main()
