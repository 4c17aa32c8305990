"""Does BroadWay do what it says? A tiny pipeline without it, with each half of it, and with both, on held-out captions.

    stock | self-guidance (alpha, no gain) | enhancement (beta alone) | both

Same captions, same noise. Measured by the tiny world's oracle and by optical flow; differences to stock come with a
bootstrap interval over clips. The claim under test: dynamic degree rises while subject consistency and smoothness do not fall.

    python -m genattn.pipelines.tiny.studies.broadway --model assets/tiny-animatediff --table assets/bench/broadway.csv
"""

import argparse
import contextlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from diffusers import DiffusionPipeline
from tqdm import tqdm

import genattn
from genattn.errors import GenAttnError
from genattn.guidance.broadway.blocks import choose_sites
from genattn.guidance.broadway.broadway import BroadWay
from genattn.guidance.broadway.frame_marginal import edited_attention
from genattn.guidance.broadway.frame_marginal_approx import pooled_edit
from genattn.guidance.broadway.key_frames import key_frames
from genattn.guidance.broadway.temporal_map import MapEdit
from genattn.layouts.site import AttentionSite
from genattn.pipelines.long_video.quality.video_metrics import dynamic_degree, motion_smoothness, temporal_flickering
from genattn.pipelines.tiny.animatediff_card import write_motion_card
from genattn.pipelines.tiny.evaluate import append_rows, evaluation_scenes, provenance
from genattn.pipelines.tiny.export import DEFAULTS_FILE, GenerationDefaults
from genattn.pipelines.tiny.oracle import judge
from genattn.pipelines.tiny.world import Scene, caption
from genattn.seam.plugin import AttentionCall, Inner, Plugin

ASKED = ("colour", "shape", "motion")
MEASURES = ("accuracy", *ASKED, "dynamic_degree", "motion_amount", "consistency", "smoothness", "flickering")
HIGHER_IS_THE_CLAIM = ("dynamic_degree",)
NOT_LOWER_IS_THE_CLAIM = ("consistency", "smoothness")

Clips = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Variant:
    """A name and the plugin it stands for; None is the stock pipeline."""

    name: str
    plugin: Callable[[], BroadWay] | None


def variants(alpha: float = 0.6, beta: float = 1.5, **settings: Any) -> list[Variant]:
    """Stock, each half alone, and both, with further settings of `BroadWay` for all."""
    return [
        Variant("stock", None),
        Variant("self-guidance", lambda: BroadWay(alpha, 1.0, keep_energy=False, **settings)),
        Variant("enhancement", lambda: BroadWay(0.0, beta, **settings)),
        Variant("both", lambda: BroadWay(alpha, beta, **settings)),
    ]


def load(folder: Path) -> tuple[Any, GenerationDefaults]:
    """A tiny pipeline in float32 and the settings it was made for.

    Raises:
        GenAttnError: if the folder holds none.
    """
    path = folder / DEFAULTS_FILE
    if not path.exists():
        raise GenAttnError(f"the model must be a tiny pipeline's folder with {DEFAULTS_FILE}, got {folder}; train one first")
    pipe = DiffusionPipeline.from_pretrained(folder).to(torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe, GenerationDefaults(**json.loads(path.read_text()))


def sample(pipe: Any, scenes: Sequence[Scene], size: GenerationDefaults, variant: Variant, batch: int, seed: int) -> Clips:
    """A clip per scene, uint8 [N, T, H, W, 3]; scene i starts from noise of seed `seed + i` in every variant."""
    clips = []
    plugin = contextlib.nullcontext() if variant.plugin is None else genattn.apply(pipe, variant.plugin())
    with plugin:
        for first in tqdm(range(0, len(scenes), batch), desc=variant.name, mininterval=5.0):
            prompts = [caption(scene) for scene in scenes[first : first + batch]]
            frames = pipe(
                prompt=prompts,
                height=size.height,
                width=size.width,
                num_frames=size.frames,
                num_inference_steps=size.steps,
                guidance_scale=size.guidance_scale,
                generator=[torch.Generator().manual_seed(seed + first + i) for i in range(len(prompts))],
                output_type="np",
            ).frames
            clips.append(np.round(np.clip(np.asarray(frames), 0, 1) * 255).astype(np.uint8))
    return np.concatenate(clips)


def measure(clips: Clips, scenes: Sequence[Scene], fps: float) -> dict[str, npt.NDArray[np.float64]]:
    """`MEASURES` of every clip, each float64 [N].

    accuracy: share of asked colours, shapes and motions that are there, and each alone. dynamic_degree: strongest flow, in
    pixels. motion_amount: path of the objects, in frame sides. consistency: do subjects stay themselves. smoothness,
    flickering: as VBench. All grow with what they are named for, but flickering, which is 1 for a still.
    """
    verdicts = [judge(clip, scene) for clip, scene in zip(clips, scenes, strict=True)]
    columns = {
        "accuracy": [np.mean([verdict.share(name) for name in ASKED]) for verdict in verdicts],
        **{name: [verdict.share(name) for verdict in verdicts] for name in ASKED},
        "dynamic_degree": [dynamic_degree(clip, fps)[0] for clip in clips],
        "motion_amount": [verdict.motion_amount for verdict in verdicts],
        "consistency": [verdict.consistency for verdict in verdicts],
        "smoothness": [motion_smoothness(clip) for clip in clips],
        "flickering": [temporal_flickering(clip) for clip in clips],
    }
    return {name: np.asarray(values, dtype=np.float64) for name, values in columns.items()}


class PooledError(Plugin):
    """How far the pooled edits are from the exact one, on the attention of a trained video DiT; changes nothing.

    errors: pool -> |pooled change - exact change| / |exact change| of every guided call; 1 would be no change at all.
    """

    def __init__(self, pools: Sequence[int] = (1, 2, 4, 99), edit: MapEdit | None = None) -> None:
        self.pools, self.edit = tuple(pools), edit or MapEdit()
        self.errors: dict[int, list[float]] = {pool: [] for pool in self.pools}
        self.changes: list[float] = []
        self._maps: dict[tuple[int | None, str], torch.Tensor] = {}

    def attach(self, model: torch.nn.Module, sites: Sequence[AttentionSite]) -> None:
        """Choose the attentions that BroadWay would guide."""
        self._guided = choose_sites(sites)

    def wants(self, site: AttentionSite) -> bool:
        """Those."""
        return site.name in self._guided.anchor_of

    def attention(self, call: AttentionCall, inner: Inner) -> torch.Tensor:
        """The stock answer, with the errors noted."""
        out = inner(call)
        assert call.layout is not None
        source, frames = self._guided.anchor_of[call.site.name], key_frames(call.layout)
        first = source == call.site.name
        tensors = (call.query, call.key, call.value, frames)
        exact = edited_attention(*tensors, self.edit, anchor=None if first else self._maps[None, source])
        change = (exact.out - out).norm()
        self.changes.append(float(change / out.norm()))
        self._maps[None, source] = exact.rows if first else self._maps[None, source]
        for pool in self.pools:
            anchor = None if first else self._maps[pool, source]
            pooled = pooled_edit(*tensors, call.layout.grid3[1:], self.edit, out, pool, anchor=anchor)
            self.errors[pool].append(float((pooled.out - exact.out).norm() / change))
            if first:
                self._maps[pool, source] = pooled.rows
        return out

    def rows(self) -> list[dict[str, float | int]]:
        """Means over the calls: pool, error, and the size of the exact change over the output's."""
        size = float(np.mean(self.changes))
        return [
            {"pool": p, "error": round(float(np.mean(e)), 4), "exact_change": round(size, 4), "calls": len(e)}
            for p, e in self.errors.items()
        ]


def bootstrap(values: npt.NDArray[np.float64], draws: int = 2000, seed: int = 0) -> tuple[float, float]:
    """The 95 % interval of a mean, by drawing clips again.

    Raises:
        GenAttnError: for fewer than 2 clips.
    """
    if len(values) < 2:
        raise GenAttnError(f"an interval needs at least 2 clips, got {len(values)}; raise count")
    rng = np.random.default_rng(seed)
    means = values[rng.integers(len(values), size=(draws, len(values)))].mean(1)
    low, high = np.percentile(means, (2.5, 97.5))
    return float(low), float(high)


def rows_of(results: dict[str, dict[str, npt.NDArray[np.float64]]], seconds: dict[str, float]) -> list[dict[str, Any]]:
    """One row per variant: means, and differences to stock, clip by clip, with their intervals."""
    rows = []
    for name, measured in results.items():
        row: dict[str, Any] = {"variant": name, "clips": len(measured["accuracy"]), "seconds_per_clip": round(seconds[name], 3)}
        for measure_name in MEASURES:
            difference = measured[measure_name] - results["stock"][measure_name]
            low, high = bootstrap(difference)
            row |= {measure_name: round(float(measured[measure_name].mean()), 5)}
            row |= {f"{measure_name}_change": round(float(difference.mean()), 5)}
            row |= {f"{measure_name}_low": round(low, 5), f"{measure_name}_high": round(high, 5)}
        rows.append(row)
    return rows


def verdict(row: dict[str, Any]) -> str:
    """One sentence on the claim: held, failed (with what), or not decided by so few clips."""
    rises = all(row[f"{name}_low"] > 0 for name in HIGHER_IS_THE_CLAIM)
    falls = [name for name in NOT_LOWER_IS_THE_CLAIM if row[f"{name}_high"] < 0]
    shrinks = [name for name in HIGHER_IS_THE_CLAIM if row[f"{name}_high"] < 0]
    if falls or shrinks:
        return f"{row['variant']}: the claim fails: {', '.join(falls + shrinks)} fell"
    if rises:
        return f"{row['variant']}: the claim holds: dynamic degree rises, consistency and smoothness do not measurably fall"
    return f"{row['variant']}: not decided: the interval of dynamic degree holds 0 with {row['clips']} clips"


def study(
    pipe: Any,
    size: GenerationDefaults,
    kinds: Sequence[Variant],
    scenes: Sequence[Scene],
    batch: int = 8,
    seed: int = 0,
    keep: Path | None = None,
) -> list[dict[str, Any]]:
    """Sample and measure every variant; the first must be stock. Rows as `rows_of`.

    keep: folder for what each variant measured, clip by clip; variants that lie there are not made again.
    """
    if not kinds or kinds[0].plugin is not None:
        raise GenAttnError(f"the first variant must be stock, got {[kind.name for kind in kinds]}; put it first")
    results: dict[str, dict[str, npt.NDArray[np.float64]]] = {}
    seconds = {}
    for kind in kinds:
        kept = None if keep is None else keep / f"{kind.name}-{len(scenes)}-seed{seed}.json"
        if kept is None or not kept.exists():
            begun = time.monotonic()
            clips = sample(pipe, scenes, size, kind, batch, seed)
            seconds[kind.name] = (time.monotonic() - begun) / len(scenes)
            results[kind.name] = measure(clips, scenes, size.fps)
            if kept is not None:
                kept.parent.mkdir(parents=True, exist_ok=True)
                values = {name: column.tolist() for name, column in results[kind.name].items()}
                kept.write_text(json.dumps({"seconds": seconds[kind.name], "measures": values}))
        else:
            found = json.loads(kept.read_text())
            seconds[kind.name] = found["seconds"]
            results[kind.name] = {name: np.asarray(found["measures"][name]) for name in MEASURES}
    return rows_of(results, seconds)


def pooled_errors(
    pipe: Any, size: GenerationDefaults, scenes: Sequence[Scene], options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Rows of `PooledError` over whole runs on the scenes."""
    plugin = PooledError(edit=MapEdit(options.alpha, options.beta))
    with genattn.apply(pipe, plugin):
        sample(pipe, scenes, size, Variant("pooled error", None), options.batch, options.seed)
    return plugin.rows()


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    summary = (__doc__ or "").split("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m genattn.pipelines.tiny.studies.broadway", description=summary)
    parser.add_argument("--model", type=Path, required=True, help="folder of tiny-animatediff or tiny-wan")
    parser.add_argument("--count", type=int, default=200, help="held-out captions")
    parser.add_argument("--batch", type=int, default=8, help="clips sampled at once")
    parser.add_argument("--seed", type=int, default=0, help="first seed of the noise")
    parser.add_argument("--alpha", type=float, default=0.6, help="strength of self-guidance")
    parser.add_argument("--beta", type=float, default=1.5, help="strength of motion enhancement")
    parser.add_argument("--stop", type=float, default=0.2, help="share of the steps that is guided")
    parser.add_argument("--pooled-error", action="store_true", help="measure the pooled edits on a video DiT instead")
    parser.add_argument("--only", nargs="+", help="these variants alone, beside stock")
    parser.add_argument("--keep", type=Path, help="folder for each variant's measures; what lies there is not made again")
    parser.add_argument("--card-from", type=Path, help="training run of tiny-animatediff from which to write the model card")
    parser.add_argument("--table", type=Path, help="CSV file to append the rows to")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `python -m genattn.pipelines.tiny.studies.broadway`."""
    options = build_parser().parse_args(arguments)
    pipe, size = load(options.model)
    scenes = evaluation_scenes(options.count)
    if options.pooled_error:
        rows = pooled_errors(pipe, size, scenes, options)
    else:
        kinds = variants(options.alpha, options.beta, stop=options.stop)
        chosen = [kind for kind in kinds if options.only is None or kind.name in ("stock", *options.only)]
        rows = study(pipe, size, chosen, scenes, options.batch, options.seed, options.keep)
        for row in rows[1:]:
            print(verdict(row))
    settings = {"model": options.model.name, "alpha": options.alpha, "beta": options.beta, "stop": options.stop}
    rows = [provenance() | settings | {"steps": size.steps} | row for row in rows]
    print(json.dumps(rows, indent=1))
    if options.table is not None:
        append_rows(options.table, rows)
    if options.card_from is not None:
        write_motion_card(options.model, options.card_from, rows)


if __name__ == "__main__":
    main()
