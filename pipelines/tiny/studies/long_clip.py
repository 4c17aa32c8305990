"""One clip of tiny-wan beyond its 29 frames: stock, with each plugin that is to help, and with a LoRA trained at that length.

    python -m genattn.pipelines.tiny.studies.long_clip --model assets/tiny-wan --factors 2 4 --table assets/bench/long_clip.csv
    python -m genattn.pipelines.tiny.studies.finetune --factor 4 --run-dir runs --clips 24 --batch 1 --learning-rate 0.002
    python -m genattn.pipelines.tiny.studies.long_clip --factors 4 --lora runs/dense-113/lora --table ...

Same captions and noise in every row; training never saw the captions. Judged by the tiny world's oracle. Rows that the table
has already are not made again.
"""

import argparse
import contextlib
import csv
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline

import genattn
from genattn.errors import GenAttnError
from genattn.fingerprint import model_fingerprint
from genattn.patterns.neighborhood import NeighborhoodPattern
from genattn.patterns.rotating_anchors import RotatingAnchors
from genattn.pipelines.long_clip.logit_decay import LogitDecay
from genattn.pipelines.long_clip.riflex import FrameStretch, RIFLEx
from genattn.pipelines.tiny.evaluate import append_rows, evaluation_scenes, provenance
from genattn.pipelines.tiny.export import DEFAULTS_FILE, GenerationDefaults
from genattn.pipelines.tiny.oracle import judge
from genattn.pipelines.tiny.studies.broadway import bootstrap
from genattn.pipelines.tiny.world import Scene, caption
from genattn.reading import read_json

MEASURES = ("motion", "shape", "colour", "consistency", "motion_amount")
# latent frames that the model learned -> plugins
VARIANTS: dict[str, Callable[[int], list[Any]]] = {
    "stock": lambda trained: [],
    "RIFLEx": lambda trained: [RIFLEx(trained)],
    "logit decay .9": lambda trained: [LogitDecay(trained, 0.9)],
    "rotating anchors": lambda trained: [RotatingAnchors(NeighborhoodPattern((trained, -1, -1)), trained // 2)],
    "frame stretch": lambda trained: [FrameStretch(trained)],
    "frame stretch + decay": lambda trained: [FrameStretch(trained), LogitDecay(trained, 0.9)],
    "radial": lambda trained: [genattn.RadialPattern()],
    "radial + logit decay .9": lambda trained: [genattn.RadialPattern(), LogitDecay(trained, 0.9)],
    "radial + frame stretch": lambda trained: [genattn.RadialPattern(), FrameStretch(trained)],
}
# the same plugins on top of a LoRA that was trained at the long length
TUNED = {
    "length LoRA": "stock",
    "length LoRA + RIFLEx": "RIFLEx",
    "length LoRA + logit decay .9": "logit decay .9",
    "length LoRA + frame stretch": "frame stretch",
}


def clips(pipe: Any, plugins: list[Any], scenes: Sequence[Scene], frames: int, defaults: GenerationDefaults, seed: int) -> Any:
    """Clips uint8 [N, T, H, W, 3], one by one, every step and layer under the plugins."""
    made = []
    # a window of the trained length is meant for all of a run
    schedule: dict[str, Any] = (
        {"dense_steps": 0, "dense_layers": 0} if any(isinstance(p, genattn.Pattern) for p in plugins) else {}
    )
    with genattn.apply(pipe, *plugins, **schedule) if plugins else contextlib.nullcontext():
        for index, scene in enumerate(scenes):
            video = pipe(
                prompt=caption(scene),
                height=defaults.height,
                width=defaults.width,
                num_frames=frames,
                num_inference_steps=defaults.steps,
                guidance_scale=defaults.guidance_scale,
                generator=torch.Generator().manual_seed(seed + index),
                output_type="np",
            ).frames[0]
            made.append(np.round(np.clip(video, 0, 1) * 255).astype(np.uint8))
    return np.stack(made)


def measured(films: Any, scenes: Sequence[Scene]) -> dict[str, Any]:
    """Means with bootstrap intervals of what the oracle finds."""
    verdicts = [judge(clip, scene) for clip, scene in zip(films, scenes, strict=True)]
    columns = {name: [v.share(name) for v in verdicts] for name in ("motion", "shape", "colour")}
    columns |= {name: [getattr(v, name) for v in verdicts] for name in ("consistency", "motion_amount")}
    row: dict[str, Any] = {"clips": len(scenes)}
    for name in MEASURES:
        low, high = bootstrap(np.asarray(columns[name], dtype=np.float64))
        row |= {name: round(float(np.mean(columns[name])), 4), f"{name}_low": round(low, 4), f"{name}_high": round(high, 4)}
    return row


def lora_of(folders: Sequence[Path], frames: int) -> tuple[Path, str]:
    """The LoRA among `genattn finetune`'s folders that was trained at `frames`, and what it is: pattern, steps, rank."""
    lengths = []
    for folder in folders:
        told = read_json(folder / "finetune.json", "what a LoRA was trained with")
        lengths.append(told["size"]["frames"])
        if lengths[-1] == frames:
            pattern = "dense" if told["pattern"] == "None" else told["pattern"]
            return folder, f"{pattern}, {told['steps']} steps, rank {told['lora_rank']}"
    raise GenAttnError(f"a LoRA must be trained at the clip's {frames} frames, got {lengths}; train one, or drop that factor")


def study(
    model: Path, factor: float, count: int, names: Sequence[str], seed: int, table: Path | None, loras: Sequence[Path] = ()
) -> None:
    """Make and measure the rows of one length that the table does not have; those of a LoRA come on top of `names`."""
    defaults = GenerationDefaults(**json.loads((model / DEFAULTS_FILE).read_text()))
    pipe = DiffusionPipeline.from_pretrained(model).to(torch.float32)
    pipe.set_progress_bar_config(disable=True)
    ratio = pipe.vae_scale_factor_temporal
    trained = (defaults.frames - 1) // ratio + 1
    frames = round((defaults.frames - 1) * factor / ratio) * ratio + 1
    scenes = [scene for scene in evaluation_scenes(2 * count) if len(scene.objects) == 1][:count]
    key = {"factor": f"{factor:g}", "weights": model_fingerprint({"transformer": pipe.transformer}), "clips": str(count)}
    rounds = [(name, name, "") for name in names]
    if loras:
        folder, told = lora_of(loras, frames)
        rounds += [(tuned, name, told) for tuned, name in TUNED.items()]
    for name, plugins, lora in rounds:
        if name in _done(table, key | {"lora": lora}):
            continue
        if lora and not pipe.get_active_adapters():
            pipe.load_lora_weights(folder)
        began = time.process_time()
        row = measured(clips(pipe, VARIANTS[plugins](trained), scenes, frames, defaults, seed), scenes)
        seconds = round((time.process_time() - began) / count, 2)
        row = {"variant": name, **key, "frames": frames, **row, "sample_seconds": seconds, "seed": seed}
        print(json.dumps({**row, "lora": lora}), flush=True)
        if table is not None:
            append_rows(table, [{**row, **provenance(cpu=True), "lora": lora}])


def _done(table: Path | None, key: dict[str, str]) -> set[str]:
    if table is None or not table.is_file():
        return set()
    with table.open(newline="") as file:
        return {row["variant"] for row in csv.DictReader(file) if all(row[name] == value for name, value in key.items())}


def markdown(table: Path) -> str:
    """For the manual: a row per length and variant, means with 95 % intervals."""
    order = [*VARIANTS, *TUNED]
    with table.open(newline="") as file:
        rows = sorted(csv.DictReader(file), key=lambda row: (float(row["factor"]), order.index(row["variant"])))
    lines = [["length", "", *(name.replace("_", " ") for name in MEASURES), "processor seconds per clip"], ["---"] * 8]
    for row in rows:
        cells = [f"{float(row[n]):.2f} [{float(row[f'{n}_low']):.2f}, {float(row[f'{n}_high']):.2f}]" for n in MEASURES]
        lines.append([f"{row['factor']}x, {row['frames']} frames", row["variant"], *cells, row["sample_seconds"]])
    loras = dict.fromkeys(f"{row['lora']} at {row['factor']}x" for row in rows if row["lora"])
    dates = sorted({row["date"] for row in rows})
    note = f"tiny-wan, {rows[-1]['clips']} held-out captions, 12 steps, {' and '.join(dates)}."
    note += f" Length LoRAs: {'; '.join(loras)}." if loras else ""
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + f"\n\n<sub>{note}</sub>"


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `python -m genattn.pipelines.tiny.studies.long_clip`."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("assets/tiny-wan"), help="the exported pipeline")
    parser.add_argument("--factors", type=float, nargs="+", default=[2, 4], help="lengths in multiples of the model's own")
    parser.add_argument("--count", type=int, default=24, help="captions, at least 2")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--lora", type=Path, nargs="+", default=[], help="folders lora/ of fine-tuning runs at these lengths")
    parser.add_argument("--seed", type=int, default=0, help="of the noise")
    parser.add_argument("--table", type=Path, help="CSV file to append the rows to")
    options = parser.parse_args(arguments)
    if options.count < 2 or min(options.factors) <= 0:
        raise GenAttnError(f"count must be >= 2 and factors > 0, got {options.count} and {options.factors}")
    if not (options.model / DEFAULTS_FILE).exists():
        raise GenAttnError(f"the model must be a tiny pipeline's folder with {DEFAULTS_FILE}, got {options.model}")
    for factor in options.factors:
        study(options.model, factor, options.count, options.variants, options.seed, options.table, options.lora)


if __name__ == "__main__":
    main()
