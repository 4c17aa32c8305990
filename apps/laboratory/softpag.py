"""What SoftPAG costs: a forward with perturbed heads against a stock one, interleaved, medians with an interval.

    python -m genattn.apps.laboratory.softpag --pairs 20       appends rows to assets/bench/softpag_cost.csv

The model has SD3's architecture with random weights: 6 layers of 8 heads of 64 at 1,024 picture and 77 text tokens. All heads
of all layers perturbed are one forward more, so what is left of the ratio beyond 2 is SoftPAG's own work; from layer k on the
extra pass runs only layers k and later. Processor time of one process, so that other work on the machine changes little.
"""

import argparse
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import SD3Transformer2DModel

from genattn.apps.laboratory.seam_overhead import interval
from genattn.guidance.softpag.softpag import SoftPAG
from genattn.pipelines.tiny.evaluate import append_rows, provenance
from genattn.seam.handle import apply

TABLE = Path(__file__).resolve().parents[2] / "assets" / "bench" / "softpag_cost.csv"
LAYERS, HEADS = 6, 8


def build() -> tuple[Any, dict[str, Any]]:
    """The model and inputs of batch 1."""
    torch.manual_seed(0)
    model = SD3Transformer2DModel(
        sample_size=64,
        patch_size=2,
        in_channels=16,
        num_layers=LAYERS,
        attention_head_dim=64,
        num_attention_heads=HEADS,
        joint_attention_dim=256,
        caption_projection_dim=HEADS * 64,
        pooled_projection_dim=128,
        out_channels=16,
        pos_embed_max_size=64,
    ).eval()
    inputs = {
        "hidden_states": torch.randn(1, 16, 64, 64),
        "encoder_hidden_states": torch.randn(1, 77, 256),
        "pooled_projections": torch.randn(1, 128),
        "timestep": torch.tensor([500.0]),
        "return_dict": False,
    }
    return model, inputs


def ratios(model: Any, inputs: dict[str, Any], first_layer: int, pairs: int) -> list[float]:
    """Processor time with every head from `first_layer` on perturbed, over that without; the order alternates."""
    plugin = SoftPAG(
        [(layer, head) for layer in range(first_layer, LAYERS) for head in range(HEADS)], scale=3.0, layout="single"
    )
    found = []
    with torch.no_grad(), apply(model, plugin) as handle:
        for index in range(pairs + 2):
            seconds = {}
            for guided in (True, False) if index % 2 else (False, True):
                began = time.process_time()
                if guided:
                    model(**inputs)
                else:
                    with handle.options(enabled=False):
                        model(**inputs)
                seconds[guided] = time.process_time() - began
            found.append(seconds[True] / seconds[False])
    return found[2:]


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `python -m genattn.apps.laboratory.softpag`."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pairs", type=int, default=20, help="pairs of forwards per row")
    parser.add_argument("--csv", type=Path, default=TABLE, help="table to append the rows to")
    options = parser.parse_args(arguments)
    model, inputs = build()
    with torch.no_grad():
        stock = model(**inputs)[0]
        with apply(model, SoftPAG("L0H0", scale=3.0, layout="single")):
            if torch.equal(model(**inputs)[0], stock):
                raise RuntimeError("SoftPAG changed nothing, so its cost says nothing")
    rows: list[dict[str, Any]] = []
    for first_layer in (0, LAYERS // 2, LAYERS - 1):
        found = ratios(model, inputs, first_layer, options.pairs)
        low, high = interval(found)
        share = (LAYERS - first_layer) / LAYERS
        row = {"tokens": 1101, "layers": LAYERS, "first_layer": first_layer, "share_of_layers": round(share, 3)}
        row |= {
            "pairs": options.pairs,
            "ratio": round(statistics.median(found), 4),
            "low": round(low, 4),
            "high": round(high, 4),
        }
        row["beyond_the_pass_percent"] = round(100 * (statistics.median(found) - 1 - share), 2)
        print(row, flush=True)
        rows.append(provenance(cpu=True) | row)
    append_rows(options.csv, rows)


if __name__ == "__main__":
    main()
