"""What head guidance is worth on `tiny-sd3`, judged by the oracle on captions that neither training nor the hunt has seen.

Conditions of equal cost: hunted heads, the best whole layer, random head sets of the same size, the hunted heads at other u;
beside them no guidance, CFG, and hunted heads with CFG. The hunt, the choice of layer and of u use the same hunting captions.
Differences come with bootstrap intervals over the captions; the probe's worth is its rank correlation with the full search and
the forwards saved.

    python -m genattn.pipelines.tiny.studies.sd3 --model assets/tiny-sd3 --run-dir runs/tiny-sd3 --csv assets/bench/softpag.csv
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusion3Pipeline

from genattn.errors import GenAttnError
from genattn.guidance.headhunter.hunter import HeadHunter, as_samples
from genattn.guidance.headhunter.search import bootstrap_interval, rank_correlation
from genattn.guidance.heads.head_set import HeadSet
from genattn.guidance.softpag.softpag import SoftPAG
from genattn.pipelines.tiny.evaluate import FIRST_SEED, append_rows, evaluation_scenes, provenance
from genattn.pipelines.tiny.oracle_objective import caption_match, still_marks
from genattn.pipelines.tiny.sd3_card import write_sd3_card
from genattn.pipelines.tiny.world import caption
from genattn.seam.handle import apply
from genattn.seam.plugin import Plugin

Scores = np.ndarray
MARKS = ("colour", "shape", "size")
U_SWEEP = (0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class StudySettings:
    """How to study.

    Attributes:
        count: held-out captions that judge, >= 2.
        hunting: captions of the hunt, >= 2, others than those.
        rounds: rounds of the hunt.
        top_k: heads per round.
        scale: weight w of every perturbation term.
        guidance_scale: g where CFG is on.
        steps: denoising steps.
        batch: pictures per batch.
        random_sets: head sets drawn at random, >= 1.
        seed: first seed of the noise and of the random sets.
        max_sequence_length: how many zeros stand for the third text encoder's answer, >= 1; fewer cost less.
    """

    count: int = 300
    hunting: int = 20
    rounds: int = 3
    top_k: int = 3
    scale: float = 3.0
    guidance_scale: float = 3.0
    steps: int = 20
    batch: int = 16
    random_sets: int = 8
    seed: int = 0
    max_sequence_length: int = 256

    @property
    def size(self) -> dict[str, int]:
        """What every call of the pipeline is given."""
        length = self.max_sequence_length
        return {"height": 64, "width": 64, "num_inference_steps": self.steps, "max_sequence_length": length}

    def __post_init__(self) -> None:
        ones = (self.rounds, self.top_k, self.steps, self.batch, self.random_sets, self.max_sequence_length)
        if min(self.count, self.hunting) < 2 or min(ones) < 1:
            raise GenAttnError(f"count and hunting must be >= 2, all other numbers >= 1, got {self}; correct it")


class HeadStudy:
    """The study of one model.

    Args:
        pipe: the pipeline.
        settings: how to study.
        run_dir: where the hunt's log and head set go.
    """

    def __init__(self, pipe: StableDiffusion3Pipeline, settings: StudySettings, run_dir: Path) -> None:
        self.pipe, self.settings, self.run_dir = pipe, settings, run_dir
        texts = [caption(scene) for scene in evaluation_scenes(settings.count + settings.hunting, FIRST_SEED)]
        self.hunting, self.judging = texts[: settings.hunting], texts[settings.hunting :]

    def hunter(self, name: str, **changes: Any) -> HeadHunter:
        """A hunt without CFG on the hunting captions, remembered in run_dir/name."""
        settings = self.settings
        call = {**settings.size, "guidance_scale": 1.0}
        base = {"rounds": settings.rounds, "top_k": settings.top_k, "u_grid": (0.25, 0.5, 1.0), "batch": settings.batch}
        return HeadHunter(
            self.pipe,
            {"match": caption_match},
            self.hunting,
            log=self.run_dir / name,
            scale=settings.scale,
            call=call,
            **{**base, **changes},
        )

    def scores(self, texts: Sequence[str], guidance_scale: float, plugin: Plugin | None) -> Scores:
        """The oracle's marks of one picture per caption, float64 [N, 4]: the caption's match, colour, shape, size."""
        found: list[list[float]] = []
        for first in range(0, len(texts), self.settings.batch):
            part = list(texts[first : first + self.settings.batch])
            seeds = range(self.settings.seed + first, self.settings.seed + first + len(part))
            found += still_marks(list(self._pictures(part, seeds, guidance_scale, plugin)), part)
        return np.array(found)

    def _pictures(self, texts: list[str], seeds: Sequence[int], guidance_scale: float, plugin: Plugin | None) -> torch.Tensor:
        def generate() -> torch.Tensor:
            out = self.pipe(
                prompt=texts,
                **self.settings.size,
                guidance_scale=guidance_scale,
                generator=[torch.Generator().manual_seed(seed) for seed in seeds],
                output_type="pt",
                return_dict=False,
            )
            return as_samples(out[0])

        if plugin is None:
            return generate()
        with apply(self.pipe, plugin):
            return generate()

    def run(self) -> list[dict[str, Any]]:
        """Hunt, compare, and give the rows of the table."""
        head_set = self.hunter("hunt.jsonl").run()
        head_set.save(self.run_dir / "heads.json")
        plugins = self.conditions(head_set)
        table = {name: self.scores(self.judging, g, plugin) for name, (g, plugin) in plugins.items()}
        return [*compare(table), self.probe_row()]

    def conditions(self, head_set: HeadSet) -> Mapping[str, tuple[float, SoftPAG | None]]:
        """{name: (guidance scale of CFG, plugin)}; the layer is the best one on the hunting captions."""
        settings, u = self.settings, next(iter(head_set.heads.values()))
        weak: dict[str, Any] = {"scale": settings.scale}
        layers = {f"L{layer}": SoftPAG.pag(f"L{layer}", u=u, **weak) for layer in head_set.layer_map}
        best = max(layers, key=lambda name: (self.scores(self.hunting, 1.0, layers[name])[:, 0].mean(), name))
        rng, pool = (
            np.random.default_rng(settings.seed),
            sorted((k, h) for k, n in head_set.layer_map.items() for h in range(n)),
        )
        drawn = [rng.choice(len(pool), len(head_set.heads), replace=False) for _ in range(settings.random_sets)]
        chosen = {f"random {i}": SoftPAG([pool[j] for j in picks], u=u, **weak) for i, picks in enumerate(drawn)}
        return {
            "unguided": (1.0, None),
            "cfg": (settings.guidance_scale, None),
            "hunted": (1.0, SoftPAG.from_head_set(head_set)),
            "hunted + cfg": (settings.guidance_scale, SoftPAG.from_head_set(head_set)),
            f"layer {best}": (1.0, layers[best]),
            **{name: (1.0, plugin) for name, plugin in chosen.items()},
            **{f"u {u:g}": (1.0, SoftPAG(list(head_set.heads), u=u, **weak)) for u in U_SWEEP},
        }

    def probe_row(self) -> dict[str, Any]:
        """The probe's order of the heads against the full search's, in the first round, and what both cost."""
        full = self.hunter("full.jsonl", rounds=1, u_grid=())
        probe = self.hunter("probe.jsonl", rounds=1, u_grid=(), probe_keep=0)
        first, second = full.run().scores, probe.run().scores
        heads = sorted(set(first) & set(second))
        agreement = rank_correlation([first[h] for h in heads], [second[h] for h in heads])
        spent, saved = full.forwards, probe.forwards + (probe.probe.passes if probe.probe else 0.0)
        row = dict.fromkeys(("mean", "low", "high", *MARKS, "hunted_minus", "minus_low", "minus_high"), "")
        ratio = round(spent / saved, 2) if saved else ""
        return {
            "condition": "probe",
            "captions": len(heads),
            **row,
            "rank_correlation": round(agreement, 4),
            "forwards_ratio": ratio,
        }


def compare(table: Mapping[str, Scores]) -> list[dict[str, Any]]:
    """A row per condition: mean with interval, and how much better the hunted heads are, with interval.

    Args:
        table: {condition: marks [N, 4]}, with "hunted"; "random ..." are averaged into one.
    """
    drawn = [scores for name, scores in table.items() if name.startswith("random")]
    shown = {name: scores for name, scores in table.items() if not name.startswith("random")}
    if drawn:
        shown["random sets"] = np.mean(drawn, axis=0)
    rows = []
    for name, marks in shown.items():
        scores = marks[:, 0]
        gain = shown["hunted"][:, 0] - scores
        low, high = bootstrap_interval(scores)
        worse, better = bootstrap_interval(gain)
        rows.append(
            {
                "condition": name,
                "captions": len(scores),
                "mean": round(float(scores.mean()), 4),
                "low": round(low, 4),
                "high": round(high, 4),
                **{mark: round(float(value), 4) for mark, value in zip(MARKS, marks[:, 1:].mean(0), strict=True)},
                "hunted_minus": round(float(gain.mean()), 4),
                "minus_low": round(worse, 4),
                "minus_high": round(better, 4),
                "rank_correlation": "",
                "forwards_ratio": "",
            }
        )
    return rows


def short_study(doc: str | None) -> argparse.ArgumentParser:
    """The options that the smaller studies of this model share; add yours."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of tiny-sd3")
    parser.add_argument("--csv", type=Path, required=True, help="table to append to")
    parser.add_argument("--steps", type=int, default=6, help="denoising steps")
    return parser


def on_one_core(model: Path, settings: StudySettings, run_dir: Path) -> HeadStudy:
    """A study of the pipeline in folder `model`, on one core of the CPU."""
    torch.set_num_threads(1)
    pipe = StableDiffusion3Pipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    return HeadStudy(pipe, settings, run_dir)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `python -m genattn.pipelines.tiny.studies.sd3`."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("assets/tiny-sd3"), help="the exported pipeline")
    parser.add_argument("--run-dir", type=Path, required=True, help="where the hunt's log and head set go")
    parser.add_argument("--csv", type=Path, help="table to append the rows to")
    parser.add_argument("--card-from", type=Path, help="training run from which to write the model card")
    parser.add_argument("--cpu", action="store_true", help="stay on the CPU even where there is a GPU")
    for name, default in vars(StudySettings()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    options = parser.parse_args(arguments)
    if not (options.model / "model_index.json").exists():
        raise GenAttnError(f"the model must be a pipeline folder, got {options.model} without model_index.json; export")
    settings = StudySettings(**{name: getattr(options, name) for name in vars(StudySettings())})
    pipe = StableDiffusion3Pipeline.from_pretrained(options.model)
    pipe.to("cpu" if options.cpu or not torch.cuda.is_available() else "cuda")
    pipe.set_progress_bar_config(disable=True)
    rows = HeadStudy(pipe, settings, options.run_dir).run()
    heads = HeadSet.load(options.run_dir / "heads.json").heads
    facts: dict[str, Any] = provenance(options.cpu) | {"seed": settings.seed, "steps": settings.steps, "scale": settings.scale}
    facts |= {"max_sequence_length": settings.max_sequence_length, "hunting": settings.hunting}
    facts["heads"] = " ".join(f"L{layer}H{head}" for layer, head in heads)
    for row in rows:
        print(json.dumps(row), flush=True)
    rows = [facts | row for row in rows]
    if options.csv is not None:
        append_rows(options.csv, rows)
    if options.card_from is not None:
        write_sd3_card(options.model, options.card_from, rows)


if __name__ == "__main__":
    main()
