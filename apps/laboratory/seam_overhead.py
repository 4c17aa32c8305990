"""What an applied dense policy costs on a tiny Wan: paired, interleaved runs, the median of the pairs' ratios with an interval.

    python -m genattn.apps.laboratory.seam_overhead --pairs 200       appends a row to assets/seam_overhead.csv

`--clock process` counts the processor time of this process alone, over all its threads: the honest clock where other work
shares the machine and the wall clock measures that work. `--model random-wan` is the worst case: a forward of milliseconds,
where the seam's fixed microseconds weigh most.
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
from diffusers import WanTransformer3DModel

from genattn.apps.sampling.load_pipeline import shipped_model
from genattn.patterns.dense import DensePattern
from genattn.pipelines.tiny.random.build import build_model
from genattn.seam.handle import apply

TABLE = Path(__file__).resolve().parents[2] / "assets" / "seam_overhead.csv"


def wan_inputs(frames: int, side: int) -> dict[str, Any]:
    """Latents of `frames` x `side` x `side` tokens for the tiny Wan."""
    generator = torch.Generator().manual_seed(0)
    return {
        "hidden_states": torch.randn(1, 16, frames, 2 * side, 2 * side, generator=generator),
        "encoder_hidden_states": torch.randn(1, 12, 32, generator=generator),
        "timestep": torch.tensor([500]),
        "return_dict": False,
    }


def shipped_pair(frames: int, side: int) -> tuple[Any, Any, dict[str, Any]]:
    """The shipped, trained tiny-wan twice, with inputs of its own channels."""
    folder = shipped_model("tiny-wan") / "transformer"
    stock, applied = (WanTransformer3DModel.from_pretrained(folder).float().eval() for _ in range(2))
    inputs = wan_inputs(frames, side)
    generator = torch.Generator().manual_seed(0)
    size = (1, stock.config.in_channels, frames, 2 * side, 2 * side)
    inputs["hidden_states"] = torch.randn(size, generator=generator)
    inputs["encoder_hidden_states"] = torch.randn(1, 512, stock.config.text_dim, generator=generator)
    return stock, applied, inputs


def random_pair(frames: int, side: int) -> tuple[Any, Any, dict[str, Any]]:
    """The tiny random Wan of the tests twice: three blocks, a forward of a few milliseconds."""
    return build_model("wan"), build_model("wan"), wan_inputs(frames, side)


CLOCKS = {"wall": time.perf_counter, "process": time.process_time}
PAIRS = {"tiny-wan": shipped_pair, "random-wan": random_pair}


def paired_ratios(
    model: str, pairs: int, frames: int, side: int, clock: str = "wall", warm_up: int = 5
) -> tuple[list[float], float]:
    """(time with a dense policy over time without, per pair; median stock seconds). Both orders alternate."""
    now = CLOCKS[clock]
    stock, applied, inputs = PAIRS[model](frames, side)
    ratios, plain = [], []
    with apply(applied, DensePattern()), torch.no_grad():
        if not torch.equal(stock(**inputs)[0], applied(**inputs)[0]):
            raise RuntimeError("the dense policy does not equal stock, so its cost says nothing")
        for index in range(pairs + warm_up):
            seconds = {}
            for name in ("stock", "applied") if index % 2 else ("applied", "stock"):
                began = now()
                (stock if name == "stock" else applied)(**inputs)
                seconds[name] = now() - began
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
    parser.add_argument("--model", choices=PAIRS, default="tiny-wan")
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--pairs", type=int, default=200)
    parser.add_argument("--frames", type=int, default=8)
    parser.add_argument("--side", type=int, default=8, help="tokens along each side of a frame")
    parser.add_argument("--out", type=Path, default=TABLE)
    given = parser.parse_args(arguments)
    if given.pairs < 10:
        parser.error(f"--pairs must be >= 10 for an interval, got {given.pairs}")
    ratios, seconds = paired_ratios(given.model, given.pairs, given.frames, given.side, given.clock)
    low, high = interval(ratios)
    row = {
        "model": given.model,
        "tokens": given.frames * given.side**2,
        "pairs": given.pairs,
        "clock": given.clock,
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
