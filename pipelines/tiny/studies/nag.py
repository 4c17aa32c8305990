"""Does a negative prompt at guidance scale 1 keep out what it names? NAG on a tiny pipeline, judged by the oracle.

A caption with one word left out (the colour, the shape, or the motion) leaves that attribute to the model. Each of some
values is then named in the negative prompt, with the same noise: by its word alone, or by the caption's own sentence with that
word in its place. Measured: how often the answer shows the named value, without and with NAG, and whether the rest of what the
caption asks for is still there. Differences are paired by caption, with 95 % bootstrap intervals over the captions. Settings
are chosen on other captions (`--first-seed`) than those that the tables report.

    python -m genattn.pipelines.tiny.studies.nag --model assets/tiny-sd3 --count 40 --csv assets/bench/nag.csv
"""

import argparse
import contextlib
import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from diffusers import DiffusionPipeline

from genattn.errors import GenAttnError
from genattn.guidance.headhunter.search import bootstrap_interval
from genattn.guidance.nag import NAG
from genattn.pipelines.tiny.evaluate import FIRST_SEED, append_rows, evaluation_scenes, provenance
from genattn.pipelines.tiny.export import DEFAULTS_FILE, GenerationDefaults
from genattn.pipelines.tiny.oracle import read_background, read_object
from genattn.pipelines.tiny.segment import find_objects
from genattn.pipelines.tiny.world import COLOURS, MOTIONS, SHAPES, Scene, caption
from genattn.seam.handle import apply

VALUES: dict[str, tuple[str, ...]] = {"colour": tuple(COLOURS), "shape": SHAPES, "motion": ("right", "up", "still", "grows")}
REST: dict[str, tuple[str, ...]] = {
    "colour": ("shape", "motion", "background"),
    "shape": ("colour", "motion", "background"),
    "motion": ("colour", "shape", "background"),
}
Read = dict[str, str | None]


@dataclass(frozen=True)
class StudySettings:
    """How to study.

    Attributes:
        count: captions with one object each, >= 2.
        steps: denoising steps, >= 1.
        batch: samples per batch, >= 1.
        seed: of the first caption's noise.
        scale: of NAG.
        tau: of NAG.
        alpha: of NAG.
        max_sequence_length: tokens that the text is filled up to, >= 1; fewer cost less.
        naming: "word" for the value's word as negative prompt, "sentence" for the caption with it.
        first_seed: of the captions; >= 1,000,000, below are those of the training.
    """

    count: int = 40
    steps: int = 6
    batch: int = 12
    seed: int = 0
    scale: float = 5.0
    tau: float = 2.5
    alpha: float = 0.25
    max_sequence_length: int = 16
    naming: str = "sentence"
    first_seed: int = FIRST_SEED

    def __post_init__(self) -> None:
        if self.count < 2 or min(self.steps, self.batch, self.max_sequence_length) < 1:
            raise GenAttnError(f"count must be >= 2, steps, batch and max_sequence_length >= 1, got {self}; correct it")
        if self.naming not in ("word", "sentence") or self.first_seed < FIRST_SEED:
            raise GenAttnError(f"naming must be word or sentence and first_seed >= {FIRST_SEED}, got {self}; correct it")


def open_caption(scene: Scene, attribute: str) -> str:
    """The scene's caption without the words for one attribute, e.g. "a circle moves right on a dark background"."""
    thing = scene.objects[0]
    word = {"colour": thing.colour, "shape": thing.shape, "motion": MOTIONS[thing.motion]}[attribute]
    return " ".join(caption(scene).replace(word, "", 1).split())


def negative_word(attribute: str, value: str) -> str:
    """What names a value: "red", "circle", "moves right"."""
    return MOTIONS[value] if attribute == "motion" else value


def negative_text(scene: Scene, attribute: str, value: str, naming: str) -> str:
    """The negative prompt that names a value, by `StudySettings.naming`."""
    if naming == "word":
        return negative_word(attribute, value)
    changed: dict[str, Any] = {attribute: value}
    return caption(replace(scene, objects=(replace(scene.objects[0], **changed),)))


def read(clip: npt.NDArray[np.uint8]) -> Read:
    """Colour, shape, motion and background of a clip [T, H, W, 3]; None for what cannot be told."""
    found = find_objects(clip)
    if not found:
        return dict.fromkeys(("colour", "shape", "motion", "background"))
    largest = max(found, key=lambda thing: float(thing.mask.sum()))
    seen = asdict(read_object(largest)) if len(clip) >= 3 else {**asdict(read_object(largest)), "motion": None}
    return {**{name: seen[name] for name in ("colour", "shape", "motion")}, "background": read_background(clip)}


class NegativeStudy:
    """The study of one model.

    Args:
        pipe: a tiny pipeline.
        size: the settings it was made for.
        settings: how to study.
    """

    def __init__(self, pipe: Any, size: GenerationDefaults, settings: StudySettings) -> None:
        self.pipe, self.size, self.settings = pipe, size, settings
        every = [scene for scene in evaluation_scenes(2 * settings.count, settings.first_seed) if len(scene.objects) == 1]
        self.scenes = every[: settings.count]

    @property
    def attributes(self) -> tuple[str, ...]:
        """What can be read from this model's answers."""
        return tuple(VALUES) if self.size.frames >= 3 else ("colour", "shape")

    def clips(self, prompts: Sequence[str], seeds: Sequence[int], negatives: Sequence[str] | None) -> list[Read]:
        """What the oracle reads in one answer per prompt."""
        found: list[Read] = []
        for first in range(0, len(prompts), self.settings.batch):
            part = slice(first, first + self.settings.batch)
            own = None if negatives is None else list(negatives[part])
            frames = self._sample(list(prompts[part]), seeds[part], own)
            found += [read(clip) for clip in frames]
        return found

    def _sample(self, prompts: list[str], seeds: Sequence[int], negatives: list[str] | None) -> npt.NDArray[np.uint8]:
        settings, size = self.settings, self.size
        frames = {"num_frames": size.frames} if size.frames > 1 else {}
        strength = (settings.scale, settings.tau, settings.alpha)
        plugin = None if negatives is None else NAG(negatives, *strength)
        with contextlib.nullcontext() if plugin is None else apply(self.pipe, plugin):
            out = self.pipe(
                prompt=prompts,
                height=size.height,
                width=size.width,
                num_inference_steps=settings.steps,
                guidance_scale=1.0,
                max_sequence_length=settings.max_sequence_length,
                generator=[torch.Generator().manual_seed(seed) for seed in seeds],
                output_type="np",
                return_dict=False,
                **frames,
            )[0]
        pixels = np.round(np.clip(np.asarray(out), 0, 1) * 255).astype(np.uint8)
        return pixels if pixels.ndim == 5 else pixels[:, None]

    def row(self, attribute: str) -> dict[str, Any]:
        """How often the named value is there without and with NAG, and the rest."""
        prompts = [open_caption(scene, attribute) for scene in self.scenes]
        seeds = [self.settings.seed + i for i in range(len(prompts))]
        plain = self.clips(prompts, seeds, None)
        values = VALUES[attribute]
        pairs = [(i, value) for i in range(len(prompts)) for value in values]
        guided = self.clips(
            [prompts[i] for i, _ in pairs],
            [seeds[i] for i, _ in pairs],
            [negative_text(self.scenes[i], attribute, v, self.settings.naming) for i, v in pairs],
        )
        names = tuple(name for name in REST[attribute] if name != "motion" or self.size.frames >= 3)
        return {"attribute": attribute, **compare(self.scenes, plain, dict(zip(pairs, guided)), attribute, values, names)}


def compare(
    scenes: Sequence[Scene],
    plain: Sequence[Read],
    guided: Mapping[tuple[int, str], Read],
    attribute: str,
    values: Sequence[str],
    rest: Sequence[str],
) -> dict[str, Any]:
    """Shares of the named value and of the rest, without and with NAG, and their differences with intervals.

    Args:
        scenes: what was asked for.
        plain: what was read without NAG, one per scene.
        guided: what was read with NAG, per scene and named value.
        attribute: the one left out of the captions.
        values: those named in turn.
        rest: the attributes that must stay.
    """
    n = range(len(scenes))
    before = np.array([np.mean([plain[i][attribute] == value for value in values]) for i in n])
    after = np.array([np.mean([guided[i, value][attribute] == value for value in values]) for i in n])
    kept_before = np.array([_kept(scenes[i], plain[i], rest) for i in n])
    kept_after = np.array([np.mean([_kept(scenes[i], guided[i, value], rest) for value in values]) for i in n])
    low, high = bootstrap_interval(after - before)
    rest_low, rest_high = bootstrap_interval(kept_after - kept_before)
    numbers = {
        "named_without": before.mean(),
        "named_with": after.mean(),
        "difference": (after - before).mean(),
        "difference_low": low,
        "difference_high": high,
        "rest_without": kept_before.mean(),
        "rest_with": kept_after.mean(),
        "rest_difference": (kept_after - kept_before).mean(),
        "rest_low": rest_low,
        "rest_high": rest_high,
    }
    return {"captions": len(scenes), "values": len(values), **{name: round(float(v), 4) for name, v in numbers.items()}}


def _kept(scene: Scene, seen: Read, rest: Sequence[str]) -> float:
    thing = scene.objects[0]
    asked = {"colour": thing.colour, "shape": thing.shape, "motion": thing.motion, "background": scene.background}
    return float(np.mean([seen[name] == asked[name] for name in rest]))


def markdown(file: Path, held_out: bool) -> str:
    """For the manual: a row per setting and attribute; the captions that settings were chosen on, or those that judge.

    Args:
        file: the study's table.
        held_out: rows whose captions begin at `FIRST_SEED`, else the others.
    """
    with file.open(newline="") as handle:
        rows = [row for row in csv.DictReader(handle) if (int(row["first_seed"]) == FIRST_SEED) is held_out]
    head = ["model", "named by", "scale, tau, alpha", "left open", "shows named value", "change", "shows rest", "change"]
    lines = [head, ["---"] * len(head)]
    for row in rows:
        strength = ", ".join(f"{float(row[name]):g}" for name in ("scale", "tau", "alpha"))
        named, rest = (f"{float(row[a]):.3f} to {float(row[b]):.3f}" for a, b in (_NAMED, _REST))
        cells = [row["model"], row["naming"], strength, f"{row['attribute']} ({row['captions']} captions)"]
        lines.append([*cells, named, _interval(row, "difference", ""), rest, _interval(row, "rest_difference", "rest_")])
    body = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    places = {f"{row['device']}, torch {row['torch']}, diffusers {row['diffusers']}, {row['date']}" for row in rows}
    commits = sorted({row["commit"] for row in rows})
    return f"{body}\n\n<sub>{'; '.join(sorted(places))}, commit {', '.join(commits)}.</sub>"


_NAMED, _REST = ("named_without", "named_with"), ("rest_without", "rest_with")


def _interval(row: Mapping[str, str], name: str, prefix: str) -> str:
    low, high = (float(row[f"{prefix or 'difference_'}{side}"]) for side in ("low", "high"))
    return f"{float(row[name]):+.3f} [{low:+.3f}, {high:+.3f}]"


def load(folder: Path) -> tuple[Any, GenerationDefaults]:
    """A tiny pipeline in float32 and the settings it was made for; raises GenAttnError if the folder holds none."""
    path = folder / DEFAULTS_FILE
    if not path.exists():
        raise GenAttnError(f"the model must be a tiny pipeline's folder with {DEFAULTS_FILE}, got {folder}; train one first")
    pipe = DiffusionPipeline.from_pretrained(folder).to(torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe, GenerationDefaults(**json.loads(path.read_text()))


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of a tiny pipeline")
    parser.add_argument("--csv", type=Path, required=True, help="table to append to")
    parser.add_argument("--attribute", action="append", choices=list(VALUES), help="only this one; several allowed")
    for name, value in asdict(StudySettings()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    given = vars(parser.parse_args(arguments))
    folder, table, wanted = given.pop("model"), given.pop("csv"), given.pop("attribute")
    settings = StudySettings(**given)
    pipe, size = load(folder)
    torch.set_num_threads(1)
    shown = {name: value for name, value in asdict(settings).items() if name not in ("count", "batch")}
    study = NegativeStudy(pipe, size, settings)
    for attribute in wanted or study.attributes:
        row = study.row(attribute)
        append_rows(table, [{**provenance(cpu=True), "model": folder.name, **shown, **row}])
        print(json.dumps(row))


if __name__ == "__main__":
    main()
