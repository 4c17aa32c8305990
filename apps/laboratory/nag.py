"""What NAG costs: with it against without it, interleaved, processor time, medians with an interval.

    python -m genattn.apps.laboratory.nag --pairs 12           appends rows to assets/bench/nag_cost.csv

A step is one forward of the denoiser, a call one whole run of the pipeline (text encoder, 4 steps, VAE). Measured on
tiny-sd3 (joint attention, 64 picture tokens, 40 of text) and tiny-wan (cross-attention, 512 tokens of video, 64 of text), and a
step on two architectures with random weights: SD3's (6 layers of 8 heads of 64, 1,024 picture and 77 text tokens), and Wan's
(4 layers of 8 heads of 64, 1,260 tokens of video and 128 of text). Joint attention comes with the image asked once for both
texts, and twice. A second forward of the model would be a ratio of 2.
"""

import argparse
import csv
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, SD3Transformer2DModel, WanTransformer3DModel

from genattn.apps.laboratory.seam_overhead import interval
from genattn.apps.laboratory.softpag import build as build_sd3
from genattn.guidance.nag import NAG
from genattn.pipelines.tiny.evaluate import append_rows, provenance
from genattn.seam.handle import apply

ASSETS = Path(__file__).resolve().parents[2] / "assets"
TABLE = ASSETS / "bench" / "nag_cost.csv"


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


def interleaved(plain: Callable[[], Any], guided: Callable[[], Any], pairs: int) -> list[float]:
    """Processor time of `guided` over that of `plain`; the order alternates, the first two pairs warm up."""
    found = []
    for index in range(pairs + 2):
        seconds = {}
        for run in (guided, plain) if index % 2 else (plain, guided):
            began = time.process_time()
            run()
            seconds[run] = time.process_time() - began
        found.append(seconds[guided] / seconds[plain])
    return found[2:]


def step_ratios(model: Any, inputs: dict[str, Any], plugin: NAG, pairs: int) -> list[float]:
    """Ratios of one forward."""
    with torch.no_grad(), apply(model, plugin) as handle:

        def forward(enabled: bool) -> None:
            with handle.options(enabled=enabled):
                model(**inputs)

        return interleaved(lambda: forward(False), lambda: forward(True), pairs)


def call_ratios(name: str, pairs: int) -> list[float]:
    """Ratios of one whole run of a shipped tiny pipeline, one picture or clip of 4 steps at guidance scale 1."""
    pipe = DiffusionPipeline.from_pretrained(ASSETS / name)
    pipe.set_progress_bar_config(disable=True)
    size: dict[str, Any] = {"num_frames": 29} if name == "tiny-wan" else {}
    call = {"height": 64, "width": 64, "num_inference_steps": 4, "guidance_scale": 1.0, "output_type": "np", **size}
    call["max_sequence_length"] = 64 if name == "tiny-wan" else 16
    with apply(pipe, NAG("a red circle")) as handle:

        def run(enabled: bool) -> None:
            with handle.options(enabled=enabled):
                pipe("a blue ring on a dark background", generator=torch.Generator().manual_seed(0), **call)

        return interleaved(lambda: run(False), lambda: run(True), pairs)


def tiny_step(name: str) -> tuple[Any, dict[str, Any]]:
    """The denoiser of a shipped tiny pipeline, and inputs of one picture or clip."""
    cls = WanTransformer3DModel if name == "tiny-wan" else SD3Transformer2DModel
    model = cls.from_pretrained(ASSETS / name, subfolder="transformer", torch_dtype=torch.float32).eval()
    width = model.config.text_dim if name == "tiny-wan" else model.config.joint_attention_dim
    inputs: dict[str, Any] = {"timestep": torch.tensor([500.0]), "return_dict": False}
    if name == "tiny-wan":
        inputs["hidden_states"] = torch.randn(1, model.config.in_channels, 8, 16, 16)
        inputs["encoder_hidden_states"] = torch.randn(1, 64, width)
    else:
        inputs["hidden_states"] = torch.randn(1, model.config.in_channels, 16, 16)
        inputs["encoder_hidden_states"] = torch.randn(1, 40, width)
        inputs["pooled_projections"] = torch.randn(1, model.config.pooled_projection_dim)
    return model, inputs


STEPS: dict[str, tuple[str, Callable[[], tuple[Any, dict[str, Any]]]]] = {
    "tiny-sd3": ("joint", lambda: tiny_step("tiny-sd3")),
    "tiny-wan": ("cross", lambda: tiny_step("tiny-wan")),
    "SD3 at 1,101 tokens": ("joint", build_sd3),
    "Wan at 1,260 tokens": ("cross", build_wan),
}


def markdown(file: Path) -> str:
    """For the manual: with NAG over without it, a row per model and unit."""
    with file.open(newline="") as handle:
        rows = list(csv.DictReader(handle))
    lines = [["model", "attention", "measured", "image attends", "ratio", "interval of 95 %"], ["---"] * 6]
    for row in rows:
        between = f"{float(row['low']):.2f} to {float(row['high']):.2f}"
        lines.append([row["model"], row["attention"], row["unit"], row["image_asked"], f"{float(row['ratio']):.2f}", between])
    body, last = "\n".join(f"| {' | '.join(line)} |" for line in lines), rows[-1]
    where = f"{last['device']}, torch {last['torch']}, diffusers {last['diffusers']}, {last['date']}, commit {last['commit']}"
    return f"{body}\n\n<sub>Processor time, medians of {last['pairs']} pairs; {where}.</sub>"


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `python -m genattn.apps.laboratory.nag`."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pairs", type=int, default=12, help="pairs of forwards per row")
    parser.add_argument("--csv", type=Path, default=TABLE, help="table to append the rows to")
    options = parser.parse_args(arguments)
    rows: list[dict[str, Any]] = []

    def note(unit: str, name: str, kind: str, asked: str, found: list[float]) -> None:
        low, high = interval(found)
        row: dict[str, Any] = {"unit": unit, "model": name, "attention": kind, "image_asked": asked, "pairs": len(found)}
        row |= {"ratio": round(statistics.median(found), 4), "low": round(low, 4), "high": round(high, 4)}
        print(row, flush=True)
        rows.append(provenance(cpu=True) | row)

    torch.set_num_threads(1)
    for name, (kind, build) in STEPS.items():
        model, inputs = build()
        for share in (True, False) if kind == "joint" else (True,):
            text = torch.randn(inputs["encoder_hidden_states"].shape)
            found = step_ratios(model, inputs, NAG(negative_embeds=text, layout="single", share=share), options.pairs)
            note("step", name, kind, "once" if share else "twice", found)
    for name in ("tiny-sd3", "tiny-wan"):
        note("call", name, STEPS[name][0], "once", call_ratios(name, options.pairs))
    append_rows(options.csv, rows)


if __name__ == "__main__":
    main()
