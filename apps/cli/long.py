"""Commands about finished and endless videos: long, measure."""

import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from tqdm import tqdm

from genattn.apps.cli import options
from genattn.apps.cli.printing import in_print, in_words, print_json, print_lines, print_table
from genattn.apps.cli.stopping import say_when_stopped
from genattn.errors import GenAttnError

if TYPE_CHECKING:
    from genattn.apps.sampling.run import SamplingSettings
    from genattn.pipelines.long_video.run import LongVideo, LongVideoResult


@options.sampling_options(frames=Annotated[int | None, typer.Option("--frames", help="Frames; default: until Ctrl-C.")])
def long_command(
    context: typer.Context,
    settings: "SamplingSettings",
    prompt: Annotated[str, typer.Option(help='What to show, or a schedule: 0:"a red circle" 120:"it turns blue".')] = "",
    partitions: Annotated[
        int, typer.Option(help="Windows in the queue. More windows mean smaller noise steps and more work.")
    ] = 4,
    lookahead: Annotated[bool, typer.Option(help="Every latent sees cleaner ones; twice the work, as in the paper.")] = True,
    latents_per_level: Annotated[
        int, typer.Option(help="Latents at one noise level; with more, a window mixes noise less. Give --steps with it.")
    ] = 1,
    uniform_steps: Annotated[
        int, typer.Option(help="Last steps done once more with half a window at one noise level; 0 is off.")
    ] = 0,
    prompt_fade: Annotated[int, typer.Option(help="Frames over which two prompts cross-fade.")] = 0,
    window_batch: Annotated[int, typer.Option(help="Windows per model call: more is faster and takes more memory.")] = 1,
    drift_correction: Annotated[
        float, typer.Option(help="Pull colours back to those of the first frames: 0 (off) to 1.")
    ] = 0.0,
    ouroboros: Annotated[bool, typer.Option(help="Coherent tail and memory of Ouroboros-Diffusion.")] = False,
    seed: options.Seed = 0,
    fps: options.Fps = None,
    folder: Annotated[Path, typer.Option(help="Folder for the film, its first frame and its checkpoint.")] = Path("out/long"),
    resume: Annotated[Path | None, typer.Option(help="Folder of a stopped run that should go on.")] = None,
    as_json: options.Json = False,
) -> None:
    """Make a video of any length at constant memory. It can be played while it grows. After Ctrl-C or a kill it goes on
    with --resume.

    The first frame is in FOLDER/first_frame.png as soon as it is decoded. The cost of the film is printed before it starts;
    the quickest setting is --partitions 1 --no-lookahead.

    Example: genattn long --prompt "a red circle moves right on a dark background" --frames 253 --folder out/long
    """
    from genattn.apps.sampling.run import open_pipeline, own_defaults
    from genattn.pipelines.long_video.generate import long_video

    _check_long(context, prompt, folder, resume, fps)
    place = folder if resume is None else resume
    say_when_stopped(lambda: _how_to_go_on(place, settings))
    pipe = open_pipeline(settings)
    if resume is not None:
        run = long_video(pipe, num_frames=settings.frames, resume=resume, window_batch=window_batch, stream=True)
    else:
        own = own_defaults(pipe)
        run = long_video(
            pipe,
            prompt,
            negative_prompt=settings.negative_prompt,
            num_frames=settings.frames,
            height=settings.height or own.get("height"),
            width=settings.width or own.get("width"),
            num_inference_steps=settings.steps,
            partitions=partitions,
            lookahead=lookahead,
            latents_per_level=latents_per_level,
            uniform_steps=uniform_steps,
            guidance_scale=own.get("guidance_scale") if settings.guidance_scale is None else settings.guidance_scale,
            seed=seed,
            prompt_fade=prompt_fade,
            ouroboros=_ouroboros() if ouroboros else None,
            drift_correction=drift_correction,
            window_batch=window_batch,
            fps=fps or own.get("fps", 16),
            folder=folder,
            stream=True,
        )
    result = _make(run, place, as_json)
    if as_json:
        print_json(asdict(result))
    else:
        told = {name: value for name, value in asdict(result).items() if name != "video" and value not in (None, {})}
        print_lines(*(f"{in_words(name)}: {in_print(value)}" for name, value in told.items()))
    if result.stopped == "interrupted":
        from genattn.pipelines.long_video.run_stop import StopRequest

        raise typer.Exit(128 + StopRequest.last_signal)


def _check_long(context: typer.Context, prompt: str, folder: Path, resume: Path | None, fps: float | None) -> None:
    """Refuse before the model is loaded what cannot become a film."""
    from genattn.apps.sampling.output_files import check_folder

    if fps is not None and not 0 < fps <= 240:
        raise GenAttnError(f"--fps must lie in (0, 240], got {fps}")
    if resume is None:
        if not prompt.strip():
            raise GenAttnError("--prompt must say what to show, got an empty text; or give --resume FOLDER")
        check_folder(folder, "--folder")
        return
    if not (resume / "checkpoint.json").is_file():
        raise GenAttnError(f"--resume must name the folder of a stopped run, but {str(resume)!r} has no checkpoint.json")
    given = sorted(_given(context) - _BESIDE_RESUME)
    if given:
        options_given = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise GenAttnError(f"a resumed run keeps its settings, got {options_given} beside --resume; leave them out")


def _how_to_go_on(place: Path, settings: "SamplingSettings") -> str:
    if (place / "checkpoint.json").is_file():
        same = {"model": settings.model, "device": settings.device, "cpu-offload": settings.cpu_offload}
        same["dtype"] = None if settings.dtype == "auto" else settings.dtype
        given = [word for name, value in same.items() if value is not None for word in (f"--{name}", str(value))]
        command = ["genattn", "long", "--resume", str(place), *given, *(f"--lora={lora}" for lora in settings.lora)]
        return f"stopped; the film so far plays, and this goes on: {shlex.join(command)}"
    return "stopped before the first checkpoint; there is nothing to resume yet, the same command begins anew"


# how a run is computed and how long it gets may change when it goes on; what it shows may not
_BESIDE_RESUME = {"resume", "frames", "model", "lora", "dtype", "device", "cpu_offload", "window_batch", "as_json"}


def _given(context: typer.Context) -> set[str]:
    """Options that the user wrote out, whatever their value."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    return {name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"}


def _make(run: "LongVideo", folder: Path, quiet: bool) -> "LongVideoResult":
    """Run to the end; the first frame becomes a picture as soon as it is there."""
    from genattn.apps.sampling.output_files import write_image

    picture = folder / "first_frame.png"
    for frame in run:
        if not picture.exists():
            write_image(picture, frame, {"prompt": run.parts.settings.prompt, "seed": run.parts.settings.seed})
            if not quiet:
                tqdm.write(f"first frame: {picture}", file=sys.stderr)
    return run.result()


def _ouroboros() -> Any:
    from genattn.pipelines.long_video.ouroboros.ouroboros import Ouroboros

    return Ouroboros()


def measure_command(
    file: Annotated[Path, typer.Argument(help="A video, or a picture.")],
    fps: Annotated[float | None, typer.Option(help="Frames per second; default: the file's.")] = None,
    as_json: options.Json = False,
) -> None:
    """Measure a video or picture without a model, and show the prompt, seed and settings stored in it.

    A video: flicker, smoothness, motion, consistency, drift, seams, repetition. A picture: sharpness, contrast and the other
    statistics of `genattn hunt`.

    Example: genattn measure out/demo.mp4 --json
    """
    from genattn.apps.sampling.output_files import IMAGE_SUFFIXES, read_metadata

    if fps is not None and not fps > 0:
        raise GenAttnError(f"--fps must be > 0, got {fps}")
    if not file.is_file():
        raise GenAttnError(f"{str(file)!r} is no file; give a video or a picture that exists")
    metadata = read_metadata(file)
    found = _picture_statistics(file) if file.suffix.lower() in IMAGE_SUFFIXES else _film_measures(file, fps)
    if as_json:
        print_json(found | {"metadata": metadata})
        return
    print_table([{"measure": in_words(name), "value": value} for name, value in _flat(found)], str(file))
    if metadata:
        kept = {name: value for name, value in metadata.items() if value not in (None, "", "None")}
        print_lines("made with: " + in_print(kept))


def _flat(found: dict[str, Any]) -> list[tuple[str, Any]]:
    """A row per number: `drift_per_100_frames, red` instead of a dict in a cell."""
    rows: list[tuple[str, Any]] = []
    for name, value in found.items():
        rows += [(f"{name}, {part}", v) for part, v in value.items()] if isinstance(value, dict) else [(name, value)]
    return rows


def _film_measures(file: Path, fps: float | None) -> dict[str, Any]:
    from genattn.pipelines.long_video.quality.video_metrics import measure

    return measure(file, fps)


_SMALLEST = 8  # the statistics look at neighbours and frequencies


def _picture_statistics(file: Path) -> dict[str, Any]:
    import numpy as np
    import torch

    from genattn.guidance.headhunter.objectives import STATISTICS
    from genattn.picture_file import open_picture

    picture = open_picture(file, "the file")
    if min(picture.size) < _SMALLEST:
        size = f"{picture.width} x {picture.height}"
        raise GenAttnError(f"a picture must be at least {_SMALLEST} x {_SMALLEST} to be measured, got {size}")
    pixels = np.array(picture, dtype=np.float32) / 255
    images = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    sizes = {"height": images.shape[2], "width": images.shape[3]}
    return {**sizes, **{name: float(statistic(images)[0]) for name, statistic in STATISTICS.items()}}
