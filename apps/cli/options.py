"""Options that several commands share, named as in `diffusers-cli run` where it has them.

    @sampling_options()                                       genattn generate --model ... --steps ...
    def generate_command(settings: SamplingSettings): ...  <- the options, gathered and checked

A command names one parameter and the command line offers a group of options in its place.
"""

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from genattn.errors import GenAttnError

Command = Callable[..., None]

Model = Annotated[
    str | None, typer.Option("--model", "-m", help="Folder or hub id of a diffusers pipeline; default: the shipped tiny-wan.")
]
FirstModel = Annotated[
    str | None,
    typer.Option("--model", "-m", help="Folder or hub id of a diffusers pipeline; default: the shipped tiny-wan-long-bound."),
]
Prompt = Annotated[str, typer.Option(help="What to show.")]
NegativePrompt = Annotated[
    str | None, typer.Option(help="What to avoid. Works through guidance, or through NAG where the guidance scale is 1.")
]
FrameCount = Annotated[int | None, typer.Option("--frames", help="Frames; default: what the model was made for.")]
Height = Annotated[int | None, typer.Option(help="Pixels; default: what the model was made for.")]
Width = Annotated[int | None, typer.Option(help="Pixels; default: what the model was made for.")]
Steps = Annotated[int | None, typer.Option(help="Denoising steps; default: the model's.")]
Seed = Annotated[int, typer.Option(help="Seed of the noise; same seed, same video.")]
GuidanceScale = Annotated[float | None, typer.Option(help="Classifier-free guidance; default: the model's.")]
_PATTERNS = (
    "radial, radial-paper, radial-official, neighborhood (also with --window), adaptive, sol, sparge, svg2, dense, "
    "or a map.safetensors of `genattn profile`."
)
Attention = Annotated[str, typer.Option(help=_PATTERNS, show_default=True)]
ModelAttention = Annotated[
    str, typer.Option("--attention", help=f"auto (the model's own preset), {_PATTERNS}", show_default=True)
]
PatternOptions = Annotated[
    str | None, typer.Option(help="Settings of the pattern: decay=0.3, or a JSON object.", metavar="KEY=VALUE|JSON")
]
Window = Annotated[
    str | None, typer.Option(help="Window of neighborhood attention in tokens: frames x height x width.", metavar="18x24x24")
]
Stride = Annotated[
    str | None, typer.Option(help="Queries per axis that share a window; default 1 (sliding).", metavar="16x8x8")
]
Settings = Annotated[
    Path | None,
    typer.Option(
        "--settings",
        "--pattern-file",
        help="A settings file of `genattn tune` or `genattn plan --out`, in place of --attention.",
    ),
]
DenseLayers = Annotated[int, typer.Option(help="First layers kept dense.", show_default=True)]
OwnAttention = Annotated[
    str | None,
    typer.Option(
        "--attention",
        help=f"auto (the model's own preset), {_PATTERNS} Default: auto; without --model, the shipped model's map.",
    ),
]
OwnDenseSteps = Annotated[
    float | None,
    typer.Option("--dense-steps", help="First steps kept dense: a share or a number. Default: the preset's, else 0.25."),
]
OwnDenseLayers = Annotated[
    int | None, typer.Option("--dense-layers", help="First layers kept dense. Default: the preset's, else 1.")
]
Dtype = Annotated[str, typer.Option(help="auto, float32, float16 or bfloat16.", show_default=True)]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps; default: the best there is.")]
CpuOffload = Annotated[str | None, typer.Option(help="model or group: keep weights on the CPU between uses.")]
Lora = Annotated[
    list[str] | None,
    typer.Option(
        "--lora",
        help="LoRA file or hub id, followed by :WEIGHT if it is not 1. Repeat the option for several.",
        metavar="FILE[:W]",
    ),
]
StartImage = Annotated[Path | None, typer.Option("--image", help="Picture to start from, for image-to-video models.")]
SoftPagHeads = Annotated[
    str | None,
    typer.Option(
        "--softpag",
        help="SoftPAG guidance: the attention heads to disturb, such as L3H1,L5, or the .json of a head set.",
        metavar="HEADS",
    ),
]
SoftPagU = Annotated[float, typer.Option(help="SoftPAG: how strongly the heads are disturbed, 0 to 1.", show_default=True)]
SoftPagScale = Annotated[
    float, typer.Option(help="SoftPAG: how far to move away from the disturbed result.", show_default=True)
]
BroadWayAlpha = Annotated[
    str | None,
    typer.Option(
        "--broadway", help="BroadWay, more motion: a strength such as 0.3, or the preset animatediff.", metavar="ALPHA"
    ),
]
Enhance = Annotated[float | None, typer.Option(help="Enhance-A-Video: its weight, such as 1.0.")]
Fps = Annotated[float | None, typer.Option(help="Frames per second of the video; default: the model's, else 16.")]
Out = Annotated[Path, typer.Option("--out", "-o", help="File to write; its folder is made.", show_default=True)]
Json = Annotated[bool, typer.Option("--json", help="Print the report as JSON on standard output, nothing else.")]

# name -> (kind, default)
SAMPLING: dict[str, tuple[Any, Any]] = {
    "model": (Model, None),
    "negative_prompt": (NegativePrompt, None),
    "frames": (FrameCount, None),
    "height": (Height, None),
    "width": (Width, None),
    "steps": (Steps, None),
    "guidance_scale": (GuidanceScale, None),
    "dtype": (Dtype, "auto"),
    "device": (Device, None),
    "cpu_offload": (CpuOffload, None),
    "lora": (Lora, None),
    "image": (StartImage, None),
}
ATTENTION: dict[str, tuple[Any, Any]] = {
    "attention": (ModelAttention, "radial"),
    "window": (Window, None),
    "stride": (Stride, None),
    "pattern_options": (PatternOptions, None),
    "settings_file": (Settings, None),
    "dense_steps": (OwnDenseSteps, None),
    "dense_layers": (OwnDenseLayers, None),
}
# where the model may be the shipped one: the attention too is chosen for it
OWN_ATTENTION = ATTENTION | {"attention": (OwnAttention, None)}
GUIDANCE: dict[str, tuple[Any, Any]] = {
    "softpag": (SoftPagHeads, None),
    "softpag_u": (SoftPagU, 0.5),
    "softpag_scale": (SoftPagScale, 3.0),
    "broadway": (BroadWayAlpha, None),
    "enhance": (Enhance, None),
}


def sampling_options(**instead: Any) -> Callable[[Command], Command]:
    """In place of a command's parameter `settings`: the options of SAMPLING, gathered as SamplingSettings.

    instead: other kinds for some of them, where the command's help must say something else.
    """
    options = SAMPLING | {name: (kind, SAMPLING[name][1]) for name, kind in instead.items()}
    return functools.partial(_offer, "settings", options, _sampling_settings)


def attention_options(own: bool = False) -> Callable[[Command], Command]:
    """In place of a command's parameter `attention`: the options of ATTENTION, gathered as AttentionSettings.

    own: options left out are noted as such, so that the command may choose for the model.
    """
    return functools.partial(_offer, "attention", OWN_ATTENTION if own else ATTENTION, _attention_settings)


def guidance_options() -> Callable[[Command], Command]:
    """In place of a command's parameter `guidance`: the options of GUIDANCE, gathered as GuidanceSettings."""
    return functools.partial(_offer, "guidance", GUIDANCE, _guidance_settings)


def _guidance_settings(**given: Any) -> Any:
    from genattn.apps.sampling.guidance_options import GuidanceSettings

    return GuidanceSettings(**given)


def _sampling_settings(**given: Any) -> Any:
    from genattn.apps.sampling.run import SamplingSettings

    given["lora"] = tuple(given.get("lora") or ())
    return SamplingSettings(**given)


def _attention_settings(
    attention: str | None,
    window: str | None,
    stride: str | None,
    pattern_options: str | None,
    settings_file: Path | None,
    dense_steps: float | None,
    dense_layers: int | None,
) -> Any:
    from genattn.apps.sampling.attention_names import AUTO, attention_from_name
    from genattn.apps.sampling.run import AttentionSettings
    from genattn.apps.sampling.saved_settings import attention_from_file

    if settings_file is not None:
        beside = {"--window": window, "--stride": stride, "--pattern-options": pattern_options}
        told = [name for name, value in beside.items() if value]
        if told:
            raise GenAttnError(f"--settings names the whole pattern, got {', '.join(told)} beside it; leave one of them out")
        return attention_from_file(settings_file, dense_steps, dense_layers)
    named: dict[str, Any] = {"attention": attention or pattern_options or window or stride}
    named |= {"dense_steps": dense_steps, "dense_layers": dense_layers}
    written = {name: value for name, value in named.items() if value is not None}
    dense: dict[str, Any] = {name: value for name, value in written.items() if name != "attention"}
    name = attention or (ATTENTION["attention"][1] if "attention" in written else AUTO)
    pattern = attention_from_name(name, pattern_options, window, stride)
    return AttentionSettings(name, pattern, **dense, given=frozenset(written))


def _offer(parameter: str, options: dict[str, tuple[Any, Any]], gather: Callable[..., Any], command: Command) -> Command:
    """`command` with the options of a group where it has `parameter`."""
    own = inspect.signature(command)
    parameters: list[inspect.Parameter] = []
    for each in own.parameters.values():
        if each.name == parameter:
            parameters += [each.replace(name=name, annotation=kind, default=value) for name, (kind, value) in options.items()]
        else:
            parameters.append(each)
    signature = own.replace(parameters=parameters)

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        given = dict(bound.arguments)
        gathered = gather(**{name: given.pop(name) for name in options})
        command(**given, **{parameter: gathered})

    # typer reads both
    run.__signature__ = signature  # type: ignore[attr-defined]
    run.__annotations__ = {each.name: each.annotation for each in parameters}
    return run
