"""`genattn generate`: a prompt in, a video (or picture) and an honest report out.

    load -> check size, prompt, output path -> [warm up] -> sparse run -> [dense run, same seed] -> files + table

Nothing is written before every frame of the run is there and finite.
"""

import contextlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path, PureWindowsPath
from typing import Any

import numpy as np
import numpy.typing as npt

import genattn
from genattn.apps.sampling.clip_quality import is_tiny_world, psnr, ssim
from genattn.apps.sampling.output_files import IMAGE_SUFFIXES, VIDEO_SUFFIXES, check_out, write_image, write_json, write_video
from genattn.apps.sampling.preview import StepPreview
from genattn.apps.sampling.run import (
    DENSE,
    AttentionSettings,
    RunResult,
    SamplingSettings,
    call_arguments,
    check_suffix,
    open_pipeline,
    own_defaults,
    prompt_warnings,
    refuse_early,
    run_once,
    versions,
    warm_up,
)
from genattn.errors import GenAttnError


@dataclass(frozen=True)
class GenerateRequest:
    """One clip: prompt, seed, attention and the file to write; `compare_dense` samples it a second time, densely."""

    prompt: str
    out: Path
    attention: AttentionSettings
    settings: SamplingSettings = field(default_factory=SamplingSettings)
    seed: int = 0
    compare_dense: bool = False
    fps: float | None = None

    def __post_init__(self) -> None:
        if not self.prompt.strip():
            raise GenAttnError("--prompt must say what to show, got an empty text")
        if self.fps is not None and not 0 < self.fps <= 240:
            raise GenAttnError(f"--fps must lie in (0, 240], got {self.fps}")
        if self.compare_dense and self.attention.pattern is None:
            raise GenAttnError("--compare-dense compares a sparse run with a dense one; --attention is dense already")
        check_out(self.out, VIDEO_SUFFIXES + IMAGE_SUFFIXES)


def generate(request: GenerateRequest) -> dict[str, Any]:
    """Run `request`, write its files and return the report that lies beside them as JSON.

    Raises:
        GenAttnError: anything the request, the model or the machine cannot serve; nothing is written then.
    """
    return generate_all([request])[0]


def generate_all(requests: Sequence[GenerateRequest]) -> list[dict[str, Any]]:
    """Run requests that share their settings, one after the other, on a pipeline that is opened once; a report each.

    Raises GenAttnError as `generate` does; files of requests that were done before stay.
    """
    settings, attention = requests[0].settings, requests[0].attention
    for request in requests:
        refuse_early(settings, request.out)
    pipe = open_pipeline(settings)
    call = call_arguments(pipe, settings)
    for request in requests:
        check_suffix(pipe, request.out)
    if requests[0].compare_dense:
        warm_up(pipe, call, requests[0].prompt, attention)
    return [_generate_one(pipe, call, request) for request in requests]


def _generate_one(pipe: Any, call: dict[str, Any], request: GenerateRequest) -> dict[str, Any]:
    warnings = prompt_warnings(pipe, request.prompt)
    dense = replace(DENSE, guidance=request.attention.guidance)
    wanted = [request.attention] + ([dense] if request.compare_dense else [])
    results = [_sample(request, pipe, call, attention) for attention in wanted]
    report = _report(request, pipe, call, results, warnings)
    report_path = request.out.with_suffix(".json")
    with _put_aside(report_path, request.out):
        _write_clips(request, report, results)
        write_json(report_path, report)
    return report


@contextlib.contextmanager
def _put_aside(report: Path, clip: Path) -> Iterator[None]:
    """While entered there is no earlier report: it must not stand beside another clip. It comes back where the clip stays."""
    aside, before = report.with_name(f".{report.name}.before"), _number_of(clip)
    if report.is_file():
        report.replace(aside)
    try:
        yield
    except BaseException:
        if aside.is_file() and _number_of(clip) == before:
            aside.replace(report)
        raise
    finally:
        aside.unlink(missing_ok=True)


def _number_of(path: Path) -> int | None:
    """The file that has this name now: whole files come by another one's taking the name."""
    return path.stat().st_ino if path.exists() else None


def numbered(out: Path, count: int) -> list[Path]:
    """`out` alone, or video-1.mp4, video-2.mp4, ... for several."""
    digits = len(str(count))
    return [out] if count == 1 else [out.with_stem(f"{out.stem}-{i + 1:0{digits}d}") for i in range(count)]


def _sample(request: GenerateRequest, pipe: Any, call: dict[str, Any], attention: AttentionSettings) -> RunResult:
    preview = StepPreview(request.out.with_name(f"{request.out.stem}.preview.png"))
    try:
        return run_once(pipe, call, request.prompt, request.seed, attention, attention.name, preview)
    finally:
        preview.remove()


def _report(
    request: GenerateRequest, pipe: Any, call: dict[str, Any], results: list[RunResult], warnings: list[str]
) -> dict[str, Any]:
    attention = request.attention
    return {
        "prompt": request.prompt,
        "seed": request.seed,
        "attention": attention.name,
        "pattern": None if attention.pattern is None else repr(attention.pattern),
        "dense_steps": attention.schedule.get("dense_steps"),
        "dense_layers": attention.schedule.get("dense_layers"),
        "guidance": {k: v for k, v in asdict(attention.guidance).items() if v is not None} if attention.guidance.name else {},
        "settings": _plain(asdict(request.settings)),
        "pipeline": type(pipe).__name__,
        **{name: value for name, value in call.items() if name != "image"},
        "fps": request.fps or own_defaults(pipe).get("fps", 16),
        "device": str(getattr(pipe, "_execution_device", pipe.device)),
        "versions": versions(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "warnings": warnings,
        "runs": [_row(result, results[1:], request) for result in results],
    }


def _plain(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings as JSON holds them."""
    return {
        name: str(value) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value
        for name, value in settings.items()
    }


def _row(result: RunResult, dense: list[RunResult], request: GenerateRequest) -> dict[str, Any]:
    row: dict[str, Any] = {
        "attention": result.attention,
        "seconds": round(result.seconds, 3),
        "density": round(result.density, 4),
        "sparse_density": None if result.sparse_density is None else round(result.sparse_density, 4),
        "peak_memory_gb": round(result.peak_memory_gb, 3),
        "notes": list(result.notes),
    }
    if result.preset:
        row["preset"] = result.preset
    if dense and result is not dense[0]:
        row["speedup"] = round(dense[0].seconds / result.seconds, 3)
        row["psnr"] = round(psnr(result.frames, dense[0].frames), 2)
        row["ssim"] = round(ssim(result.frames, dense[0].frames), 4)
    if is_tiny_world(request.settings.model):
        row["oracle"] = oracle_scores(result.frames, request.prompt)
    return row


def oracle_scores(frames: npt.NDArray[np.uint8], prompt: str) -> dict[str, float] | None:
    """What the tiny world's oracle reads in uint8 [T, H, W, 3]; None for a prompt outside that world.

    colour, shape, motion, size: share of the asked objects that have it right. background, count: 1 or 0.
    """
    from genattn.pipelines.tiny.oracle import judge
    from genattn.pipelines.tiny.world import parse_caption

    scene = parse_caption(prompt)
    if scene is None:
        return None
    verdict = judge(frames, scene)
    shares = {name: verdict.share(name) for name in ("colour", "shape", "motion", "size")}
    whole = {name: float(getattr(verdict, name)) for name in ("background", "count", "consistency", "flicker", "motion_amount")}
    return {name: round(value, 4) for name, value in {**shares, **whole}.items()}


def without_folders(description: str) -> str:
    """Of the files that it names, the last part alone: a clip is passed on, and a folder may tell who made it."""
    alone = PureWindowsPath(description).name if description.endswith((".safetensors", ".json")) else description
    return re.sub(r"(['\"])[^'\"]*[/\\\\]([^'\"/\\\\]+)\1", r"\1\2\1", alone)


def _write_clips(request: GenerateRequest, report: dict[str, Any], results: list[RunResult]) -> None:
    clips = {request.out: results[0].frames}
    for dense in results[1:]:
        clips[request.out.with_stem(f"{request.out.stem}.dense")] = dense.frames
        pair = np.concatenate([dense.frames, results[0].frames], axis=2)
        clips[request.out.with_stem(f"{request.out.stem}.side-by-side")] = pair
    names = ("prompt", "seed", "attention", "pattern", "dense_steps", "dense_layers", "pipeline", "num_inference_steps")
    tags = {name: report[name] for name in names} | {"genattn": genattn.__version__}
    tags |= {name: without_folders(tags[name]) for name in ("attention", "pattern") if tags[name] is not None}
    for path, frames in clips.items():
        if path.suffix.lower() in VIDEO_SUFFIXES:
            write_video(path, frames, report["fps"], tags)
        else:
            write_image(path, frames[0], tags)
    report["files"] = [str(path) for path in clips]
