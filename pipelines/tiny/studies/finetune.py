"""Longer than trained, on tiny-wan: untuned, with a dense LoRA and with a Radial LoRA, at 2x and 4x its 29 frames.

    python -m genattn.pipelines.tiny.studies.finetune --model assets/tiny-wan --factor 2 --run-dir runs/finetune \
        --table assets/bench/finetune.csv

Same clips, same steps, same noise in all arms; the Radial arm samples under Radial too. Judged by the tiny world's oracle on
captions that training never saw. Times are processor seconds, so that a busy machine changes little.
"""

import argparse
import contextlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline

import genattn
from genattn.errors import GenAttnError
from genattn.fingerprint import model_fingerprint
from genattn.patterns.pattern import Pattern
from genattn.patterns.radial import RadialPattern
from genattn.pipelines.finetune.cache import ClipSize
from genattn.pipelines.finetune.data import find_clips
from genattn.pipelines.finetune.tune import FinetuneSettings, finetune, longer, trainable
from genattn.pipelines.long_video.output.video_writer import FragmentedMp4Writer
from genattn.pipelines.long_video.quality.video_metrics import drift
from genattn.pipelines.tiny.evaluate import append_rows, evaluation_scenes, provenance
from genattn.pipelines.tiny.export import DEFAULTS_FILE, GenerationDefaults
from genattn.pipelines.tiny.oracle import judge
from genattn.pipelines.tiny.studies.broadway import bootstrap
from genattn.pipelines.tiny.world import Scene, caption, render, sample_scene
from genattn.pipelines.training.trainer import TrainSettings

PATTERN = RadialPattern(decay=0.1, floor=0)
ARMS: dict[str, Pattern | None] = {"untuned": None, "dense LoRA": None, "radial LoRA": PATTERN}
MEASURES = ("accuracy", "consistency", "drift")


@dataclass(frozen=True)
class StudySettings:
    """What to do.

    Attributes:
        factor: length in multiples of the model's own, > 0.
        clips: training clips, >= 1.
        count: captions that judge, >= 2.
        steps: training steps, >= 1.
        sampling_steps: denoising steps, >= 1.
        rank: of the LoRA.
        batch: clips per training step.
        learning_rate: AdamW's.
        minutes: wall-clock limit of training per arm.
        seed: of everything random.
    """

    factor: float = 2.0
    clips: int = 32
    count: int = 32
    steps: int = 200
    sampling_steps: int = 12
    rank: int = 16
    batch: int = 2
    learning_rate: float = 1e-3
    minutes: float = 1e9
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.clips, self.steps, self.sampling_steps) < 1 or self.count < 2:
            raise GenAttnError(f"clips and steps must be >= 1 and count >= 2, got {self}; correct it")


def write_clips(folder: Path, size: ClipSize, count: int, fps: float) -> None:
    """Training clips of the tiny world at the long length, with captions; those that are there are kept."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed in range(count):
        write_clip(folder / f"{seed:04d}.mp4", sample_scene(seed, two_objects=0.0), size, fps)


def write_clip(path: Path, scene: Scene, size: ClipSize, fps: float) -> None:
    """A scene as a video with its caption beside it; one that is there is kept."""
    if path.with_suffix(".txt").is_file():
        return
    with FragmentedMp4Writer(path, fps, crf=12) as writer:
        for frame in render(scene, size.frames, size.height, size.width):
            writer.write(frame)
    path.with_suffix(".txt").write_text(caption(scene))


def sample(
    pipe: Any, scenes: Sequence[Scene], size: ClipSize, scale: float, pattern: Pattern | None, settings: StudySettings
) -> Any:
    """Clips uint8 [N, T, H, W, 3] one by one, and processor seconds per clip."""
    clips, began = [], time.process_time()
    with contextlib.nullcontext() if pattern is None else genattn.apply(pipe, pattern):
        for index, scene in enumerate(scenes):
            frames = pipe(
                prompt=caption(scene),
                height=size.height,
                width=size.width,
                num_frames=size.frames,
                num_inference_steps=settings.sampling_steps,
                guidance_scale=scale,
                generator=torch.Generator().manual_seed(settings.seed + index),
                output_type="np",
            ).frames[0]
            clips.append(np.round(np.clip(frames, 0, 1) * 255).astype(np.uint8))
    return np.stack(clips), (time.process_time() - began) / len(scenes)


def measured(clips: Any, scenes: Sequence[Scene]) -> dict[str, Any]:
    """Means with bootstrap intervals: asked attributes found, subjects that stay themselves, drift of brightness."""
    verdicts = [judge(clip, scene) for clip, scene in zip(clips, scenes, strict=True)]
    columns: dict[str, list[Any]] = {
        "accuracy": [np.mean([v.share(name) for name in ("colour", "shape", "motion")]) for v in verdicts],
        "consistency": [v.consistency for v in verdicts],
        "drift": [abs(drift(clip)["brightness"]) for clip in clips],
    }
    columns |= {name: [v.share(name) for v in verdicts] for name in ("colour", "shape", "motion")}
    row: dict[str, Any] = {"clips": len(scenes)}
    for name, values in columns.items():
        low, high = bootstrap(np.asarray(values, dtype=np.float64))
        row |= {name: round(float(np.mean(values)), 4), f"{name}_low": round(low, 4), f"{name}_high": round(high, 4)}
    return row


def run_arm(arm: str, model: Path, folder: Path, settings: StudySettings) -> dict[str, Any]:
    """Train (unless untuned), sample and measure one arm."""
    defaults = GenerationDefaults(**json.loads((model / DEFAULTS_FILE).read_text()))
    pipe = DiffusionPipeline.from_pretrained(model).to(torch.float32)
    pipe.set_progress_bar_config(disable=True)
    mark = model_fingerprint({"transformer": pipe.transformer})
    size = ClipSize(longer(trainable(pipe), defaults.frames, settings.factor), defaults.height, defaults.width)
    row: dict[str, Any] = {"arm": arm, "weights": mark, "frames": size.frames, "train_steps": 0, "train_step_seconds": ""}
    if arm != "untuned":
        write_clips(folder / f"clips-{size.frames}", size, settings.clips, defaults.fps)
        training = TrainSettings(
            settings.steps, settings.minutes, settings.learning_rate, warmup=5, seed=settings.seed, ema=0.9
        )
        tuning = FinetuneSettings(size, settings.rank, dense_layers=1, batch=settings.batch, gradient_checkpointing=False)
        spent: list[float] = []
        done = finetune(
            pipe,
            find_clips(folder / f"clips-{size.frames}"),
            ARMS[arm],
            replace(tuning, training=training),
            folder / f"{arm.split()[0]}-{size.frames}",
            progress=lambda count: spent.append(time.process_time()),
        )
        pipe.transformer.eval()
        each = (time.process_time() - spent[-1]) / done.steps
        row |= {"train_steps": done.steps, "train_step_seconds": round(each, 4), "sparse": done.sparse}
    scenes = [scene for scene in evaluation_scenes(2 * settings.count) if len(scene.objects) == 1][: settings.count]
    clips, seconds = sample(pipe, scenes, size, defaults.guidance_scale, ARMS[arm], settings)
    return row | measured(clips, scenes) | {"sample_seconds": round(seconds, 3)}


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `python -m genattn.pipelines.tiny.studies.finetune`."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("assets/tiny-wan"), help="the exported pipeline")
    parser.add_argument("--run-dir", type=Path, required=True, help="where clips, caches and LoRAs go")
    parser.add_argument("--table", type=Path, help="CSV file to append the rows to")
    for name, default in vars(StudySettings()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    options = parser.parse_args(arguments)
    if not (options.model / DEFAULTS_FILE).exists():
        raise GenAttnError(f"the model must be a tiny pipeline's folder with {DEFAULTS_FILE}, got {options.model}")
    settings = StudySettings(**{name: getattr(options, name) for name in vars(StudySettings())})
    facts = provenance(cpu=True)
    run = f"{facts['date']} {facts['commit']} {settings.factor:g}x seed {settings.seed}"
    shown = {k: v for k, v in vars(settings).items() if k not in ("factor", "count", "minutes")}
    rows = []
    for arm in ARMS:
        row = run_arm(arm, options.model, options.run_dir, settings)
        rows.append({"run": run, "factor": f"{settings.factor:g}", "sparse": "", **row, **shown, **facts})
        print(json.dumps(rows[-1]), flush=True)
    if options.table is not None:
        names = list(rows[0])
        append_rows(options.table, [{name: row.get(name, "") for name in names} for row in rows])


if __name__ == "__main__":
    main()
