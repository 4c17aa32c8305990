"""The ablation of endless video in the order of Ouroboros' own table: chunked sampling, FIFO, + tail, + memory, + guidance.

    python -m genattn.apps.laboratory.long_video run --model assets/tiny-wan --prompts 20 --frames 253
    python -m genattn.apps.laboratory.long_video table
    python -m genattn.apps.laboratory.long_video batch                     windows per forward against throughput

Every film is one row of assets/bench/long_video_ablation.csv with device, versions, commit, date and the model's
fingerprint; films that are there already are not made again. On a transformer that attends over all frames of a window,
memory frames stand for SACFA.
"""

import csv
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from genattn.apps.sampling.load_pipeline import shipped_model
from genattn.apps.sampling.measured_rows import append_rows, provenance
from genattn.errors import GenAttnError
from genattn.fingerprint import model_fingerprint
from genattn.pipelines.long_video.bases.frame_denoisers import frame_denoiser
from genattn.pipelines.long_video.generate import long_video
from genattn.pipelines.long_video.ouroboros.ouroboros import Ouroboros
from genattn.pipelines.long_video.quality.video_metrics import measure
from genattn.pipelines.long_video.queue.fifo import Fifo, sample_clip, start_queue
from genattn.pipelines.long_video.queue.prompt_schedule import PromptSchedule
from genattn.pipelines.long_video.queue.prompted_windows import PromptedWindows
from genattn.pipelines.long_video.settings import LongVideoSettings
from genattn.pipelines.tiny.oracle import judge
from genattn.pipelines.tiny.world import caption, sample_scene

Row = dict[str, str]
ORDER = ("chunked", "FIFO", "+ tail", "+ memory frames", "+ SACFA", "+ guidance")
LEAST_FILMS = 5
TABLE = Path("assets/bench/long_video_ablation.csv")
BATCH_TABLE = Path("assets/bench/window_batch.csv")
MEASURES = (
    "subject_consistency",
    "background_consistency",
    "motion_smoothness",
    "temporal_flickering",
    "dynamic_degree",
    "drift_brightness",
    "drift_contrast",
    "seams",
    "oracle_colour",
    "oracle_shape",
    "oracle_subject",
)
# Ouroboros-Diffusion, table 3: VideoCrafter2, 128 frames, VBench; FIFO, + tail, + SACFA, + guidance; no dynamic degree
PAPER = {
    "subject_consistency": (94.04, 95.56, 95.71, 96.06),
    "background_consistency": (96.08, 96.66, 96.73, 96.90),
    "motion_smoothness": (95.88, 97.61, 97.70, 97.73),
    "temporal_flickering": (93.38, 95.86, 96.00, 96.12),
}
app = typer.Typer(add_completion=False)


def variants(is_transformer: bool, subject: str | None = None) -> dict[str, Ouroboros | None]:
    """Name -> settings, each with what came before; None is plain FIFO, "chunked" is made apart.

    subject: its words in the prompt; without them the masks of guidance hold whatever the prompt names, background included.
    """
    third: dict[str, Any] = {"memory_frames": 2} if is_transformer else {"subject_attention": True}
    third["subject"] = subject
    name = "+ memory frames" if is_transformer else "+ SACFA"
    return {
        "FIFO": None,
        "+ tail": Ouroboros(),
        name: Ouroboros(**third),
        "+ guidance": Ouroboros(**third, guidance=0.05, guidance_every=2),
    }


def chunked(pipe: Any, prompt: str, frames: int, steps: int, seed: int) -> np.ndarray:
    """Clips sampled one after the other with nothing between them: uint8 [frames, H, W, 3]."""
    base = frame_denoiser(pipe)
    settings = LongVideoSettings(prompt)
    places, window, scale = base.latent_size(*settings.size(base)), base.default_window(), settings.scale(base)
    solver = base.solver(steps, (window, *places))
    windows = PromptedWindows(base, solver.grid, PromptSchedule.parse(prompt), guidance_scale=scale)
    parts: list[np.ndarray] = []
    with torch.no_grad(), base.installed():
        while sum(map(len, parts)) < frames:
            like = torch.zeros(1, base.channels, window, *places, device=base.device)
            clip = sample_clip(windows, solver, like, seed=seed + 1000 * len(parts))
            decoder = base.decoder()
            pieces = [decoder.push(base.to_vae(clip)), decoder.finish()]
            video = torch.cat([p for p in pieces if p is not None and p.shape[2]], 2)[0].float()
            parts.append(((video + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 3, 0).cpu().numpy())
    return np.concatenate(parts)[:frames]


def films(
    pipe: Any, prompt: str, subject: str, seed: int, frames: int, steps: int, skip: set[str], per_level: int = 1
) -> Iterator[tuple[str, np.ndarray, float]]:
    """(variant, uint8 film, seconds) of every variant that is not in `skip`."""
    if "chunked" not in skip:
        start = time.monotonic()
        video = chunked(pipe, prompt, frames, steps, seed)
        yield "chunked", video, time.monotonic() - start
    for name, settings in variants(hasattr(pipe, "transformer"), subject).items():
        if name not in skip:
            start = time.monotonic()
            call: dict[str, Any] = {"num_frames": frames, "num_inference_steps": steps, "seed": seed, "progress": False}
            made = long_video(pipe, prompt, ouroboros=settings, latents_per_level=per_level, **call)
            if made.stopped is not None:
                raise GenAttnError(f"a film was {made.stopped} after {made.frames} of {frames} frames; run again to go on")
            yield name, made.video, time.monotonic() - start


def film_row(video: np.ndarray, prompt: str) -> dict[str, Any]:
    """The measures of one film."""
    found = measure(video, fps=16)
    drift = found.pop("drift_per_100_frames")
    verdicts = [judge(video[i : i + 29], prompt) for i in range(0, len(video) - 28, 29)]
    return {
        **found,
        "seams": len(found["seams"]),
        "drift_brightness": abs(drift["brightness"]),
        "drift_contrast": abs(drift["contrast"]),
        "drift_saturation": abs(drift["saturation"]),
        "oracle_colour": float(np.mean([v.share("colour") for v in verdicts])),
        "oracle_shape": float(np.mean([v.share("shape") for v in verdicts])),
        "oracle_subject": float(np.mean([v.consistency for v in verdicts])),
    }


def _done(prompt: str, model: str, frames: int, steps: int, per_level: int, path: Path) -> set[str]:
    if not path.is_file():
        return set()
    rows = _read(path)
    key = {"prompt": prompt, "model": model, "frames": str(frames), "steps": str(steps), "latents_per_level": str(per_level)}
    return {row["variant"] for row in rows if all(row.get(name) == value for name, value in key.items())}


@app.command()
def run(
    model: Annotated[
        Path | None, typer.Option(help="Folder of a tiny text-to-video pipeline; the shipped one by default.")
    ] = None,
    prompts: Annotated[int, typer.Option(help="Held-out captions.")] = 20,
    first: Annotated[int, typer.Option(help="The first of them; runs that share the work need a table each.")] = 0,
    frames: Annotated[int, typer.Option(help="Frames per film.")] = 253,
    steps: Annotated[int, typer.Option(help="Noise levels of the queue.")] = 32,
    per_level: Annotated[int, typer.Option(help="Latents at one level; steps times this must hold a window.")] = 1,
    note: Annotated[str, typer.Option(help="Put into every row, e.g. that the machine was loaded.")] = "",
    table: Annotated[Path, typer.Option(help="The file to add to.")] = TABLE,
) -> None:
    """Make the films that are missing and add their rows."""
    from diffusers import DiffusionPipeline

    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipe = DiffusionPipeline.from_pretrained(model or shipped_model()).to(device)
    pipe.set_progress_bar_config(disable=True)
    mark, base = model_fingerprint(frame_denoiser(pipe).models), Path(pipe.config._name_or_path).name
    for seed in range(first, first + prompts):
        scene = sample_scene(seed, held_out=True, two_objects=0.0)
        prompt, subject = caption(scene), f"{scene.objects[0].colour} {scene.objects[0].shape}"
        done = _done(prompt, mark, frames, steps, per_level, table)
        for name, video, seconds in films(pipe, prompt, subject, seed, frames, steps, done, per_level):
            row = {
                "variant": name,
                "base": base,
                "prompt": prompt,
                "seed": seed,
                "model": mark,
                "steps": steps,
                "latents_per_level": per_level,
                "seconds": round(seconds, 1),
            }
            append_rows(table, [{**row, **film_row(video, prompt), "note": note, **provenance(device)}])
            print(f"{prompt}: {name}, {seconds:.0f} s", flush=True)


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half-width of its 95 % interval, by the normal approximation; infinite half-width for a single value."""
    mean = float(np.mean(values))
    return mean, 1.96 * float(np.std(values, ddof=1)) / len(values) ** 0.5 if len(values) > 1 else float("inf")


def _read(path: Path) -> list[Row]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _by_variant(rows: Sequence[Row], model: str) -> dict[str, list[Row]]:
    """Rows of one model by variant in the paper's order, over the prompts that all variants have, sorted by prompt."""
    rows = [row for row in rows if row["model"] == model]
    names = sorted({row["variant"] for row in rows}, key=ORDER.index)
    shared = set.intersection(*({row["prompt"] for row in rows if row["variant"] == name} for name in names))
    return {
        name: sorted((r for r in rows if r["variant"] == name and r["prompt"] in shared), key=lambda row: row["prompt"])
        for name in names
    }


def _values(rows: Sequence[Row], measure_name: str) -> list[float]:
    return [float(row[measure_name]) for row in rows if row.get(measure_name)]


def summary(path: Path = TABLE, model: str | None = None) -> list[dict[str, str]]:
    """One row per variant, mean and 95 % interval of every measure, over the prompts that all variants have. model:
    fingerprint."""
    rows = _read(path)
    out = []
    for name, chosen in _by_variant(rows, model or rows[-1]["model"]).items():
        line = {"variant": name, "n": str(len(chosen))}
        for measure_name in MEASURES:
            values = _values(chosen, measure_name)
            mean, half = interval(values) if values else (float("nan"), 0.0)
            line[measure_name] = f"{mean:.4f} ± {half:.4f}"
        out.append(line)
    return out


def verdict(before: Sequence[float], after: Sequence[float], rises: bool) -> str:
    """Whether a measure moved from `before` to `after` (the same prompts, paired) as the paper's did."""
    if len(before) != len(after) or len(before) < LEAST_FILMS:
        return f"too few films ({len(after)})"
    mean, half = interval([b - a for a, b in zip(before, after)])
    if abs(mean) <= half:
        return f"no clear change ({mean:+.4f} ± {half:.4f})"
    return f"{'follows' if (mean > 0) == rises else 'does not follow'} ({mean:+.4f} ± {half:.4f})"


def ablation_markdown(path: Path = TABLE) -> str:
    """For the manual: per model a table of measures by variant, the paper's numbers and whether ours follow them."""
    rows = _read(path)
    parts = []
    for model in dict.fromkeys(row["model"] for row in rows):
        films = _by_variant(rows, model)
        first = next(row for row in rows if row["model"] == model)
        count = len(next(iter(films.values())))
        last = list(films)[-1]
        # a model whose films end with FIFO has nothing to hold against the paper
        compared = ORDER.index(last) > ORDER.index("FIFO")
        header = ["measure", *films]
        header += ["paper: FIFO, + tail, + SACFA, + guidance", f"FIFO to {last}, as the paper's?"] if compared else []
        body = []
        for name in MEASURES:
            cells = [interval(_values(films[variant], name)) if films[variant] else (float("nan"), 0.0) for variant in films]
            told = ", ".join(f"{value:.2f}" for value in PAPER[name]) if name in PAPER else "not reported"
            before, after = (_values(films.get(variant, []), name) for variant in ("FIFO", last))
            said = verdict(before, after, rises=True) if name in PAPER else "-"
            shown = [f"{mean:.4f} ± {half:.4f}" for mean, half in cells]
            body.append([name.replace("_", " "), *shown, *([told, said] if compared else [])])
        table = "\n".join(f"| {' | '.join(line)} |" for line in (header, ["---"] * len(header), *body))
        dates = sorted({row["date"] for chosen in films.values() for row in chosen})
        levels = f"{first['steps']} levels of {first.get('latents_per_level') or 1}"
        note = (
            f"{first.get('base') or 'tiny-wan'}, {count} held-out captions, one film of {first['frames']} frames each, "
            f"{levels}; mean and 95 % interval{', the last column paired by caption' if compared else ''}. {first['device']}, "
            f"torch {first['torch_version']}, diffusers {first['diffusers_version']}, {' and '.join(dates)}."
        )
        parts.append(f"{table}\n\n<sub>{note}</sub>")
    return "\n\n".join(parts)


@app.command()
def batch(
    model: Annotated[Path | None, typer.Option(help="Folder of a text-to-video pipeline; the shipped one by default.")] = None,
    steps: Annotated[int, typer.Option(help="Noise levels of the queue.")] = 32,
    size: Annotated[int | None, typer.Option(help="Height and width of the picture; the model's own when left out.")] = None,
    ticks: Annotated[int, typer.Option(help="Ticks timed per setting; the fastest counts.")] = 5,
    note: Annotated[str, typer.Option(help="Put into every row.")] = "",
    table: Annotated[Path, typer.Option(help="The file to add to.")] = BATCH_TABLE,
) -> None:
    """Time ticks with more and more windows per forward, after checking that the latents agree with one by one."""
    from diffusers import DiffusionPipeline

    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipe = DiffusionPipeline.from_pretrained(model or shipped_model()).to(device)
    base = frame_denoiser(pipe)
    prompt = "a red circle moves right on a dark background"
    settings = LongVideoSettings(prompt, num_inference_steps=steps, height=size, width=size)
    shape, places = settings.queue_shape(base), base.latent_size(*settings.size(base))
    solver = base.solver(shape.num_levels, (shape.window, *places))
    windows = PromptedWindows(base, solver.grid, settings.schedule(), guidance_scale=settings.scale(base))
    clip = torch.randn(1, base.channels, shape.window, *places, generator=torch.Generator().manual_seed(0)).to(device)
    first: tuple[torch.Tensor, float] | None = None
    for together in sorted({1, 2, 4, len(shape.windows)}):
        fifo = Fifo(windows, solver, start_queue(shape, solver, clip), window_batch=together)
        times = []
        for _ in range(ticks):
            start = time.perf_counter()
            fifo.tick()
            if device == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        first = first or (fifo.queue.latents, min(times))
        error = float((fifo.queue.latents - first[0]).abs().max())
        if error > 1e-3:
            raise GenAttnError(
                f"batched windows must agree with one by one, got a difference of {error:.1e} at window_batch={together}"
            )
        row: dict[str, Any] = {
            "window_batch": together,
            "windows": len(shape.windows),
            "seconds_per_tick": round(min(times), 4),
        }
        row |= {
            "throughput": round(first[1] / min(times), 3),
            "max_difference": f"{error:.1e}",
            "places": places[0] * places[1],
            "cores": os.cpu_count(),
            "note": note,
        }
        append_rows(table, [{**row, **provenance(device)}])
        print(row, flush=True)


@app.command()
def table(path: Annotated[Path, typer.Option(help="The file to read.")] = TABLE) -> None:
    """Print the table with intervals."""
    rows = summary(path)
    print("| " + " | ".join(rows[0]) + " |")
    print("|" + "---|" * len(rows[0]))
    for row in rows:
        print("| " + " | ".join(row.values()) + " |")


if __name__ == "__main__":
    app()
