"""What an applied dense policy costs on a tiny Wan: paired, interleaved runs, the median of the pairs' ratios with an interval.

    python -m genattn.apps.seam_overhead --pairs 200       appends a row to assets/seam_overhead.csv

The tiny model is the worst case: its attention is so short that the seam's fixed microseconds weigh the most.
"""

import argparse
import csv
import os
import platform
import random
import statistics
import sys
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import diffusers
import torch

from genattn.inject import apply
from genattn.patterns.dense import DensePattern
from genattn.pipelines.tiny_random import build_model

TABLE = Path(__file__).resolve().parent.parent / "assets" / "seam_overhead.csv"


def wan_inputs(frames: int, side: int) -> dict[str, Any]:
    """Latents of `frames` x `side` x `side` tokens for the tiny Wan."""
    generator = torch.Generator().manual_seed(0)
    return {
        "hidden_states": torch.randn(1, 16, frames, 2 * side, 2 * side, generator=generator),
        "encoder_hidden_states": torch.randn(1, 12, 32, generator=generator),
        "timestep": torch.tensor([500]),
        "return_dict": False,
    }


def paired_ratios(pairs: int, frames: int, side: int, warm_up: int = 5) -> tuple[list[float], float]:
    """(time with a dense policy over time without, per pair; median stock seconds). Both orders alternate."""
    stock, applied, inputs = build_model("wan"), build_model("wan"), wan_inputs(frames, side)
    ratios, plain = [], []
    with apply(applied, DensePattern()), torch.no_grad():
        if not torch.equal(stock(**inputs)[0], applied(**inputs)[0]):
            raise RuntimeError("the dense policy does not equal stock, so its cost says nothing")
        for index in range(pairs + warm_up):
            seconds = {}
            for name in ("stock", "applied") if index % 2 else ("applied", "stock"):
                began = time.perf_counter()
                (stock if name == "stock" else applied)(**inputs)
                seconds[name] = time.perf_counter() - began
            if index >= warm_up:
                ratios.append(seconds["applied"] / seconds["stock"])
                plain.append(seconds["stock"])
    return ratios, statistics.median(plain)


def interval(values: list[float], draws: int = 1000) -> tuple[float, float]:
    """95 % bootstrap interval of the median."""
    generator = random.Random(0)
    medians = sorted(statistics.median(generator.choices(values, k=len(values))) for _ in range(draws))
    return medians[int(0.025 * draws)], medians[int(0.975 * draws)]


def main(arguments: list[str] | None = None) -> int:
    """Measure and append a row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=200)
    parser.add_argument("--frames", type=int, default=8)
    parser.add_argument("--side", type=int, default=8, help="tokens along each side of a frame")
    parser.add_argument("--out", type=Path, default=TABLE)
    given = parser.parse_args(arguments)
    if given.pairs < 10:
        parser.error(f"--pairs must be >= 10 for an interval, got {given.pairs}")
    ratios, seconds = paired_ratios(given.pairs, given.frames, given.side)
    low, high = interval(ratios)
    row = {
        "model": "wan (tiny, 3 blocks)",
        "tokens": given.frames * given.side**2,
        "pairs": given.pairs,
        "stock_ms": f"{1000 * seconds:.3f}",
        "overhead_percent": f"{100 * (statistics.median(ratios) - 1):.2f}",
        "low": f"{100 * (low - 1):.2f}",
        "high": f"{100 * (high - 1):.2f}",
        "load": f"{os.getloadavg()[0]:.1f} on {os.cpu_count()} cores",
        "device": f"{platform.machine()} CPU",
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "date": datetime.now(timezone.utc).date().isoformat(),
    }
    given.out.parent.mkdir(exist_ok=True)
    fresh = not given.out.exists()
    with given.out.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(row), lineterminator="\n")
        if fresh:
            writer.writeheader()
        writer.writerow(row)
    print(row)
    return 0


if __name__ == "__main__":
    sys.exit(main())
