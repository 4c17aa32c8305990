"""`genattn compare`: the same prompts and seeds under several attentions, with quality, time and memory side by side.

    dense      p1 ----  p2 ----  p3 ----        runs are interleaved prompt by prompt, so that a busy machine
    radial       ----     ----     ----         slows all of them alike; ratios are taken per prompt

Rows go to a CSV, from which README's table is generated. Until they are there, a journal keeps the prompts that are done.
"""

import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from genattn.apps.sampling.attention_names import attention_from_name
from genattn.apps.sampling.clip_quality import is_tiny_world, psnr, ssim
from genattn.apps.sampling.generate import oracle_scores
from genattn.apps.sampling.measured_rows import machine_of, provenance
from genattn.apps.sampling.run import (
    DENSE,
    AttentionSettings,
    RunResult,
    SamplingSettings,
    call_arguments,
    open_pipeline,
    refuse_early,
    run_once,
    warm_up,
)
from genattn.errors import GenAttnError
from genattn.fingerprint import named_file, pipeline_fingerprint, place_of
from genattn.patterns.profiled import ProfiledPattern

JUDGED = ("colour", "shape", "motion")
_NUMBERS = ("seconds", "ratio", "density", "peak_memory_gb", "psnr", "ssim")


@dataclass(frozen=True)
class Sample:
    """One prompt under one attention, against the dense run of the same prompt and seed."""

    attention: str
    seconds: float
    ratio: float
    density: float
    peak_memory_gb: float
    psnr: float
    ssim: float
    judged: dict[str, float]

    def line(self, prompt: int) -> dict[str, Any]:
        """As a journal keeps it; `from_line` reads it."""
        plain = asdict(self)
        return {"setting": plain.pop("attention"), "prompt": prompt, **plain.pop("judged"), **plain}

    @classmethod
    def from_line(cls, line: dict[str, Any]) -> "Sample":
        """From `line`."""
        judged = {name: line[name] for name in JUDGED if name in line}
        return cls(line["setting"], **{name: line[name] for name in _NUMBERS}, judged=judged)


class Kept(Protocol):
    """What outlasts a stop: lines of samples, each with its `setting` and `prompt`."""

    samples: list[dict[str, Any]]

    def made_with(self, weights: str, machine: str) -> None:
        """Refuse what was kept of other weights, or on another machine."""

    def begin(self) -> None:
        """Make the file where there is none."""

    def add(self, sample: dict[str, Any]) -> None:
        """One more line."""


def compare(
    prompts: Sequence[str],
    attentions: Sequence[AttentionSettings],
    settings: SamplingSettings,
    seed: int = 0,
    on_sample: Callable[[int, int], None] = lambda done, total: None,
    kept: Kept | None = None,
) -> list[dict[str, Any]]:
    """A row per attention, dense first: means over `prompts` with 95 % bootstrap intervals.

    Args:
        prompts: one clip each; prompt i uses seed + i under every attention.
        on_sample: called with (samples done, samples in all).
        kept: prompts that it holds under every attention are not run again; those that are done go there.

    Raises:
        GenAttnError: no prompts, or a request the model cannot serve.
    """
    if not prompts:
        raise GenAttnError("compare needs at least one prompt, got none; give --prompt or a --prompts file")
    refuse_early(settings)
    pipe = open_pipeline(settings)
    call = call_arguments(pipe, settings)
    if kept is not None:
        kept.made_with(pipeline_fingerprint(pipe), machine_of(pipe))
    names = {"dense": "dense", **{attention.name: _kept_name(attention) for attention in attentions}}
    known = {(line["prompt"], line["setting"]): line for line in ([] if kept is None else kept.samples)}
    todo = [i for i in range(len(prompts)) if not all((i, name) in known for name in names.values())]
    for attention in attentions if todo else ():
        warm_up(pipe, call, prompts[todo[0]], attention)
    for done, i in enumerate(todo, len(prompts) - len(todo) + 1):
        for sample in _samples_of(pipe, call, (i, len(prompts)), prompts[i], seed + i, attentions, settings):
            known[i, names[sample.attention]] = sample.line(i) | {"setting": names[sample.attention]}
        if kept is not None:
            kept.begin()
            for name in names.values():
                kept.add(known[i, name])
        on_sample(done * len(names), len(prompts) * len(names))
    samples = {name: [Sample.from_line(known[i, own]) for i in range(len(prompts))] for name, own in names.items()}
    common: dict[str, Any] = {
        "pipeline": type(pipe).__name__,
        "model": settings.model or "tiny-wan",
        **{k: call[k] for k in ("height", "width", "num_frames", "num_inference_steps", "guidance_scale") if k in call},
        "seed": seed,
        **provenance(place_of(pipe)),
    }
    return [_row(name, found) | common for name, found in samples.items()]


def _kept_name(attention: AttentionSettings) -> str:
    """What a journal calls it: a map's name with a mark of the map that stands there now."""
    pattern = attention.pattern
    return (
        attention.name.replace(pattern.path, named_file(pattern.path))
        if isinstance(pattern, ProfiledPattern)
        else attention.name
    )


def _samples_of(
    pipe: Any,
    call: dict[str, Any],
    place: tuple[int, int],
    prompt: str,
    seed: int,
    attentions: Sequence[AttentionSettings],
    settings: SamplingSettings,
) -> list[Sample]:
    """One prompt under dense attention and all others; place: its number and how many there are."""
    title = f"{place[0] + 1}/{place[1]}"
    dense = run_once(pipe, call, prompt, seed, DENSE, f"{title} dense")
    results = [run_once(pipe, call, prompt, seed, each, f"{title} {each.name}") for each in attentions]
    return [_sample(result, dense, prompt, settings) for result in (dense, *results)]


def _sample(result: RunResult, dense: RunResult, prompt: str, settings: SamplingSettings) -> Sample:
    oracle = oracle_scores(result.frames, prompt) if is_tiny_world(settings.model) else None
    return Sample(
        result.attention,
        result.seconds,
        dense.seconds / result.seconds,
        result.density,
        result.peak_memory_gb,
        psnr(result.frames, dense.frames),
        ssim(result.frames, dense.frames),
        {name: oracle[name] for name in JUDGED} if oracle else {},
    )


def _row(name: str, samples: Sequence[Sample]) -> dict[str, Any]:
    row: dict[str, Any] = {"attention": name, "n": len(samples)}
    row |= _interval("seconds", [s.seconds for s in samples])
    row["speedup"] = round(statistics.median(s.ratio for s in samples), 3)
    row["density"] = round(statistics.mean(s.density for s in samples), 4)
    row["peak_memory_gb"] = round(max(s.peak_memory_gb for s in samples), 3)
    if name != "dense":
        row |= _interval("psnr", [s.psnr for s in samples]) | _interval("ssim", [s.ssim for s in samples])
    for key in samples[0].judged:
        row |= _interval(key, [s.judged[key] for s in samples if s.judged])
    return row


def _interval(name: str, values: Sequence[float]) -> dict[str, float]:
    """Mean and 95 % percentile bootstrap interval (1,000 draws, fixed seed)."""
    rng = random.Random(0)
    draws = sorted(statistics.fmean(rng.choices(values, k=len(values))) for _ in range(1000))
    return {
        name: round(statistics.fmean(values), 4),
        f"{name}_low": round(draws[25], 4),
        f"{name}_high": round(draws[974], 4),
    }


def parse_attention(text: str, dense_layers: int | None = None) -> AttentionSettings:
    """`NAME` or `NAME@DENSE_STEPS`, e.g. `radial@0.5`, `neighborhood:8x8x8/4x4x4@0`.

    Raises GenAttnError for an unknown name, dense itself, or dense steps that are no number.
    """
    name, _, steps = text.partition("@")
    pattern = attention_from_name(name)
    if pattern is None:
        raise GenAttnError("compare always samples dense attention; name the others with --attention")
    try:
        dense_steps = float(steps) if steps else 0.25
    except ValueError:
        raise GenAttnError(f"--attention must be NAME or NAME@DENSE_STEPS, got {text!r}") from None
    told = {"attention": name, "dense_steps": steps, "dense_layers": dense_layers}
    given = frozenset(part for part, value in told.items() if value not in (None, ""))
    return AttentionSettings(text, pattern, dense_steps, 1 if dense_layers is None else dense_layers, given=given)
