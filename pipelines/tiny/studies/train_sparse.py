"""Trained dense and trained through Radial attention: the same whole clips, the same noise, the same number of steps.

    python -m genattn.pipelines.tiny.wan train --run-dir runs/tiny-wan-long --begin-with assets/tiny-wan-long --frames 61 \
        --phases latents --still-shards 0 4 --clip-shards 0 8
    python -m genattn.pipelines.tiny.studies.train_sparse --model assets/tiny-wan-long --run-dir runs/tiny-wan-long \
        --table assets/bench/train_sparse.csv

Both arms go on from the shipped weights. Seconds are processor seconds, so that a busy machine changes little. A loss is that
of whole clips at fixed noise after training, dense and through the pattern; the oracle judges clips sampled as the arm was
trained.
"""

import argparse
import json
import shutil
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

import genattn
from genattn.errors import GenAttnError
from genattn.patterns.pattern import Pattern
from genattn.patterns.radial import RadialPattern
from genattn.pipelines.tiny.curriculum import Curriculum, LatentBatches, draw_step
from genattn.pipelines.tiny.denoiser import DenoiserSize, TinyDenoiser, flow_loss
from genattn.pipelines.tiny.evaluate import ATTRIBUTES, Sampling, append_rows, evaluate, evaluation_scenes, provenance
from genattn.pipelines.tiny.export import DEFAULTS_FILE, GenerationDefaults, assemble
from genattn.pipelines.tiny.resume import adopt
from genattn.pipelines.tiny.wan import train_transformer
from genattn.pipelines.training.trainer import TrainSettings, step_generator

PATTERN = RadialPattern(decay=0.1, floor=0)
ARMS: dict[str, Pattern | None] = {"untrained": None, "dense": None, "radial": PATTERN}
FRESH_STEP = 1_000_000


@dataclass(frozen=True)
class StudySettings:
    """How much of it: training steps of one clip each, captions that the oracle judges, denoising steps, and the rate."""

    steps: int = 60
    count: int = 16
    sampling_steps: int = 8
    learning_rate: float = 1e-4
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.steps, self.sampling_steps) < 1 or self.count < 2 or self.seed < 0 or not self.learning_rate > 0:
            raise GenAttnError(f"steps must be >= 1, count >= 2, seed >= 0 and the rate > 0, got {self}; correct it")


def run_arm(arm: str, model: Path, run_dir: Path, settings: StudySettings) -> dict[str, Any]:
    """Train one arm on from the exported `model` in a folder of its own; a row of the table, without provenance.

    Args:
        arm: a key of `ARMS`; the untrained one is only measured.
        model: an exported tiny video pipeline.
        run_dir: a run with cached latents of whole clips and stills.
        settings: how much.
    """
    defaults = GenerationDefaults(**json.loads((model / DEFAULTS_FILE).read_text()))
    patch = json.loads((model / "transformer" / "config.json").read_text())["patch_size"][1]
    size, pattern = DenoiserSize(patch=patch), ARMS[arm]
    folder = run_dir / "train-sparse" / arm
    shutil.rmtree(folder, ignore_errors=True)
    adopt(folder, model)
    for kind in ("clips", "settled-clips", "stills", "settled-stills"):
        (folder / kind).symlink_to((run_dir / kind).resolve(), target_is_directory=True)
    curriculum = Curriculum(0, 0, still_batch=16, clip_batch=1, clip_frames=(defaults.frames - 1) // 4 + 1)
    # the untrained arm takes one step at a rate of almost nothing
    steps, rate = (1, 1e-12) if arm == "untrained" else (settings.steps, settings.learning_rate)
    training = TrainSettings(steps, learning_rate=rate, warmup=5, ema=0.9, seed=settings.seed)
    begun = time.process_time()
    train_transformer(folder, Accelerator(cpu=True), training, curriculum, size, begin_with=model, pattern=pattern)
    each = (time.process_time() - begun) / steps
    pipeline, _ = assemble(folder, size)
    pipeline.set_progress_bar_config(disable=True)
    losses = {
        f"loss_{name}": round(measured_loss(pipeline, folder, curriculum, through, size), 5)
        for name, through in (("dense", None), ("radial", PATTERN))
    }
    sampling = Sampling(settings.sampling_steps, defaults.guidance_scale, settings.seed, batch=1)
    with nullcontext() if pattern is None else genattn.apply(pipeline, pattern, dense_steps=0, dense_layers=0):
        scored = evaluate(pipeline, evaluation_scenes(settings.count), sampling, defaults)[0]
    oracle = {name: scored[key] for name in ATTRIBUTES for key in (name, f"{name}_low", f"{name}_high")}
    seconds = "" if arm == "untrained" else round(each, 3)
    return {"arm": arm, "step_seconds": seconds, **losses, "clips": scored["clips"], **oracle}


@torch.no_grad()
def measured_loss(pipeline: Any, folder: Path, curriculum: Curriculum, pattern: Pattern | None, size: DenoiserSize) -> float:
    """Mean flow loss of eight whole clips at noise that no training step drew."""
    batches = LatentBatches(folder)
    model = TinyDenoiser(pipeline.transformer.config.in_channels, len(batches.tokenizer), size)
    model.transformer.load_state_dict(pipeline.transformer.state_dict())
    model.text_encoder.load_state_dict(pipeline.text_encoder.state_dict())
    total = 0.0
    with nullcontext() if pattern is None else genattn.apply(model.transformer, pattern, dense_steps=0, dense_layers=0):
        for number in range(1, 9):
            generator = step_generator(0, FRESH_STEP + number)
            latents, ids = draw_step(batches, curriculum, FRESH_STEP + number, generator)
            total += float(flow_loss(model, latents, ids, batches.empty, generator))
    return total / 8


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `python -m genattn.pipelines.tiny.studies.train_sparse`."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("assets/tiny-wan-long"), help="the exported pipeline")
    parser.add_argument("--run-dir", type=Path, required=True, help="a run with cached latents")
    parser.add_argument("--table", type=Path, help="CSV file to append the rows to")
    for name, default in asdict(StudySettings()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    options = parser.parse_args(arguments)
    if not (options.model / DEFAULTS_FILE).exists():
        raise GenAttnError(f"the model must be a tiny pipeline's folder with {DEFAULTS_FILE}, got {options.model}")
    settings = StudySettings(**{name: getattr(options, name) for name in asdict(StudySettings())})
    rows = []
    for arm in ARMS:
        shown = {"model": options.model.name, "steps": settings.steps, "learning_rate": settings.learning_rate}
        rows.append(run_arm(arm, options.model, options.run_dir, settings) | shown | {"seed": settings.seed})
        rows[-1] |= {
            "pattern": "dense" if ARMS[arm] is None else repr(ARMS[arm]),
            "sampling_steps": settings.sampling_steps,
            **provenance(cpu=True),
        }
        print(json.dumps(rows[-1]), flush=True)
    if options.table is not None:
        append_rows(options.table, rows)


if __name__ == "__main__":
    main()
