"""One sampling run of a pipeline: its arguments checked before, its frames, time, memory and density after.

Shared by the commands that sample: generate, compare.
"""

import contextlib
import platform
import resource
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import genattn
from genattn.apps.sampling import legal_sizes
from genattn.apps.sampling.guidance_options import GuidanceSettings
from genattn.apps.sampling.inputs import add_loras, lora_of, read_picture
from genattn.apps.sampling.load_pipeline import check_folder, load_pipeline, shipped_model
from genattn.apps.sampling.negative import split_negative
from genattn.apps.sampling.output_files import IMAGE_SUFFIXES, VIDEO_SUFFIXES
from genattn.apps.sampling.pipeline_calls import is_modular, own_size, sample_frames, source_of, taken_arguments
from genattn.apps.sampling.pipeline_shell import pipeline_shell
from genattn.apps.sampling.preview import StepPreview
from genattn.errors import GenAttnError, RunFailed, first_line
from genattn.fingerprint import named_file
from genattn.patterns.pattern import Pattern
from genattn.reading import read_defaults, whole

Frames = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class RunResult:
    """One sampling run: frames uint8 [T, H, W, 3], its time and peak memory.

    density: share of the self-attention scores computed over the whole run. sparse_density: over the sparse calls alone.
    notes: why nothing was sparse, when nothing was. preset: which preset of the model a name stood for, and why.
    """

    attention: str
    frames: Frames
    seconds: float
    peak_memory_gb: float
    density: float
    sparse_density: float | None
    notes: tuple[str, ...] = ()
    preset: str = ""


@dataclass(frozen=True)
class SamplingSettings:
    """Which model, and what every run of a command has in common. None means what the model was made for.

    lora: files or hub ids, each with `:WEIGHT` behind it where it is not 1. image: picture that the video starts from, or that
    the picture is made from.
    """

    model: str | None = None
    negative_prompt: str | None = None
    frames: int | None = None
    height: int | None = None
    width: int | None = None
    steps: int | None = None
    guidance_scale: float | None = None
    dtype: str = "auto"
    device: str | None = None
    cpu_offload: str | None = None
    lora: tuple[str, ...] = ()
    image: Path | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "frames", "height", "width"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise GenAttnError(f"--{name} must be >= 1, got {value}; leave it out for the model's own")
        if self.guidance_scale is not None and not np.isfinite(self.guidance_scale):
            raise GenAttnError(f"--guidance-scale must be a finite number, got {self.guidance_scale}")
        if self.cpu_offload not in (None, "model", "group"):
            raise GenAttnError(f"--cpu-offload must be model or group, got {self.cpu_offload!r}")
        if self.image is not None and not self.image.is_file():
            raise GenAttnError(f"--image must be a picture, and there is no file {str(self.image)!r}")
        for text in self.lora:
            lora_of(text)

    def request(self) -> dict[str, str]:
        """What was given, JSON-ready: what a run that goes on after a stop must have in common with it."""
        told = {**asdict(self), "image": None if self.image is None else named_file(self.image)}
        return {name: str(value) for name, value in told.items() if value not in (None, ())}


@dataclass(frozen=True)
class AttentionSettings:
    """One attention to sample with: its name, the pattern behind it (None: dense), what stays dense, and guidance inside it.

    pattern: a string is a name that `genattn.apply` fills with the model's preset; dense steps and layers that the user did not
    name are then the preset's too.

    given: which of these a user named; the rest may yet be changed to what suits the model. more: further settings of the
    schedule, as a settings file may hold them.
    """

    name: str
    pattern: Pattern | str | None
    dense_steps: float = 0.25
    dense_layers: int = 1
    guidance: GuidanceSettings = field(default_factory=GuidanceSettings)
    given: frozenset[str] = frozenset(("attention", "dense_steps", "dense_layers"))
    more: tuple[tuple[str, Any], ...] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.dense_steps < np.inf or (self.dense_steps >= 1 and self.dense_steps != int(self.dense_steps)):
            raise GenAttnError(f"--dense-steps must be a share below 1 or a whole number, got {self.dense_steps}")
        if self.dense_layers < 0:
            raise GenAttnError(f"--dense-layers must be >= 0, got {self.dense_layers}")

    @property
    def steps_to_keep(self) -> float | int:
        """Dense steps as a Schedule takes them: a float is a share, an int a number."""
        return self.dense_steps if self.dense_steps < 1 else int(self.dense_steps)

    @property
    def schedule(self) -> dict[str, Any]:
        """What stays dense, as `genattn.apply` takes it by name."""
        settings = {"dense_steps": self.steps_to_keep, "dense_layers": self.dense_layers}
        if isinstance(self.pattern, str):
            settings = {name: value for name, value in settings.items() if name in self.given}
        return {**settings, **dict(self.more)}


DENSE = AttentionSettings("dense", None)
_NOTHING_SKIPPED = 0.999  # a density above it is dense but for rounding


def open_pipeline(settings: SamplingSettings) -> Any:
    """The pipeline on its device, offloaded as asked.

    Raises GenAttnError as `load_pipeline` does.
    """
    pipe = load_pipeline(settings.model, settings.dtype, settings.device, settings.cpu_offload)
    add_loras(pipe, settings.lora)
    return pipe


def refuse_early(settings: SamplingSettings, out: Path | None = None) -> None:
    """Refuse from the folder's configs alone, before its weights are read, what `call_arguments` would refuse after.

    A hub id, or a folder that cannot be read so, is let through: the opened pipeline is asked again in any case.

    Raises GenAttnError as `check_folder`, `call_arguments` and `check_suffix` do.
    """
    folder = shipped_model() if settings.model is None else Path(settings.model)
    if not (folder / "model_index.json").is_file():
        return
    check_folder(folder)
    shell = pipeline_shell(folder)
    if shell is None:
        return
    if out is not None:
        check_suffix(shell, out)
    with whole(f"a config in {folder}"):
        call_arguments(shell, settings)


def check_suffix(pipe: Any, out: Path) -> None:
    """Raise GenAttnError when a video pipeline is to write a picture, or a picture pipeline a video."""
    suffixes = VIDEO_SUFFIXES if makes_video(pipe) else IMAGE_SUFFIXES
    if out.suffix.lower() not in suffixes:
        raise GenAttnError(f"{type(pipe).__name__} needs --out ending in {', '.join(suffixes)}, got {str(out)!r}")


def call_arguments(pipe: Any, settings: SamplingSettings) -> dict[str, Any]:
    """Keyword arguments of the pipeline's call, without prompt and generator; sizes checked.

    Raises:
        GenAttnError: a size the model cannot take, or an argument that this pipeline does not have.
    """
    accepted = taken_arguments(pipe)
    if settings.frames is not None and not makes_video(pipe):
        raise GenAttnError(f"{type(pipe).__name__} makes pictures, got --frames {settings.frames}; leave it out")
    own = own_defaults(pipe)
    size = default_size(pipe) | _given(height=settings.height, width=settings.width, num_frames=settings.frames)
    if "height" in size and "width" in size:  # a modular pipeline may work out what it is not told
        legal_sizes.check_size(pipe, size["height"], size["width"], size.get("num_frames"))
    call: dict[str, Any] = {**size, "num_inference_steps": _default(accepted, "num_inference_steps", 50)}
    call |= _given(num_inference_steps=own.get("steps"), guidance_scale=own.get("guidance_scale"))
    call |= _given(
        num_inference_steps=settings.steps,
        guidance_scale=settings.guidance_scale,
        negative_prompt=settings.negative_prompt,
        image=None if settings.image is None else read_picture(settings.image),
    )
    unknown = sorted(set(call) - set(accepted) - {"negative_prompt"})  # where the call has no place for it, NAG has
    if unknown:
        raise GenAttnError(f"{type(pipe).__name__} takes no {', '.join(unknown)}; leave it out")
    return call


def makes_video(pipe: Any) -> bool:
    """Whether the pipeline's call takes a number of frames."""
    return "num_frames" in taken_arguments(pipe)


def own_defaults(pipe: Any) -> dict[str, Any]:
    """`genattn_defaults.json` beside model_index.json: the size, steps, guidance and fps that a tiny model was made for."""
    return read_defaults(source_of(pipe))


def default_size(pipe: Any) -> dict[str, int]:
    """Height, width and, for video, frames the model was made for: its own defaults, then the pipeline's.

    Raises GenAttnError when neither tells.
    """
    accepted = taken_arguments(pipe)
    own = own_defaults(pipe)
    sample = getattr(pipe, "default_sample_size", None)
    square = sample * getattr(pipe, "vae_scale_factor", 8) if isinstance(sample, int) else None
    found = {
        "height": own.get("height") or _default(accepted, "height", square),
        "width": own.get("width") or _default(accepted, "width", square),
    }
    if makes_video(pipe):
        found["num_frames"] = own.get("frames") or _default(accepted, "num_frames", None)
    if is_modular(pipe):
        found = {name: value for name, value in found.items() if value is not None} | own_size(pipe)
    missing = [name.removeprefix("num_") for name, value in found.items() if value is None]
    if missing:
        raise GenAttnError(f"{type(pipe).__name__} has no default {' and '.join(missing)}; give --{missing[0]}")
    return {name: int(value) for name, value in found.items()}


def prompt_warnings(pipe: Any, prompt: str) -> list[str]:
    """A line per tokenizer that will cut the prompt off."""
    accepted = taken_arguments(pipe)
    warnings = []
    for name in ("tokenizer", "tokenizer_2", "tokenizer_3"):
        tokenizer = getattr(pipe, name, None)
        if tokenizer is None:
            continue
        limit = tokenizer.model_max_length
        if "CLIP" not in type(tokenizer).__name__:
            limit = min(limit, _default(accepted, "max_sequence_length", limit) or limit)
        length = len(tokenizer(prompt, truncation=False, verbose=False).input_ids)
        if length > limit:
            warnings.append(f"the prompt has {length} tokens, {name} reads the first {limit}; shorten it")
    return warnings


def run_once(
    pipe: Any,
    call: Mapping[str, Any],
    prompt: str,
    seed: int,
    attention: AttentionSettings,
    title: str,
    preview: StepPreview | None = None,
) -> RunResult:
    """Sample one clip or picture; the pipeline is left as it was.

    Args:
        call: from `call_arguments`. A negative prompt acts by NAG where the call runs no classifier-free guidance.
        seed: of the noise, drawn on the CPU so that every device gives the same.
        title: shown on the progress bar.
        preview: keeps a picture of the first frame while the steps go on; its own time is not counted.

    Raises:
        GenAttnError: the pipeline refuses the call, the pattern cannot serve it, or the output is not finite.
    """
    import torch

    pipe.set_progress_bar_config(desc=title, leave=title != "warm-up", disable=None)  # None: a bar for terminals only
    if preview is not None and "callback_on_step_end" in taken_arguments(pipe):
        call = {**call, "callback_on_step_end": preview}
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    call, negative = split_negative(pipe, call)
    begin = time.perf_counter()
    with contextlib.ExitStack() as stack:
        handle = None
        if negative is not None:
            stack.enter_context(genattn.apply(pipe, negative))
        guidance = attention.guidance.plugins()
        if guidance:
            stack.enter_context(genattn.apply(pipe, *guidance))
        if attention.pattern is not None:
            handle = stack.enter_context(genattn.apply(pipe, attention.pattern, **attention.schedule))
        try:
            sampled = sample_frames(pipe, **call, prompt=prompt, generator=torch.Generator().manual_seed(seed))
        except ValueError as error:
            if isinstance(error, GenAttnError):
                raise
            raise GenAttnError(f"{type(pipe).__name__} refuses this call: {first_line(error)}") from None
        report = None if handle is None else handle.report()
        preset = "" if handle is None else getattr(handle.plugins[0], "origin", "")
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    seconds = time.perf_counter() - begin - (0.0 if preview is None else preview.seconds)
    frames = to_uint8(sampled)
    if report is None:
        return RunResult(attention.name, frames, seconds, _peak_memory_gb(), 1.0, None)
    notes = () if report.sparse_calls else (report.verdict, *report.dense_reasons)
    if report.density is not None and report.density > _NOTHING_SKIPPED:
        notes = (_why_nothing_skipped(pipe, attention),)
    computed = report.flops / report.flops_dense if report.flops_dense else 1.0
    return RunResult(attention.name, frames, seconds, _peak_memory_gb(), computed, report.density, notes, preset)


def _why_nothing_skipped(pipe: Any, attention: AttentionSettings) -> str:
    """What to do about a sparse run that computed every score."""
    if attention.name.startswith("radial") and not makes_video(pipe):
        return (
            f"{attention.name} skipped nothing: it thins out over frames, and a picture has one; use --attention neighborhood"
        )
    return f"{attention.name} skipped nothing at this size; take a smaller window or decay, or a larger clip (genattn plan)"


def warm_up(pipe: Any, call: Mapping[str, Any], prompt: str, attention: AttentionSettings) -> None:
    """One step dense and one sparse: the first pass through a model, a plan and a kernel pays for its set-up."""
    given = attention.given | {"dense_steps", "dense_layers"}
    sparse = replace(attention, dense_steps=0, dense_layers=0, more=(), given=given)
    for each in (replace(DENSE, guidance=attention.guidance), sparse):
        run_once(pipe, {**call, "num_inference_steps": 1}, prompt, 0, each, "warm-up")


def to_uint8(frames: npt.NDArray[np.floating[Any]]) -> Frames:
    """Frames in [0, 1] as uint8 [T, H, W, 3].

    Raises RunFailed when a value is not finite: such a clip is not worth a file.
    """
    frames = np.asarray(frames)
    bad = int(np.size(frames) - np.isfinite(frames).sum())
    if bad:
        raise RunFailed(f"the output holds {bad} values that are not finite; nothing was written (try --dtype float32)")
    return (frames * 255).round().clip(0, 255).astype(np.uint8)


def _peak_memory_gb() -> float:
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("genattn", "torch", "diffusers", "transformers", "triton"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def _given(**values: Any) -> dict[str, Any]:
    return {k: v for k, v in values.items() if v is not None}


def _default(parameters: Any, name: str, fallback: Any) -> Any:
    found = parameters.get(name)
    return fallback if found is None else found
