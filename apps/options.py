"""Options that several commands share, named as in `diffusers-cli run` where it has them."""

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[
    str | None, typer.Option("--model", "-m", help="Folder or hub id of a diffusers pipeline; default: the shipped tiny-wan.")
]
Prompt = Annotated[str, typer.Option(help="What to show.")]
NegativePrompt = Annotated[str | None, typer.Option(help="What to avoid (classifier-free guidance).")]
FrameCount = Annotated[int | None, typer.Option("--frames", help="Frames; default: what the model was made for.")]
Height = Annotated[int | None, typer.Option(help="Pixels; default: what the model was made for.")]
Width = Annotated[int | None, typer.Option(help="Pixels; default: what the model was made for.")]
Steps = Annotated[int | None, typer.Option(help="Denoising steps; default: the model's.")]
Seed = Annotated[int, typer.Option(help="Seed of the noise; same seed, same video.")]
GuidanceScale = Annotated[float | None, typer.Option(help="Classifier-free guidance; default: the model's.")]
Attention = Annotated[
    str, typer.Option(help="radial, radial-paper, radial-official, neighborhood or dense.", show_default=True)
]
PatternOptions = Annotated[str | None, typer.Option(help="Settings of the pattern as a JSON object.", metavar="JSON")]
DenseSteps = Annotated[
    float, typer.Option(help="First steps kept dense: a share of them (below 1) or a number (1, 2, ...).", show_default=True)
]
DenseLayers = Annotated[int, typer.Option(help="First layers kept dense.", show_default=True)]
Dtype = Annotated[str, typer.Option(help="auto, float32, float16 or bfloat16.", show_default=True)]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps; default: the best there is.")]
CpuOffload = Annotated[str | None, typer.Option(help="model or group: keep weights on the CPU between uses.")]
Fps = Annotated[float | None, typer.Option(help="Frames a second of the written video; default: the model's or 16.")]
Out = Annotated[Path, typer.Option("--out", "-o", help="File to write; its folder is made.", show_default=True)]
Json = Annotated[bool, typer.Option("--json", help="Print the report as JSON on standard output, nothing else.")]
