"""Commands about finished and endless videos: long, measure."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from genattn.apps import options
from genattn.apps.printing import print_json, print_lines, print_table


def long_command(
    prompt: Annotated[str, typer.Option(help='What to show, or a schedule: 0:"a red circle" 120:"it turns blue".')] = "",
    model: options.Model = None,
    negative_prompt: options.NegativePrompt = None,
    frames: Annotated[int | None, typer.Option(help="Frames; default: until Ctrl-C.")] = None,
    height: options.Height = None,
    width: options.Width = None,
    steps: options.Steps = None,
    partitions: Annotated[int, typer.Option(help="Windows in the queue; more means smaller steps in noise.")] = 4,
    lookahead: Annotated[bool, typer.Option(help="Every latent sees cleaner ones; twice the work.")] = True,
    prompt_fade: Annotated[int, typer.Option(help="Frames over which two prompts cross-fade.")] = 0,
    guidance_scale: options.GuidanceScale = None,
    window_batch: Annotated[int, typer.Option(help="Windows per forward: throughput against memory.")] = 1,
    drift_correction: Annotated[float, typer.Option(help="0 (off) to 1: pull colours back to the first frames.")] = 0.0,
    ouroboros: Annotated[bool, typer.Option(help="Coherent tail and memory of Ouroboros-Diffusion.")] = False,
    seed: options.Seed = 0,
    dtype: options.Dtype = "auto",
    device: options.Device = None,
    fps: options.Fps = None,
    folder: Annotated[Path, typer.Option(help="Folder for the film and its checkpoint.")] = Path("out/long"),
    resume: Annotated[Path | None, typer.Option(help="Folder of a stopped run, to go on with.")] = None,
    as_json: options.Json = False,
) -> None:
    """Make a video of any length at constant memory; it plays while it grows, and Ctrl-C or a kill loses almost nothing.

    Example: genattn long --prompt "a red circle moves right on a dark background" --frames 253 --folder out/long
    """
    from genattn.apps.sampling_run import SamplingSettings, open_pipeline, own_defaults
    from genattn.pipelines.long_video import long_video

    pipe = open_pipeline(SamplingSettings(model, dtype=dtype, device=device))
    if resume is not None:
        result = long_video(pipe, num_frames=frames, resume=resume, window_batch=window_batch)
    else:
        own = own_defaults(pipe)
        result = long_video(
            pipe,
            prompt,
            negative_prompt=negative_prompt,
            num_frames=frames,
            height=height or own.get("height"),
            width=width or own.get("width"),
            num_inference_steps=steps,
            partitions=partitions,
            lookahead=lookahead,
            guidance_scale=own.get("guidance_scale") if guidance_scale is None else guidance_scale,
            seed=seed,
            prompt_fade=prompt_fade,
            ouroboros=_ouroboros() if ouroboros else None,
            drift_correction=drift_correction,
            window_batch=window_batch,
            fps=fps or own.get("fps", 16),
            folder=folder,
        )
    if as_json:
        print_json(asdict(result))
    else:
        print_lines(*(f"{name}: {value}" for name, value in asdict(result).items()))


def _ouroboros() -> Any:
    from genattn.pipelines.ouroboros import Ouroboros

    return Ouroboros()


def measure_command(
    video: Annotated[Path, typer.Argument(help="A video file.")],
    fps: Annotated[float | None, typer.Option(help="Frames a second; default: the file's.")] = None,
    as_json: options.Json = False,
) -> None:
    """Measure a video without any model: flicker, smoothness, motion, consistency, drift, seams, repetition.

    Example: genattn measure out/demo.mp4 --json
    """
    from genattn.pipelines.video_metrics import measure

    found = measure(video, fps)
    if as_json:
        print_json(found)
    else:
        print_table([{"measure": name, "value": value} for name, value in found.items()], str(video))
