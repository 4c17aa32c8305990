"""`genattn generate`: a prompt in, a video (or picture) and an honest report out.

    load -> check size, prompt, output path -> [warm up] -> sparse run -> [dense run, same seed] -> files + table

Nothing is written before every frame of the run is there and finite.
"""

import inspect
import platform
import resource
import time
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import genattn
from genattn.apps import legal_sizes
from genattn.apps.attention_names import pattern_from_name
from genattn.apps.clip_quality import is_tiny_world, psnr, ssim
from genattn.apps.load_pipeline import load_pipeline
from genattn.apps.output_files import IMAGE_SUFFIXES, VIDEO_SUFFIXES, check_out, write_image, write_json, write_video
from genattn.errors import GenAttnError

Frames = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class GenerateRequest:
    """One run. None means what the model was made for."""

    prompt: str
    out: Path
    model: str | None = None
    negative_prompt: str | None = None
    frames: int | None = None
    height: int | None = None
    width: int | None = None
    steps: int | None = None
    guidance_scale: float | None = None
    seed: int = 0
    attention: str = "radial"
    pattern_options: str | None = None
    dense_steps: float = 0.25
    dense_layers: int = 1
    compare_dense: bool = False
    dtype: str = "auto"
    device: str | None = None
    cpu_offload: str | None = None
    fps: float | None = None

    def __post_init__(self) -> None:
        if not self.prompt.strip():
            raise GenAttnError("--prompt must say what to show, got an empty text")
        if self.steps is not None and self.steps < 1:
            raise GenAttnError(f"--steps must be >= 1, got {self.steps}")
        if self.dense_steps < 0 or (self.dense_steps > 1 and self.dense_steps != int(self.dense_steps)):
            raise GenAttnError(f"--dense-steps must be a share in [0, 1] or a whole number, got {self.dense_steps}")
        if self.dense_layers < 0:
            raise GenAttnError(f"--dense-layers must be >= 0, got {self.dense_layers}")
        if self.guidance_scale is not None and not np.isfinite(self.guidance_scale):
            raise GenAttnError(f"--guidance-scale must be a finite number, got {self.guidance_scale}")
        if self.fps is not None and not 0 < self.fps <= 240:
            raise GenAttnError(f"--fps must lie in (0, 240], got {self.fps}")
        if self.cpu_offload not in (None, "model", "group"):
            raise GenAttnError(f"--cpu-offload must be model or group, got {self.cpu_offload!r}")
        if self.compare_dense and self.attention == "dense":
            raise GenAttnError("--compare-dense compares a sparse run with a dense one; --attention is dense already")


@dataclass(frozen=True)
class RunResult:
    """One sampling run: frames uint8 [T, H, W, 3], its time, peak memory and share of attention computed."""

    attention: str
    frames: Frames
    seconds: float
    peak_memory_gb: float
    density: float
    sparse_density: float | None
    notes: tuple[str, ...] = ()


def generate(request: GenerateRequest) -> dict[str, Any]:
    """Run `request`, write its files and return the report that lies beside them as JSON.

    Raises:
        GenAttnError: anything the request, the model or the machine cannot serve; nothing is written then.
    """
    check_out(request.out, VIDEO_SUFFIXES + IMAGE_SUFFIXES)
    pattern = pattern_from_name(request.attention, request.pattern_options)
    pipe = load_pipeline(request.model, request.dtype, request.device)
    if request.cpu_offload == "model":
        pipe.enable_model_cpu_offload()
    elif request.cpu_offload == "group":
        pipe.enable_group_offload(onload_device=pipe.device, offload_type="leaf_level")
    call = call_arguments(pipe, request)
    warnings = prompt_warnings(pipe, request.prompt)
    if request.compare_dense:  # the first pass through a model pays for its set-up; neither side should
        _run(pipe, {**call, "num_inference_steps": 1}, None, request, "warm-up")
    results = [_run(pipe, call, pattern, request, request.attention)]
    if request.compare_dense:
        results.append(_run(pipe, call, None, request, "dense"))
    return _write(request, pipe, call, results, warnings)


def call_arguments(pipe: Any, request: GenerateRequest) -> dict[str, Any]:
    """Keyword arguments of the pipeline's call, sizes checked.

    Raises:
        GenAttnError: a size the model cannot take, or frames or a negative prompt for a pipeline that has none.
    """
    accepted = inspect.signature(pipe.__call__).parameters
    video = "num_frames" in accepted
    if request.frames is not None and not video:
        raise GenAttnError(f"{type(pipe).__name__} makes pictures, got --frames {request.frames}; leave it out")
    wanted = VIDEO_SUFFIXES if video else IMAGE_SUFFIXES
    if request.out.suffix.lower() not in wanted:
        raise GenAttnError(f"{type(pipe).__name__} needs --out ending in {', '.join(wanted)}, got {str(request.out)!r}")
    size = {**default_size(pipe, accepted), **_given(height=request.height, width=request.width, num_frames=request.frames)}
    legal_sizes.check_size(pipe, size["height"], size["width"], size.get("num_frames"))
    call = {
        **size,
        **_given(
            num_inference_steps=request.steps,
            guidance_scale=request.guidance_scale,
            negative_prompt=request.negative_prompt,
        ),
        "prompt": request.prompt,
        "output_type": "np",
    }
    call.setdefault("num_inference_steps", own_defaults(pipe).get("steps", _default(accepted, "num_inference_steps", 50)))
    if "guidance_scale" in accepted and "guidance_scale" not in call and "guidance_scale" in own_defaults(pipe):
        call["guidance_scale"] = own_defaults(pipe)["guidance_scale"]
    unknown = sorted(set(call) - set(accepted))
    if unknown:
        raise GenAttnError(f"{type(pipe).__name__} takes no {', '.join(unknown)}; leave it out")
    return call


def own_defaults(pipe: Any) -> dict[str, Any]:
    """`genattn_defaults.json` beside a model_index.json: the size, steps, guidance and fps a tiny model was trained for."""
    import json

    file = Path(str(getattr(pipe.config, "_name_or_path", "") or "")) / "genattn_defaults.json"
    return json.loads(file.read_text()) if file.is_file() else {}


def default_size(pipe: Any, accepted: Any) -> dict[str, int]:
    """The size the model was made for: its own defaults, then the pipeline's."""
    own = own_defaults(pipe)
    names = ["height", "width"] + (["num_frames"] if "num_frames" in accepted else [])
    size = {}
    for name in names:
        fallback = _default(accepted, name, None)
        if fallback is None and name != "num_frames":
            sample = getattr(pipe, "default_sample_size", None)
            fallback = sample * getattr(pipe, "vae_scale_factor", 8) if isinstance(sample, int) else None
        value = own.get({"num_frames": "frames"}.get(name, name), fallback)
        if value is None:
            raise GenAttnError(f"{type(pipe).__name__} has no default {name}; give --{name.removeprefix('num_')}")
        size[name] = int(value)
    return size


def prompt_warnings(pipe: Any, prompt: str) -> list[str]:
    """A line per tokenizer that will cut the prompt off."""
    accepted = inspect.signature(pipe.__call__).parameters
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


def _run(pipe: Any, call: dict[str, Any], pattern: Any, request: GenerateRequest, title: str) -> RunResult:
    import torch

    pipe.set_progress_bar_config(desc=title, leave=title != "warm-up")
    generator = torch.Generator().manual_seed(request.seed)
    handle = None
    if pattern is not None:
        dense_steps = request.dense_steps if request.dense_steps <= 1 and request.dense_steps != 1 else int(request.dense_steps)
        handle = genattn.apply(pipe, pattern, dense_steps=dense_steps, dense_layers=request.dense_layers)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    begin = time.perf_counter()
    try:
        output = pipe(**call, generator=generator)
        report = None if handle is None else handle.report()
    except ValueError as error:
        if isinstance(error, GenAttnError):
            raise
        raise GenAttnError(f"{type(pipe).__name__} refuses this call: {str(error).splitlines()[0]}") from None
    finally:
        if handle is not None:
            handle.remove()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    seconds = time.perf_counter() - begin
    return RunResult(
        title,
        to_uint8(output.frames[0] if hasattr(output, "frames") else output.images),
        seconds,
        _peak_memory_gb(),
        1.0 if report is None else report.density,
        None if report is None else report.sparse_density,
        () if report is None else tuple(report.notes),
    )


def to_uint8(frames: npt.NDArray[np.floating[Any]]) -> Frames:
    """Frames in [0, 1] as uint8 [T, H, W, 3].

    Raises GenAttnError when a value is not finite: such a clip is not worth a file.
    """
    frames = np.asarray(frames)
    bad = int(np.size(frames) - np.isfinite(frames).sum())
    if bad:
        raise GenAttnError(f"the output holds {bad} values that are not finite; nothing was written (try --dtype float32)")
    return (frames * 255).round().clip(0, 255).astype(np.uint8)


def _peak_memory_gb() -> float:
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def _write(
    request: GenerateRequest, pipe: Any, call: dict[str, Any], results: list[RunResult], warnings: list[str]
) -> dict[str, Any]:
    main = results[0]
    fps = request.fps or own_defaults(pipe).get("fps", 16)
    report: dict[str, Any] = {
        "request": {k: str(v) if isinstance(v, Path) else v for k, v in asdict(request).items()},
        "model": type(pipe).__name__,
        "size": {k: call[k] for k in ("height", "width", "num_frames") if k in call},
        "steps": call["num_inference_steps"],
        "fps": fps,
        "seed": request.seed,
        "device": str(pipe.device),
        "versions": _versions(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "warnings": warnings,
        "runs": [_row(r, results[-1] if request.compare_dense else None, request) for r in results],
    }
    clips = {request.out: main.frames}
    if request.compare_dense:
        clips[request.out.with_stem(f"{request.out.stem}.dense")] = results[1].frames
        pair = np.concatenate([results[1].frames, main.frames], axis=2)
        clips[request.out.with_stem(f"{request.out.stem}.side-by-side")] = pair
    tags = {k: report["request"][k] for k in ("prompt", "seed", "attention", "dense_steps", "dense_layers")}
    for path, frames in clips.items():
        _save(path, frames, fps, {**tags, "model": report["model"], "steps": report["steps"], "genattn": genattn.__version__})
    report["files"] = [str(path) for path in clips]
    write_json(request.out.with_suffix(".json"), report)
    return report


def _row(result: RunResult, dense: RunResult | None, request: GenerateRequest) -> dict[str, Any]:
    row: dict[str, Any] = {
        "attention": result.attention,
        "seconds": round(result.seconds, 3),
        "density": round(result.density, 4),
        "sparse_density": None if result.sparse_density is None else round(result.sparse_density, 4),
        "peak_memory_gb": round(result.peak_memory_gb, 3),
        "notes": list(result.notes),
    }
    if dense is not None and result is not dense:
        row |= {"psnr": round(psnr(result.frames, dense.frames), 2), "ssim": round(ssim(result.frames, dense.frames), 4)}
    if is_tiny_world(request.model):
        from genattn.pipelines.tiny_oracle import judge

        row["oracle"] = judge(result.frames, request.prompt)
    return row


def _save(path: Path, frames: Frames, fps: float, metadata: dict[str, Any]) -> None:
    if path.suffix.lower() in VIDEO_SUFFIXES:
        write_video(path, frames, fps, metadata)
    else:
        write_image(path, frames[0], metadata)


def _versions() -> dict[str, str]:
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
    parameter = parameters.get(name)
    return fallback if parameter is None or parameter.default in (None, inspect.Parameter.empty) else parameter.default
