"""What hunted heads are worth on `tiny-wan` and `tiny-wan-long`, judged by the oracle on captions that no hunt has seen.

Small by design, for a clip costs seconds to minutes on a CPU. One round of HeadHunter chooses heads, the cheap probe the
whole layer that stands against them; random sets of the same size are the other control. All three cost one perturbed pass
per step. Nothing is tuned on the captions that judge: u and scale are given. Every caption is answered under every condition
before the next begins, so a run that is stopped still compares like with like, and the same call goes on.

    python -m genattn.pipelines.tiny.studies.clip_heads --model assets/tiny-wan --run-dir runs/heads \\
        --csv assets/bench/clip_heads.csv
"""

import argparse
import csv
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from genattn.errors import GenAttnError
from genattn.guidance.headhunter.hunter import HeadHunter, as_samples
from genattn.guidance.headhunter.search import bootstrap_interval
from genattn.guidance.heads.head_set import HeadSet
from genattn.guidance.heads.names import HeadWeights
from genattn.guidance.softpag.softpag import SoftPAG
from genattn.pipelines.tiny.evaluate import FIRST_SEED, append_rows, evaluation_scenes, provenance
from genattn.pipelines.tiny.export import GenerationDefaults
from genattn.pipelines.tiny.oracle_objective import caption_match
from genattn.pipelines.tiny.studies.nag import load
from genattn.pipelines.tiny.world import caption
from genattn.seam.handle import apply

Scores = dict[str, list[float]]
CONDITIONS = ("unguided", "cfg", "hunted", "layer")


@dataclass(frozen=True)
class StudySettings:
    """How to study.

    Attributes:
        count: captions that judge, >= 2.
        hunting: captions of the hunt, >= 1.
        top_k: heads in the set, >= 1.
        u: weight of the heads, in hunt and judgement.
        scale: weight w of the perturbation term.
        guidance_scale: g where CFG is on.
        steps: denoising steps, >= 1.
        random_sets: head sets drawn at random, >= 1.
        probe: 1 to let the probe alone choose heads, 0 for whole clips (halving over the captions).
        seed: first seed of the noise, and of the random sets.
        max_sequence_length: tokens that the text is filled up to.
    """

    count: int = 24
    hunting: int = 8
    top_k: int = 3
    u: float = 0.5
    scale: float = 3.0
    guidance_scale: float = 3.0
    steps: int = 8
    random_sets: int = 2
    probe: int = 0
    seed: int = 0
    max_sequence_length: int = 64

    def __post_init__(self) -> None:
        ones = (self.hunting, self.top_k, self.steps, self.random_sets, self.max_sequence_length)
        if self.count < 2 or min(ones) < 1 or self.probe not in (0, 1):
            raise GenAttnError(f"count must be >= 2, probe 0 or 1, all other numbers >= 1, got {self}; correct it")


class ClipHeadStudy:
    """The study of one model.

    Args:
        pipe: a tiny Wan pipeline.
        size: the settings that it was made for.
        settings: how to study.
        run_dir: where the hunt's log, the head set and the scores go.
    """

    def __init__(self, pipe: Any, size: GenerationDefaults, settings: StudySettings, run_dir: Path) -> None:
        self.pipe, self.size, self.settings, self.run_dir = pipe, size, settings, run_dir
        texts = [caption(scene) for scene in evaluation_scenes(settings.count + settings.hunting, FIRST_SEED)]
        self.hunting, self.judging = texts[: settings.hunting], texts[settings.hunting :]
        self.call = {
            "height": size.height,
            "width": size.width,
            "num_frames": size.frames,
            "num_inference_steps": settings.steps,
            "max_sequence_length": settings.max_sequence_length,
        }

    def hunter(self) -> HeadHunter:
        """One round without CFG on the hunting captions, remembered in run_dir; it has a probe in either case."""
        settings = self.settings
        search: dict[str, Any] = {"probe_keep": 0, "probe_moments": (0.6,)} if settings.probe else {"halving": 2}
        return HeadHunter(
            self.pipe,
            {"match": caption_match},
            self.hunting,
            log=self.run_dir / "hunt.jsonl",
            u=settings.u,
            scale=settings.scale,
            call={**self.call, "guidance_scale": 1.0},
            rounds=1,
            top_k=settings.top_k,
            batch=2,
            **search,
        )

    def best_layer(self, hunter: HeadHunter) -> int:
        """The layer whose whole perturbation scores best on the hunting captions, by the hunt's own means."""
        layers: list[HeadWeights] = [
            {(depth, head): self.settings.u for head in range(heads)} for depth, heads in hunter.layers.items()
        ]
        total = np.zeros(len(layers))
        for prompt in range(len(self.hunting)):
            if hunter.probe is not None:
                samples = [moments[0] for moments in hunter.probe.pictures(prompt, {}, layers)]
            else:
                samples = [hunter.guided(prompt, [weights])[0] for weights in layers]
            total += [score["match"] for score in hunter.score(samples, prompt)]
        return list(hunter.layers)[int(total.argmax())]

    def plugins(self, heads: HeadSet, layer: int) -> dict[str, SoftPAG | None]:
        """{condition: plugin}, the random sets as "random 0" and so on."""
        settings = self.settings
        strength: dict[str, Any] = {"u": settings.u, "scale": settings.scale}
        pool = sorted((depth, head) for depth, n in heads.layer_map.items() for head in range(n))
        draw = np.random.default_rng(settings.seed)
        sets = [draw.choice(len(pool), settings.top_k, replace=False) for _ in range(settings.random_sets)]
        drawn = {f"random {i}": SoftPAG([pool[j] for j in picks], **strength) for i, picks in enumerate(sets)}
        stated = (None, None, SoftPAG.from_head_set(heads), SoftPAG.pag(f"L{layer}", **strength))
        return {**dict(zip(CONDITIONS, stated, strict=True)), **drawn}

    def score(self, place: int, name: str, plugin: SoftPAG | None) -> float:
        """The oracle's mark of one caption's clip under one condition."""
        text, g = self.judging[place], self.settings.guidance_scale if name == "cfg" else 1.0
        noise = torch.Generator().manual_seed(self.settings.seed + self.settings.hunting + place)
        arguments = {**self.call, "guidance_scale": g, "generator": [noise], "output_type": "pt", "return_dict": False}
        if plugin is None:
            out = self.pipe(prompt=[text], **arguments)
        else:
            with apply(self.pipe, plugin):
                out = self.pipe(prompt=[text], **arguments)
        return caption_match(list(as_samples(out[0])), [text])[0]

    def judge(self, plugins: Mapping[str, SoftPAG | None], minutes: float) -> Scores:
        """{condition: marks}, a caption at a time and from where the file of scores ends; ends early when time is up.

        Args:
            plugins: the conditions.
            minutes: how long captions may begin.
        """
        file, end = self.run_dir / "scores.jsonl", time.monotonic() + 60 * minutes
        done = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        for place in range(len(done), len(self.judging)):
            if time.monotonic() > end:
                break
            done.append({name: self.score(place, name, plugin) for name, plugin in plugins.items()})
            with file.open("a") as handle:
                handle.write(json.dumps(done[-1]) + "\n")
        return {name: [line[name] for line in done] for name in plugins}

    def run(self, minutes: float) -> tuple[HeadSet, int, Scores]:
        """The hunted heads, the layer against them, and the marks of all conditions."""
        hunter, file = self.hunter(), self.run_dir / "layer.json"
        heads = hunter.run()
        heads.save(self.run_dir / "heads.json")
        if not file.exists():
            file.write_text(json.dumps(self.best_layer(hunter)))
        layer = json.loads(file.read_text())
        return heads, layer, self.judge(self.plugins(heads, layer), minutes)


def compare(scores: Scores) -> list[dict[str, Any]]:
    """A row per condition: mean with interval, and how much better the hunted heads are, with interval.

    Args:
        scores: {condition: marks}, with "hunted"; "random ..." are averaged into one.

    Raises:
        GenAttnError: for fewer than two captions.
    """
    if len(scores["hunted"]) < 2:
        raise GenAttnError(f"a comparison needs at least 2 captions, got {len(scores['hunted'])}; give it more minutes")
    drawn = [marks for name, marks in scores.items() if name.startswith("random")]
    shown = {name: np.array(marks) for name, marks in scores.items() if not name.startswith("random")}
    shown[f"{len(drawn)} random sets"] = np.mean(drawn, axis=0)
    rows = []
    for name, marks in shown.items():
        gain = shown["hunted"] - marks
        numbers = (marks.mean(), *bootstrap_interval(marks), gain.mean(), *bootstrap_interval(gain))
        columns = ("mean", "low", "high", "hunted_minus", "minus_low", "minus_high")
        named = {column: round(float(value), 4) for column, value in zip(columns, numbers, strict=True)}
        rows.append({"condition": name, "captions": len(marks), **named})
    return rows


def markdown(file: Path) -> str:
    """For the manual: a row per model and condition."""
    with file.open(newline="") as handle:
        rows = list(csv.DictReader(handle))
    head = ["model", "condition", "captions", "score", "hunted heads minus this"]
    lines = [head, ["---"] * len(head)]
    for row in rows:
        name = {
            "hunted": f"hunted: {row['heads']}",
            "layer": f"whole layer L{row['layer']}",
            "cfg": f"CFG, scale {float(row['guidance_scale']):g}",
        }
        gain = "" if row["condition"] == "hunted" else _interval(row)
        lines.append([row["model"], name.get(row["condition"], row["condition"]), row["captions"], row["mean"], gain])
    body = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    places = {f"{row['device']}, torch {row['torch']}, diffusers {row['diffusers']}, {row['date']}" for row in rows}
    return f"{body}\n\n<sub>{'; '.join(sorted(places))}, commit {', '.join(sorted({row['commit'] for row in rows}))}.</sub>"


def _interval(row: Mapping[str, str]) -> str:
    gain, low, high = (float(row[name]) for name in ("hunted_minus", "minus_low", "minus_high"))
    return f"{gain:+.3f} [{low:+.3f}, {high:+.3f}]"


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of a tiny Wan pipeline")
    parser.add_argument("--run-dir", type=Path, required=True, help="where the hunt's log and the scores go")
    parser.add_argument("--csv", type=Path, required=True, help="table to append to")
    parser.add_argument("--minutes", type=float, default=1e6, help="begin no further caption after so long")
    for name, value in asdict(StudySettings()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    given = vars(parser.parse_args(arguments))
    folder, run_dir, table, minutes = (given.pop(name) for name in ("model", "run_dir", "csv", "minutes"))
    settings = StudySettings(**given)
    pipe, size = load(folder)
    torch.set_num_threads(1)
    run_dir.mkdir(parents=True, exist_ok=True)
    heads, layer, scores = ClipHeadStudy(pipe, size, settings, run_dir).run(minutes)
    named = " ".join(f"L{depth}H{head}" for depth, head in heads.heads)
    shown = {name: value for name, value in asdict(settings).items() if name != "count"}
    facts = {**provenance(cpu=True), "model": folder.name, **shown, "heads": named, "layer": layer}
    rows = [{**facts, **row} for row in compare(scores)]
    append_rows(table, rows)
    for row in rows:
        print(json.dumps(row))


if __name__ == "__main__":
    main()
