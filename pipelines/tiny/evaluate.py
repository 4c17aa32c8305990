"""Score a tiny pipeline with the oracle on captions that training never saw, and write the rows of a table.

Half of the captions ask for a combination of colour, shape and motion that was held out ("unseen"), half for one that
was trained on in another sentence ("seen"). Shares come with Wilson's 95 % interval.
"""

import csv
import datetime
import hashlib
import importlib.metadata
import json
import platform
import subprocess
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from diffusers.pipelines.wan.pipeline_wan import WanPipeline
from tqdm import tqdm

from genattn.errors import GenAttnError
from genattn.pipelines.tiny.export import GenerationDefaults
from genattn.pipelines.tiny.oracle import ObjectVerdict, Reading, Verdict, judge
from genattn.pipelines.tiny.world import Scene, TinyObject, caption, is_held_out, sample_scene

TRAINING_SCENES = 8192
# shares of two-object scenes that the shipped models were shown; a share in between draws each scene as one of these does
TRAINING_TWO_OBJECTS = (0.15, 0.5)
FIRST_SEED = 1_000_000
ATTRIBUTES = ("colour", "shape", "motion", "size")


@dataclass(frozen=True)
class Sampling:
    """How to sample: denoising steps, guidance scale, first seed of the noise, clips in a batch, padded prompt length."""

    steps: int = 25
    guidance_scale: float = 3.0
    seed: int = 0
    batch: int = 8
    max_sequence_length: int = 512

    def __post_init__(self) -> None:
        if min(self.steps, self.batch, self.max_sequence_length) < 1 or self.guidance_scale < 0 or self.seed < 0:
            raise GenAttnError(f"steps, batch and length must be >= 1, guidance and seed >= 0, got {self}; correct it")


def evaluation_scenes(count: int, first_seed: int = FIRST_SEED) -> list[Scene]:
    """Scenes with captions that training never saw, unseen and seen combinations in turn; every seventh has two objects.

    Args:
        count: how many, >= 2.
        first_seed: where to begin; other seeds give other scenes.

    Raises:
        GenAttnError: for fewer than 2.
    """
    if count < 2:
        raise GenAttnError(f"count must be >= 2 to have both splits, got {count}; ask for more")
    trained = {
        caption(sample_scene(seed, two_objects=share)) for share in TRAINING_TWO_OBJECTS for seed in range(TRAINING_SCENES)
    }
    scenes: list[Scene] = []
    seed = first_seed
    while len(scenes) < count:
        pair = 1.0 if len(scenes) % 7 == 3 else 0.0
        scene = sample_scene(seed, held_out=len(scenes) % 2 == 0, two_objects=pair)
        seed += 1
        if caption(scene) not in trained:
            scenes.append(scene)
    return scenes


def is_unseen(scene: Scene) -> bool:
    """Whether a scene asks for a held-out combination."""
    return any(is_held_out(*thing.combination) for thing in scene.objects)


def generate_clips(
    pipeline: WanPipeline,
    scenes: Sequence[Scene],
    sampling: Sampling,
    size: GenerationDefaults,
) -> npt.NDArray[np.uint8]:
    """Sample a clip per scene with the stock pipeline: uint8 [N, T, H, W, 3].

    Args:
        pipeline: any `WanPipeline`.
        scenes: what to ask for; scene i starts from noise of seed `sampling.seed + i`.
        sampling: steps, guidance, seed, batch.
        size: frames, height and width.
    """
    clips = []
    for first in range(0, len(scenes), sampling.batch):
        prompts = [caption(scene) for scene in scenes[first : first + sampling.batch]]
        seeds = range(sampling.seed + first, sampling.seed + first + len(prompts))
        frames = pipeline(
            prompt=prompts,
            height=size.height,
            width=size.width,
            num_frames=size.frames,
            num_inference_steps=sampling.steps,
            guidance_scale=sampling.guidance_scale,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            output_type="np",
            max_sequence_length=sampling.max_sequence_length,
        ).frames
        clips.append(np.round(np.asarray(frames) * 255).astype(np.uint8))
    return np.concatenate(clips)


def score(clips: npt.NDArray[np.uint8], scenes: Sequence[Scene]) -> list[Verdict]:
    """The oracle's verdict on each clip."""
    return [judge(clip, scene) for clip, scene in zip(clips, scenes, strict=True)]


def wilson(right: int, total: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share.

    Raises:
        GenAttnError: unless 0 <= right <= total and total >= 1.
    """
    if not 0 <= right <= total or total < 1:
        raise GenAttnError(f"right must be in 0..total and total >= 1, got {right} of {total}; count again")
    z = 1.959964
    share, scale = right / total, 1 + z * z / total
    middle = (share + z * z / (2 * total)) / scale
    reach = z * np.sqrt(share * (1 - share) / total + z * z / (4 * total * total)) / scale
    return float(max(0.0, middle - reach)), float(min(1.0, middle + reach))


def summarize(verdicts: Sequence[Verdict], scenes: Sequence[Scene]) -> list[dict[str, float | int | str]]:
    """One row for all clips, one for the seen and one for the unseen combinations.

    Colour, shape, motion and size are shares of asked objects; background and count are shares of clips.
    """
    rows = []
    unseen = [is_unseen(scene) for scene in scenes]
    for split, keep in (("all", [True] * len(scenes)), ("seen", [not u for u in unseen]), ("unseen", unseen)):
        chosen = [verdict for verdict, kept in zip(verdicts, keep, strict=True) if kept]
        if chosen:
            rows.append({"split": split, **_summary(chosen)})
    return rows


def _summary(verdicts: Sequence[Verdict]) -> dict[str, float | int | str]:
    objects = [thing for verdict in verdicts for thing in verdict.objects]
    row: dict[str, float | int | str] = {"clips": len(verdicts), "objects": len(objects)}
    flags = {name: [bool(getattr(thing, name)) for thing in objects] for name in ATTRIBUTES}
    flags |= {name: [bool(getattr(verdict, name)) for verdict in verdicts] for name in ("background", "count")}
    for name, right in flags.items():
        low, high = wilson(sum(right), len(right))
        row |= {name: round(sum(right) / len(right), 4), f"{name}_low": round(low, 4), f"{name}_high": round(high, 4)}
    for name in ("consistency", "flicker", "motion_amount"):
        row[name] = round(float(np.mean([getattr(verdict, name) for verdict in verdicts])), 4)
    return row


def provenance(cpu: bool = False) -> dict[str, str]:
    """Device (the processor where `cpu`), versions, commit and date of a measurement."""
    on_gpu = torch.cuda.is_available() and not cpu
    device = torch.cuda.get_device_name() if on_gpu else f"CPU {_processor()}"
    versions = {name: importlib.metadata.version(name) for name in ("torch", "diffusers", "transformers")}
    return {"device": device, **versions, "commit": _commit(), "date": datetime.date.today().isoformat()}


def append_rows(path: Path, rows: Sequence[dict[str, float | int | str]]) -> None:
    """Append rows to a CSV file, writing its header where it is new.

    Raises:
        GenAttnError: if the file has other columns.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = list(rows[0])
    if path.exists():
        with path.open(newline="") as file:
            header = next(csv.reader(file), [])
        if header != columns:
            raise GenAttnError(f"the table must have the columns {columns}, got {header} in {path}; move it away")
    fresh = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, columns)
        if fresh:
            writer.writeheader()
        writer.writerows(rows)


def fingerprint(model: torch.nn.Module) -> str:
    """Sixteen hexadecimal digits that change with any weight of the model."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode() + value.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def keep_verdicts(
    path: Path, origin: dict[str, Any], scenes: Sequence[Scene], verdicts: Sequence[Verdict], seconds: float
) -> None:
    """Append a line per clip; `seconds` is the time that each of them took."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        for scene, verdict in zip(scenes, verdicts, strict=True):
            line = {"origin": origin, "caption": caption(scene), "seconds": round(seconds, 3), "verdict": asdict(verdict)}
            file.write(json.dumps(line) + "\n")


def kept_verdicts(path: Path, origin: dict[str, Any], scenes: Sequence[Scene]) -> tuple[list[Verdict], list[float]]:
    """The verdicts that a file holds of the first scenes, and the seconds that each clip took; none where there is no file.

    Args:
        path: what `keep_verdicts` wrote.
        origin: model and sampling; every line must be of the same.
        scenes: what is asked for, in order.

    Raises:
        GenAttnError: if a line is of another model, other sampling or another caption.
    """
    if not path.exists():
        return [], []
    lines = [json.loads(line) for line in path.read_text().splitlines()][: len(scenes)]
    for number, (line, scene) in enumerate(zip(lines, scenes, strict=False)):
        if line["origin"] != origin or line["caption"] != caption(scene):
            raise GenAttnError(
                f"kept verdicts must be of this model, sampling and captions, got {line['origin']} and {line['caption']!r} "
                f"in line {number + 1} of {path}; move it away"
            )
    return [_verdict(line["verdict"]) for line in lines], [float(line["seconds"]) for line in lines]


def _verdict(values: dict[str, Any]) -> Verdict:
    things = []
    for thing in values["objects"]:
        asked = TinyObject(**(thing["asked"] | {"offset": tuple(thing["asked"]["offset"])}))
        things.append(ObjectVerdict(**(thing | {"asked": asked, "read": Reading(**thing["read"])})))
    return Verdict(**(values | {"objects": tuple(things)}))


def evaluate(
    pipeline: WanPipeline,
    scenes: Sequence[Scene],
    sampling: Sampling,
    size: GenerationDefaults,
    keep: Path | None = None,
) -> list[dict[str, float | int | str]]:
    """Sample, judge and sum up: rows ready for the table.

    Args:
        pipeline: any `WanPipeline`.
        scenes: what to ask for; scene i starts from noise of seed `sampling.seed + i`.
        sampling: steps, guidance, seed, batch.
        size: frames, height and width.
        keep: file that takes each verdict as it comes; what it holds already is not sampled again.

    Raises:
        GenAttnError: if `keep` holds verdicts of another model or other settings.
    """
    origin: dict[str, Any] = {"sampling": asdict(sampling), "size": asdict(size)}
    verdicts: list[Verdict] = []
    seconds: list[float] = []
    if keep is not None:
        origin |= {"model": fingerprint(pipeline.transformer)}
        verdicts, seconds = kept_verdicts(keep, origin, scenes)
    with tqdm(total=len(scenes), initial=len(verdicts), desc="clips", mininterval=5.0) as bar:
        for first in range(len(verdicts), len(scenes), sampling.batch):
            asked, begun = scenes[first : first + sampling.batch], time.monotonic()
            clips = generate_clips(pipeline, asked, replace(sampling, seed=sampling.seed + first), size)
            seconds += [(time.monotonic() - begun) / len(asked)] * len(asked)
            verdicts += score(clips, asked)
            if keep is not None:
                keep_verdicts(keep, origin, asked, verdicts[first:], seconds[-1])
            bar.update(len(asked))
    settings = {"seed": sampling.seed, "steps": sampling.steps, "guidance_scale": sampling.guidance_scale}
    facts: dict[str, float | int | str] = {**provenance(pipeline.device.type == "cpu"), **settings}
    facts["seconds_per_clip"] = round(float(np.mean(seconds)), 2)
    return [facts | row for row in summarize(verdicts, scenes)]


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    count = torch.get_num_threads()
    return f"{names[0]}, {count} thread{'s' * (count > 1)}" if names else platform.machine()


def _commit() -> str:
    here = Path(__file__).resolve().parent
    answer = subprocess.run(["git", "-C", str(here), "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return answer.stdout.strip() or "unknown"
