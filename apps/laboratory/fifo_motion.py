"""Why motion stops in a queue: the same captions under one change at a time, and how far the subject travels afterwards.

    python -m genattn.apps.laboratory.fifo_motion run --motion orbits --prompts 4
    python -m genattn.apps.laboratory.fifo_motion run --motion straight --prompts 4
    python -m genattn.apps.laboratory.fifo_motion run --motion "goes on" --model assets/tiny-wan-long --lora FILE --steps 8
    python -m genattn.apps.laboratory.fifo_motion table

Each row is one film: path of the subject's centre per 100 frames, in frame sides, over all of the film and over its second
half; steps longer than a tenth of a side are cuts, not motion, and are left out. The other columns are those of the ablation
(`long_video`). Films that the table has are not made again.

    chunked                  ordinary clips one after the other: motion starts anew in each, with a cut
    FIFO                     the queue as it comes
    no lookahead             every latent written from windows that it enters at the noisy end only
    4 per level              four latents share a level: windows of less mixed noise
    a clip per level         a whole window shares a level: no mixed noise at all
    eta 1                    a full share of fresh noise in every step, as in FIFO's own scripts
    uniform second stage     the last quarter of the levels once more, half a window at one level (after MIGA)
    motion told anew         the caption turns round every 29 frames: a motion that ends can begin again; straight ones only
"""

import csv
import itertools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import typer

from genattn.apps.laboratory.long_video import TABLE as FILMS, chunked, film_row
from genattn.apps.sampling.inputs import add_loras
from genattn.apps.sampling.load_pipeline import shipped_model
from genattn.apps.sampling.measured_rows import append_rows, provenance
from genattn.errors import GenAttnError
from genattn.fingerprint import model_fingerprint
from genattn.pipelines.long_video.bases.frame_denoisers import frame_denoiser
from genattn.pipelines.long_video.generate import long_video
from genattn.pipelines.tiny.segment import find_objects
from genattn.pipelines.tiny.world import ENDLESS, MOTIONS, Scene, caption, sample_scene

TABLE = Path("assets/bench/fifo_motion.csv")
CUT = 0.1
BACK = {"left": "right", "right": "left", "up": "down", "down": "up"}
KINDS = {"straight": tuple(BACK), "orbits": ("orbits",), "goes on": tuple(ENDLESS)}
WITH_LORA = " + LoRA"
KEPT = ("subject_consistency", "dynamic_degree", "seams", "oracle_subject")
app = typer.Typer(add_completion=False)


def there_and_back(prompt: str, frames: int, every: int = 29) -> dict[int, str]:
    """The caption, and the one with the opposite direction, in turn; a caption without one direction stays one."""
    word = next((w for w in BACK if f"moves {w}" in prompt), None)
    if word is None or any(verb in prompt for verb in ENDLESS.values()):
        return {0: prompt}
    other = prompt.replace(f"moves {word}", f"moves {BACK[word]}")
    return {start: (prompt, other)[i % 2] for i, start in enumerate(range(0, frames, every))}


def variants(window: int, steps: int) -> dict[str, dict[str, Any]]:
    """Name -> settings of long_video; "chunked" and "motion told anew" are made apart."""
    return {
        "FIFO": {},
        "no lookahead": {"lookahead": False},
        "4 per level": {"latents_per_level": 4},
        "a clip per level": {"latents_per_level": window},
        "eta 1": {"eta": 1.0},
        "uniform second stage": {"uniform_steps": max(1, steps // 4)},
        "motion told anew": {},
    }


def travel(video: np.ndarray) -> tuple[float, float]:
    """Path of the subject's centre per 100 frames, in frame sides: over the film, and over its second half; 0 without one."""
    found = find_objects(video)
    if not found:
        return 0.0, 0.0
    subject = max(found, key=lambda thing: thing.visible.mean())
    steps = np.linalg.norm(np.diff(subject.track[:, :2], axis=0), axis=1)
    steps[~(subject.visible[1:] & subject.visible[:-1])] = 0.0
    steps[steps > CUT] = 0.0
    half = len(steps) // 2
    return float(steps.mean() * 100), float(steps[half:].mean() * 100)


def _makers(pipe: Any, prompt: str, seed: int, frames: int, steps: int) -> dict[str, Callable[[], np.ndarray]]:
    def film(name: str, settings: dict[str, Any]) -> np.ndarray:
        told: Any = there_and_back(prompt, frames) if name == "motion told anew" else prompt
        call: dict[str, Any] = {"num_frames": frames, "num_inference_steps": steps, "seed": seed, "progress": False}
        made = long_video(pipe, told, **call, **settings)
        if made.stopped is not None:
            raise GenAttnError(f"a film was {made.stopped} after {made.frames} of {frames} frames; run again to go on")
        video: np.ndarray = made.video
        return video

    window = frame_denoiser(pipe).default_window()
    made = {name: lambda n=name, s=settings: film(n, s) for name, settings in variants(window, steps).items()}
    if len(there_and_back(prompt, frames)) == 1:
        del made["motion told anew"]
    return {"chunked": lambda: chunked(pipe, prompt, frames, steps, seed), **made}


def moving(motion: str, count: int) -> list[tuple[int, Scene]]:
    """The first `count` held-out scenes, with their seeds, that move so: a key of `KINDS`."""
    drawn = tuple(ENDLESS if motion == "goes on" else MOTIONS)
    scenes = ((seed, sample_scene(seed, held_out=True, two_objects=0.0, motions=drawn)) for seed in itertools.count())
    chosen = ((seed, scene) for seed, scene in scenes if scene.objects[0].motion in KINDS[motion])
    return list(itertools.islice(chosen, count))


@app.command()
def run(
    model: Annotated[Path | None, typer.Option(help="Folder of a tiny text-to-video pipeline.")] = None,
    motion: Annotated[Literal["straight", "orbits", "goes on"], typer.Option(help="What the captions ask for.")] = "straight",
    lora: Annotated[str | None, typer.Option(help="LoRA file that knows motions which go on, for all captions.")] = None,
    prompts: Annotated[int, typer.Option(help="Held-out captions.", min=1)] = 4,
    only: Annotated[list[str] | None, typer.Option(help="Variants; all when left out.")] = None,
    frames: Annotated[int, typer.Option(help="Frames per film.")] = 125,
    steps: Annotated[int, typer.Option(help="Noise levels of the queue.")] = 16,
    table: Annotated[Path, typer.Option(help="The file to add to.")] = TABLE,
) -> None:
    """Make the films that are missing and add their rows."""
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(model or shipped_model())
    pipe.set_progress_bar_config(disable=True)
    add_loras(pipe, [lora] if lora else [])
    mark, base = model_fingerprint(frame_denoiser(pipe).models), Path(pipe.config._name_or_path).name
    base += WITH_LORA if lora else ""
    for seed, scene in moving(motion, prompts):
        prompt = caption(scene)
        for name, make in _makers(pipe, prompt, seed, frames, steps).items():
            if (mark, prompt, name) in _done(table) or name not in (only or [name]):
                continue
            start = time.process_time()
            video = make()
            seconds, (whole, second), found = round(time.process_time() - start, 1), travel(video), film_row(video, prompt)
            row = {"variant": name, "base": base, "prompt": prompt, "motion": scene.objects[0].motion, "seed": seed}
            row |= {"model": mark, "frames": frames, "steps": steps, "processor_seconds": seconds}
            row |= {"travel": round(whole, 4), "travel_second_half": round(second, 4)}
            row |= {key: round(float(found[key]), 4) for key in KEPT}
            append_rows(table, [{**row, **provenance("cpu")}])
            print(prompt, name, seconds, {key: row[key] for key in ("travel", "travel_second_half", *KEPT)}, flush=True)


def _read(table: Path) -> list[dict[str, str]]:
    if not table.is_file():
        return []
    with table.open(newline="") as file:
        return list(csv.DictReader(file))


def _done(table: Path) -> set[tuple[str, str, str]]:
    return {(row["model"], row["prompt"], row["variant"]) for row in _read(table)}


def motion_markdown(table: Path = TABLE, lora: bool = False) -> str:
    """For the manual: what each variant does to each kind of motion, over the captions that all variants have.

    Args:
        table: the file of rows.
        lora: the films made with a LoRA, or those made without.
    """
    rows = [row for row in _read(table) if row["base"].endswith(WITH_LORA) == lora]
    header = ["model", "motion", "", "captions", "path", "path, 2nd half", "2nd half against FIFO", "dynamic degree"]
    lines = [[*header, "of chunked", "subject consistency", "oracle subject", "seams"], ["---"] * 12]
    for base in dict.fromkeys(row["base"] for row in rows):
        for kind, words in KINDS.items():
            own = [row for row in rows if row["base"] == base and row["motion"] in words]
            lines += [[base, kind, *line] for line in _motion_lines(own)]
    last = rows[-1]
    said = f"films of {last['frames']} frames, {last['steps']} levels; mean [smallest, largest film], changes by caption"
    dates = sorted({row["date"] for row in rows})
    note = f"{said}. {last['device']}, torch {last['torch_version']}, {' and '.join(dates)}."
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + f"\n\n<sub>Held-out captions, {note}</sub>"


def _motion_lines(rows: Sequence[dict[str, str]]) -> list[list[str]]:
    names = list(dict.fromkeys(row["variant"] for row in rows))
    films = {name: {row["prompt"]: row for row in rows if row["variant"] == name} for name in names}
    shared = sorted(set.intersection(*(set(films[name]) for name in names))) if names else []

    def values(name: str, key: str) -> list[float]:
        return [float(films[name][prompt][key]) for prompt in shared]

    lines = []
    for name in names:
        cells = [_cell(values(name, key)) for key in ("travel", "travel_second_half")]
        before, after = (values(of, "travel_second_half") for of in ("FIFO", name))
        change = "-" if name == "FIFO" else _cell([b - a for a, b in zip(before, after, strict=True)], "+.2f")
        degree, usual = values(name, "dynamic_degree"), values("chunked", "dynamic_degree") if "chunked" in films else []
        share = f"{np.mean(degree) / np.mean(usual):.2f}" if usual and name != "chunked" else "-"
        rest = [_cell(values(name, key)) for key in ("subject_consistency", "oracle_subject", "seams")]
        lines.append([name, str(len(shared)), *cells, change, _cell(degree), share, *rest])
    return lines


# what a caption asks for -> whether such a motion can go on for ever
ENDS = {"moves": "ends with the picture", "orbits": "goes on", "grows": "ends", "shrinks": "ends", "stays": "none"}


def by_caption_markdown(table: Path = FILMS) -> str:
    """For the manual: dynamic degree of chunked sampling and FIFO by what the caption asks for, from the ablation's films."""
    with table.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["variant"] in ("chunked", "FIFO")]
    lines = [["model", "the caption's motion", "captions", "chunked", "FIFO", "FIFO / chunked"], ["---"] * 6]
    for base in dict.fromkeys(row["base"] for row in rows):
        for word, end in ENDS.items():
            found = {
                name: [
                    float(row["dynamic_degree"])
                    for row in rows
                    if row["base"] == base and row["variant"] == name and f" {word} " in row["prompt"]
                ]
                for name in ("chunked", "FIFO")
            }
            if not found["FIFO"]:
                continue
            before, after = (float(np.mean(values)) for values in found.values())
            cells = [f"{word}: {end}", str(len(found["FIFO"])), f"{before:.2f}", f"{after:.2f}", f"{after / before:.2f}"]
            lines.append([base, *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(values: list[float], form: str = ".2f") -> str:
    """Mean, and the smallest and largest: an interval of two or three films would say more than they know."""
    mean, low, high = (f"{value:{form}}" for value in (float(np.mean(values)), min(values), max(values)))
    return mean if len(values) == 1 else f"{mean} [{low}, {high}]"


@app.command()
def table(path: Annotated[Path, typer.Option(help="The file to read.")] = TABLE) -> None:
    """Print all tables."""
    print(by_caption_markdown())
    for lora in (False, True):
        print(motion_markdown(path, lora))


if __name__ == "__main__":
    app()
