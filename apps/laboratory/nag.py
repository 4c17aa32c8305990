"""What NAG costs: a forward with it against a stock one, interleaved, processor time, medians with an interval.

    python -m genattn.apps.laboratory.nag --pairs 12           appends rows to assets/bench/nag_cost.csv

Two architectures with random weights: SD3's (joint attention, 6 layers of 8 heads of 64, 1,024 picture and 77 text tokens),
with the image asked once for both texts and twice; and Wan's (cross-attention, 4 layers of 8 heads of 64, 1,260 tokens of video
and 128 of text). A second forward of the model would be a ratio of 2.
"""

import argparse
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel

from genattn.apps.laboratory.seam_overhead import interval
from genattn.apps.laboratory.softpag import build as build_sd3
from genattn.guidance.nag import NAG
from genattn.pipelines.tiny.evaluate import append_rows, provenance
from genattn.seam.handle import apply

TABLE = Path(__file__).resolve().parents[2] / "assets" / "bench" / "nag_cost.csv"


def build_wan() -> tuple[Any, dict[str, Any]]:
    """The model and inputs of batch 1."""
    torch.manual_seed(0)
    model = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=8,
        attention_head_dim=64,
        in_channels=16,
        out_channels=16,
        text_dim=256,
        ffn_dim=2048,
        num_layers=4,
        rope_max_seq_len=64,
    ).eval()
    inputs = {
        "hidden_states": torch.randn(1, 16, 7, 24, 60),
        "encoder_hidden_states": torch.randn(1, 128, 256),
        "timestep": torch.tensor([500]),
        "return_dict": False,
    }
    return model, inputs


def ratios(model: Any, inputs: dict[str, Any], plugin: NAG, pairs: int) -> list[float]:
    """Processor time with NAG over that without; the order alternates, the first two pairs warm up."""
    found = []
    with torch.no_grad(), apply(model, plugin) as handle:
        for index in range(pairs + 2):
            seconds = {}
            for guided in (True, False) if index % 2 else (False, True):
                began = time.process_time()
                with handle.options(enabled=guided):
                    model(**inputs)
                seconds[guided] = time.process_time() - began
            found.append(seconds[True] / seconds[False])
    return found[2:]


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `python -m genattn.apps.laboratory.nag`."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pairs", type=int, default=12, help="pairs of forwards per row")
    parser.add_argument("--csv", type=Path, default=TABLE, help="table to append the rows to")
    options = parser.parse_args(arguments)
    rows: list[dict[str, Any]] = []
    for kind, build, shares in (("joint", build_sd3, (True, False)), ("cross", build_wan, (True,))):
        model, inputs = build()
        for share in shares:
            text = torch.randn(inputs["encoder_hidden_states"].shape)
            found = ratios(model, inputs, NAG(negative_embeds=text, layout="single", share=share), options.pairs)
            low, high = interval(found)
            row: dict[str, Any] = {"attention": kind, "image_asked": "once" if share else "twice", "pairs": options.pairs}
            row |= {"ratio": round(statistics.median(found), 4), "low": round(low, 4), "high": round(high, 4)}
            print(row, flush=True)
            rows.append(provenance(cpu=True) | row)
    append_rows(options.csv, rows)


if __name__ == "__main__":
    main()
