"""What the LoRA for motions that go on teaches tiny-wan-long, and what it leaves of the motions that the model knew.

    python -m genattn.pipelines.tiny.studies.endless_scores --lora FILE --count 40 --table assets/bench/endless.csv

A row is one clip: the first held-out captions with an endless motion and the first with one of the eight, by the model as it is
and with the LoRA, from the same noise, judged by the tiny world's oracle. Clips that the table has are not made again.
"""

import argparse
import csv
import itertools
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.pipelines.wan.pipeline_wan import WanPipeline

from genattn.errors import GenAttnError
from genattn.fingerprint import model_fingerprint
from genattn.pipelines.tiny.evaluate import Sampling, append_rows, generate_clips, provenance, wilson
from genattn.pipelines.tiny.export import DEFAULTS_FILE, GenerationDefaults
from genattn.pipelines.tiny.oracle import judge
from genattn.pipelines.tiny.world import ENDLESS, MOTIONS, Scene, caption, sample_scene

KINDS = {"endless": tuple(ENDLESS), "known": tuple(MOTIONS)}
ARMS = ("as it is", "with the LoRA")
SHARES = ("motion", "shape", "colour")


def held_out_scenes(kind: str, count: int) -> list[Scene]:
    """The first `count` held-out scenes of one object with different captions, of "endless" or of "known" motions."""
    drawn = (sample_scene(seed, held_out=True, two_objects=0.0, motions=KINDS[kind]) for seed in itertools.count())
    found: dict[str, Scene] = {}
    for scene in drawn:
        found.setdefault(caption(scene), scene)
        if len(found) == count:
            break
    return list(found.values())


def clip_row(pipe: Any, scene: Scene, seed: int, sampling: Sampling, size: GenerationDefaults) -> dict[str, Any]:
    """Make a clip and judge it: 1 or 0 for what was asked, the motion that is read, how steady the subject is."""
    begun = time.process_time()
    clip = generate_clips(pipe, [scene], replace(sampling, seed=seed), size)[0]
    verdict = judge(clip, scene)
    thing = verdict.objects[0]
    row: dict[str, Any] = {
        "caption": caption(scene),
        "seed": seed,
        "asked": thing.asked.motion,
        "read": thing.read.motion or "",
    }
    row |= {name: int(getattr(thing, name)) for name in SHARES}
    row |= {"consistency": round(verdict.consistency, 4), "motion_amount": round(verdict.motion_amount, 4)}
    return row | {"steps": sampling.steps, "seconds": round(time.process_time() - begun, 2)}


def study(model: Path, lora: Path | None, count: int, kinds: Sequence[str], arms: Sequence[str], table: Path | None) -> None:
    """Make and judge the clips that the table does not have."""
    size = GenerationDefaults(**json.loads((model / DEFAULTS_FILE).read_text()))
    pipe = WanPipeline.from_pretrained(model).to(torch.float32)
    pipe.set_progress_bar_config(disable=True)
    sampling = Sampling(size.steps, size.guidance_scale, batch=1)
    for arm in arms:
        if arm == "with the LoRA" and lora is not None:
            pipe.load_lora_weights(lora.parent, weight_name=lora.name)
        weights = model_fingerprint({"transformer": pipe.transformer})
        for kind in kinds:
            for seed, scene in enumerate(held_out_scenes(kind, count)):
                if (weights, caption(scene)) in _done(table):
                    continue
                row = {"arm": arm, "kind": kind, "weights": weights, **clip_row(pipe, scene, seed, sampling, size)}
                print(json.dumps(row), flush=True)
                if table is not None:
                    append_rows(table, [row | provenance(cpu=True)])


def _done(table: Path | None) -> set[tuple[str, str]]:
    return {(row["weights"], row["caption"]) for row in _read(table)}


def _read(table: Path | None) -> list[dict[str, str]]:
    if table is None or not table.is_file():
        return []
    with table.open(newline="") as file:
        return list(csv.DictReader(file))


def scores_markdown(table: Path) -> str:
    """For the manual: shares with Wilson's 95 % interval, over the captions that both arms have."""
    rows = _read(table)
    lines = [["captions ask for", "", "captions", *SHARES, "consistency", "motion: gained, lost"], ["---"] * 8]
    for kind in dict.fromkeys(row["kind"] for row in rows):
        arms: dict[str, dict[str, dict[str, str]]] = {}
        for row in rows:
            if row["kind"] == kind:
                arms.setdefault(row["arm"], {})[row["caption"]] = row
        shared = [text for text in next(iter(arms.values())) if all(text in found for found in arms.values())]
        lines += [_line(kind, arm, [found[text] for text in shared], arms, shared) for arm, found in arms.items()]
    dates = " and ".join(sorted({row["date"] for row in rows}))
    note = f"tiny-wan-long, one object, held-out captions, {rows[0]['steps']} steps, the same noise; shares with Wilson's 95 % "
    note += (
        f"interval. Gained, lost: clips whose motion is right with the LoRA alone, and without it alone. {rows[0]['device']}, "
    )
    note += f"torch {rows[0]['torch']}, {dates}."
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + f"\n\n<sub>{note}</sub>"


def _line(kind: str, arm: str, found: Sequence[dict[str, str]], arms: Any, shared: Sequence[str]) -> list[str]:
    cells = []
    for name in SHARES:
        right = sum(int(row[name]) for row in found)
        low, high = wilson(right, len(found))
        cells.append(f"{right / len(found):.2f} [{low:.2f}, {high:.2f}]")
    steady = f"{np.mean([float(row['consistency']) for row in found]):.2f}"
    change = "-"
    if arm != "as it is" and "as it is" in arms:
        before = [int(arms["as it is"][text]["motion"]) for text in shared]
        pairs = list(zip(before, (int(row["motion"]) for row in found), strict=True))
        change = f"{pairs.count((0, 1))}, {pairs.count((1, 0))}"
    asked = {"endless": "motions that go on", "known": "the eight motions"}[kind]
    return [asked, arm, str(len(found)), *cells, steady, change]


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `python -m genattn.pipelines.tiny.studies.endless_scores`."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("assets/tiny-wan-long"), help="the exported pipeline")
    parser.add_argument("--lora", type=Path, help="the LoRA's safetensors file")
    parser.add_argument("--count", type=int, default=40, help="captions of either kind, at most 99")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="what the captions ask for")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="which models")
    parser.add_argument("--table", type=Path, help="CSV file to append the rows to")
    options = parser.parse_args(arguments)
    if not 1 <= options.count <= 99:
        raise GenAttnError(
            f"count must lie in 1 to 99, got {options.count}: there are no more held-out captions; ask for fewer"
        )
    if not (options.model / DEFAULTS_FILE).exists():
        raise GenAttnError(f"the model must be a tiny pipeline's folder with {DEFAULTS_FILE}, got {options.model}")
    if "with the LoRA" in options.arms and (options.lora is None or not options.lora.is_file()):
        raise GenAttnError(f"lora must be a safetensors file, got {options.lora}; train one, or give --arms 'as it is'")
    # the LoRA is put on once and stays
    study(options.model, options.lora, options.count, options.kinds, [a for a in ARMS if a in options.arms], options.table)


if __name__ == "__main__":
    main()
