"""A whole call of a trained model, sparse against dense: what is gained, and what of the clip is kept.

    python -m genattn.apps.laboratory.end_to_end run --captions 20      samples; goes on where it was
    python -m genattn.apps.laboratory.end_to_end clock                  seconds and peak memory, a process for each setting
    python -m genattn.apps.laboratory.end_to_end table                  assets/bench/end_to_end.csv from both

The model is tiny-wan-long-bound: 4,096 tokens in a clip of 61 frames, 8,192 in one of 125 (`--frames`). That is twice its
trained length, where motion stops; there every run, dense ones too, has its frames stretched over the trained positions.
Held-out captions, the same noise for all settings of a caption. Dense is torch's fastest attention here; the oracle's
difference to dense is paired by caption.
"""

import json
import resource
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import genattn
from genattn.apps.laboratory.adaptive import interval, read_samples
from genattn.apps.laboratory.sweeps import captions
from genattn.apps.sampling.clip_quality import psnr, ssim
from genattn.apps.sampling.generate import oracle_scores
from genattn.apps.sampling.load_pipeline import shipped_model
from genattn.apps.sampling.measured_rows import append_rows, merged, provenance, read_rows
from genattn.apps.sampling.run import DENSE, AttentionSettings, SamplingSettings, call_arguments, open_pipeline, run_once
from genattn.errors import GenAttnError
from genattn.patterns.adaptive import AdaptivePattern
from genattn.patterns.neighborhood import NeighborhoodPattern
from genattn.patterns.pattern import TailName
from genattn.patterns.profiled import ProfiledPattern
from genattn.pipelines.long_clip.riflex import FrameStretch
from genattn.selection.estimate import PooledScore
from genattn.selection.rules import TopK
from genattn.selection.tiling import Clusters

MODEL = "tiny-wan-long-bound"
FRAMES = 61
ORACLE = ("colour", "shape", "motion", "size")
SAMPLES, CLOCK = Path("out/end_to_end.jsonl"), Path("out/end_to_end_clock.jsonl")
TABLE = Path("assets/bench/end_to_end.csv")
_TURNS = 3
# (share visited, tail, dense steps)
_PROFILED: tuple[tuple[float, TailName, int], ...] = (
    (0.15, "mean2", 0),
    (0.25, "mean", 0),
    (0.25, "mean2", 0),
    (0.4, "mean2", 0),
    (0.4, "mean2", 2),
)


def settings_by_name(profile: Path, frames: int = FRAMES) -> dict[str, AttentionSettings]:
    """Everything compared, dense first; sparse in every step and layer but where the name says otherwise.

    Args:
        profile: the map.
        frames: of a clip, 1 + 4 n; the window holds a quarter of them, the narrow one an eighth.
    """
    window = NeighborhoodPattern((latent_frames(frames) // 4, 16, 16))
    narrow = NeighborhoodPattern((latent_frames(frames) // 8, 16, 16))
    clusters = AdaptivePattern(TopK(0.15), PooledScore(0), Clusters(32, 32))
    found = {
        "window": AttentionSettings("window", window.with_tail(None), 0, 0),
        "window + mean": AttentionSettings("window + mean", window.with_tail("mean"), 0, 0),
        "window + mean2": AttentionSettings("window + mean2", window.with_tail("mean2"), 0, 0),
        "narrow window + mean2": AttentionSettings("narrow window + mean2", narrow.with_tail("mean2"), 0, 0),
        "clusters + mean": AttentionSettings("clusters + mean", clusters.with_tail("mean"), 0, 0),
        "clusters + mean2": AttentionSettings("clusters + mean2", clusters.with_tail("mean2"), 0, 0),
    }
    for share, tail, dense_steps in _PROFILED:
        name = f"profiled {share:g} + {tail}" + (f", {dense_steps} dense steps" if dense_steps else "")
        found[name] = AttentionSettings(name, ProfiledPattern(str(profile), density=share, tail=tail), dense_steps, 0)
    return {"dense": DENSE} | found


def latent_frames(frames: int) -> int:
    """Latent frames of a clip of `frames`, 1 + 4 n.

    Raises:
        GenAttnError: for another number, or a clip shorter than four latent frames.
    """
    if frames % 4 != 1 or frames < 13:
        raise GenAttnError(
            f"frames must be 1 + 4 n and at least 13, got {frames}; the nearest is {max(13, frames // 4 * 4 + 1)}"
        )
    return frames // 4 + 1


class Stopwatch:
    """Processor and clock seconds spent inside one module's forward."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.processor = self.clock = 0.0
        self._begun = (0.0, 0.0)
        self._hooks = (module.register_forward_pre_hook(self._begin), module.register_forward_hook(self._end))

    def _begin(self, *_: Any) -> None:
        self._begun = (time.process_time(), time.perf_counter())

    def _end(self, *_: Any) -> None:
        self.processor += time.process_time() - self._begun[0]
        self.clock += time.perf_counter() - self._begun[1]

    def stop(self) -> None:
        """Take the hooks off again."""
        for hook in self._hooks:
            hook.remove()


def timed_run(
    pipe: Any, call: dict[str, Any], text: str, seed: int, settings: AttentionSettings
) -> tuple[Any, dict[str, float]]:
    """One sampling run and its seconds: of the whole call and of the denoiser, by the processor and by the clock."""
    watch = Stopwatch(pipe.transformer)
    begun = time.process_time()
    result = run_once(pipe, call, text, seed, settings, settings.name)
    whole = time.process_time() - begun
    watch.stop()
    return result, {
        **{"processor": whole, "denoiser_processor": watch.processor},
        **{"seconds": result.seconds, "denoiser_seconds": watch.clock},
    }


def opened(model: str, frames: int) -> tuple[Any, dict[str, Any]]:
    """The pipeline on the CPU, its frames stretched where they are more than it was trained on, and its call's arguments."""
    settings = SamplingSettings(str(shipped_model(model)), frames=frames, device="cpu")
    pipe = open_pipeline(settings)
    if frames > FRAMES:
        genattn.apply(pipe, FrameStretch(latent_frames(FRAMES)))
    return pipe, call_arguments(pipe, settings)


def run_samples(model: str, count: int, names: Sequence[str], profile: Path, out: Path, frames: int = FRAMES) -> None:
    """Append one line per caption and setting; those that are there already are left out."""
    pipe, call = opened(model, frames)
    known = settings_by_name(profile, frames)
    done = {(s["caption"], s["setting"]) for s in read_samples(out) if s["frames"] == frames}
    out.parent.mkdir(parents=True, exist_ok=True)
    for number, text in enumerate(captions(count)):
        todo = [name for name in names if (number, name) not in done]
        if not todo:
            continue
        dense, dense_clock = timed_run(pipe, call, text, number, DENSE)
        for name in todo:
            result, clock = (dense, dense_clock) if name == "dense" else timed_run(pipe, call, text, number, known[name])
            same = name == "dense"
            sample = {
                **{"frames": frames, "caption": number, "setting": name, "density": result.density},
                **{"psnr": None if same else psnr(result.frames, dense.frames)},
                **{"ssim": 1.0 if same else ssim(result.frames, dense.frames)},
                **{key: (oracle_scores(result.frames, text) or {})[key] for key in ORACLE},
                **{f"speedup_{key}": dense_clock[key] / value for key, value in clock.items()},
                **clock,
            }
            with out.open("a") as file:
                file.write(json.dumps(sample) + "\n")


def clock_one(model: str, name: str, profile: Path, frames: int = FRAMES) -> dict[str, Any]:
    """Seconds of calls of one setting that take turns with dense ones, and the process's peak memory without those.

    A machine that others share is a fifth slower at one minute than at the next, so only calls side by side are compared:
    speed-ups are the median over the turns, seconds the fastest. First calls pay for plans and kernels and do not count.
    """
    pipe, call = opened(model, frames)
    text, settings = captions(1)[0], settings_by_name(profile, frames)[name]
    result, _ = timed_run(pipe, call, text, 0, settings)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    timed_run(pipe, call, text, 0, DENSE)
    turns = [[timed_run(pipe, call, text, 0, each)[1] for each in (DENSE, settings)] for _ in range(_TURNS)]
    facts = {"frames": frames, "setting": name, "threads": torch.get_num_threads(), "peak_gb": peak, "density": result.density}
    for key in ("seconds", "denoiser_seconds"):
        facts[key] = min(mine[key] for _, mine in turns)
        facts[key.replace("seconds", "speedup")] = statistics.median(dense[key] / mine[key] for dense, mine in turns)
    return facts


def summary(samples: Sequence[dict[str, Any]], clocked: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row per length and setting: means with 95 % bootstrap intervals over captions, the oracle paired with dense."""
    groups: dict[tuple[int, str], dict[int, dict[str, Any]]] = defaultdict(dict)
    for s in samples:
        groups[s["frames"], s["setting"]][s["caption"]] = s
    seen = {(c["frames"], c["setting"]): _clock(c) for c in clocked}
    rows = []
    for (frames, name), found in groups.items():
        row = _nearness(frames, name, found, groups[frames, "dense"])
        rows.append(row | seen.get((frames, name), {}))
    return rows


def _nearness(frames: int, name: str, found: dict[int, dict[str, Any]], dense: dict[int, dict[str, Any]]) -> dict[str, Any]:
    tokens = latent_frames(frames) * 256
    row: dict[str, Any] = {"frames": frames, "tokens": tokens, "setting": name, "captions": len(found)}
    row["density"] = round(statistics.fmean(s["density"] for s in found.values()), 4)
    for column in ("speedup_processor", "speedup_denoiser_processor"):
        row |= interval(column, [s[column] for s in found.values()])
    if name != "dense":
        row |= interval("psnr", [s["psnr"] for s in found.values()])
    row |= interval("ssim", [s["ssim"] for s in found.values()])
    oracle = {c: statistics.fmean(s[k] for k in ORACLE) for c, s in found.items()}
    base = {c: statistics.fmean(s[k] for k in ORACLE) for c, s in dense.items()}
    row |= interval("oracle", list(oracle.values()))
    row |= interval("oracle_change", [oracle[c] - base[c] for c in oracle])
    return row | {key: round(statistics.fmean(s[key] for s in found.values()), 4) for key in ORACLE}


def _clock(told: dict[str, Any]) -> dict[str, Any]:
    timed = {key: round(told[key], 3) for key in ("seconds", "denoiser_seconds", "peak_gb")}
    speedups = {"speedup": round(told["speedup"], 3), "speedup_denoiser": round(told["denoiser_speedup"], 3)}
    return {**timed, "threads": told["threads"], **speedups}


app = typer.Typer(help=__doc__)
_PROFILE = "The map to run; default: the shipped one."
_FRAMES = "Frames of a clip, 1 + 4 n."


def _map(given: Path | None) -> Path:
    return given or shipped_model(MODEL).parent / "maps" / f"{MODEL}.safetensors"


@app.command("run")
def run_command(
    count: Annotated[int, typer.Option("--captions", help="Held-out captions.")] = 20,
    setting: Annotated[list[str] | None, typer.Option(help="Settings by name; default: all.")] = None,
    profile: Annotated[Path | None, typer.Option("--map", help=_PROFILE)] = None,
    model: Annotated[str, typer.Option(help="A shipped model.")] = MODEL,
    frames: Annotated[int, typer.Option(help=_FRAMES)] = FRAMES,
    out: Annotated[Path, typer.Option(help="Samples, one line each.")] = SAMPLES,
) -> None:
    """Sample what is still missing."""
    known = settings_by_name(_map(profile), frames)
    unknown = sorted(set(setting or ()) - set(known))
    if unknown:
        raise GenAttnError(f"settings must be among {', '.join(known)}; got {', '.join(unknown)}")
    run_samples(model, count, setting or list(known), _map(profile), out, frames)


@app.command("clock")
def clock_command(
    profile: Annotated[Path | None, typer.Option("--map", help=_PROFILE)] = None,
    model: Annotated[str, typer.Option(help="A shipped model.")] = MODEL,
    frames: Annotated[int, typer.Option(help=_FRAMES)] = FRAMES,
    out: Annotated[Path, typer.Option(help="One line a setting.")] = CLOCK,
    only: Annotated[str | None, typer.Option(help="One setting, in this process; what the command calls itself with.")] = None,
) -> None:
    """Time every setting on a quiet machine."""
    if only is not None:
        print(json.dumps(clock_one(model, only, _map(profile), frames)), flush=True)
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    for name in settings_by_name(_map(profile), frames):
        words = ["clock", "--only", name, "--model", model, "--frames", str(frames), "--map", str(_map(profile))]
        answer = subprocess.run(
            [sys.executable, "-m", "genattn.apps.laboratory.end_to_end", *words], capture_output=True, text=True, check=True
        )
        with out.open("a") as file:
            file.write(answer.stdout.strip().splitlines()[-1] + "\n")
        print(answer.stdout.strip().splitlines()[-1], flush=True)


@app.command("table")
def table_command(
    samples: Annotated[Path, typer.Option(help="Samples of `run`.")] = SAMPLES,
    clocked: Annotated[Path, typer.Option(help="Lines of `clock`.")] = CLOCK,
    table: Annotated[Path, typer.Option(help="The file to write.")] = TABLE,
    model: Annotated[str, typer.Option(help="The model they are of.")] = MODEL,
) -> None:
    """Write the table: rows that the samples speak of anew, the others as they stand."""
    facts = provenance("cpu")
    new = [{"model": model} | row | facts for row in summary(read_samples(samples), read_samples(clocked))]
    rows = merged(read_rows(table), new, ("model", "frames", "setting"))
    table.unlink(missing_ok=True)
    append_rows(table, rows)


if __name__ == "__main__":
    app()
