"""Profile a model once: what each layer and head looks at, from a few prompts, as a map that runs without choosing.

    found = profile(pipe, lambda prompt: pipe(prompt, num_inference_steps=12), prompts, 0.3, "map.safetensors")
    genattn.apply(pipe, ProfiledPattern("map.safetensors"))

The pipeline runs dense. In every step a few queries of each cell are answered exactly and what they give to each cell is added
up by relative place (selection/relative_map.py): memory does not grow with prompts or steps, and no S x S tensor is made. Then
the first two prompts run once more, and the error that the map would make is measured per head at several shares, so that a
density can be spread where it helps most. After each prompt of the first look the sums go to `out` + ".part.safetensors", from
which a run that was interrupted goes on.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from genattn.errors import GenAttnError
from genattn.fingerprint import pipeline_fingerprint, place_of, precision
from genattn.one_writer import only_writer
from genattn.profiling.recorder import Recorder
from genattn.seam.handle import apply
from genattn.selection.profile_map import ProfileMap, write_map

LEAST_PROMPTS = CHECKS = 2
BANDS, SAMPLES = (1 / 3, 2 / 3, 1.0), 8


@dataclass(frozen=True)
class Profile:
    """A finished profile: the map, and the file it was written to."""

    map: ProfileMap
    path: Path

    def rows(self, tail: bool = True) -> list[dict[str, Any]]:
        """Per layer: density, expected relative error of its output, and the head that adds most to it.

        tail: whether skipped cells are stood in for.
        """
        value = "loss" if tail else "mass"
        shares = self.map.spread(value, self.map.header.target_density)
        errors = self.map.expected_error(value, self.map.header.target_density).mean(-1)
        return [
            {
                "layer": layer,
                "density": float(shares[layer].mean()),
                "sparsest head": float(shares[layer].mean(-1).min()),
                "densest head": float(shares[layer].mean(-1).max()),
                "error": float(errors[layer].sum().sqrt()),
                "worst head": int(errors[layer].argmax()),
                "its error": float(errors[layer].max().sqrt()),
            }
            for layer in range(shares.shape[0])
        ]

    @property
    def density(self) -> float:
        """Share of the grid's scores that the map visits, mean over layers, heads and parts of the run."""
        return float(self.map.spread("loss", self.map.header.target_density).mean())


def unfinished(out: str | Path) -> Path:
    """Where the sums of a profile stand until the map `out` is there."""
    return Path(f"{out}.part.safetensors")


def profile(
    target: Any,
    run: Callable[[str], Any],
    prompts: Sequence[str],
    target_density: float = 0.3,
    out: str | Path = "map.safetensors",
    bands: Sequence[float] = BANDS,
    samples: int = SAMPLES,
    progress: Callable[[int, int], None] = lambda done, total: None,
    settings: Mapping[str, Any] | None = None,
    written: Callable[[Profile], None] = lambda found: None,
) -> Profile:
    """Run the pipeline or model `target` dense on each prompt and write the map.

    run: samples once with a prompt, the same way every time. prompts: at least 2. target_density: share of the grid's scores in
    (0, 1] that the map visits. bands: ends of the parts of the run that get maps of their own, rising in (0, 1], the last 1.
    samples: queries per cell that are answered exactly. progress: called with (runs done, runs in all).
    settings: what else `run` depends on, JSON-ready (steps, sizes, seed): an interrupted profile of others is refused.
    written: called when the map is there; should that be stopped, the same call has no prompt to run but the checks.

    Raises GenAttnError, before anything runs, for arguments out of range and an `out` that another run writes, and while
    running for activations that are not finite, for a layout that changes between prompts, and for a model whose token grid is
    not known.
    """
    texts = list(prompts)
    if len(texts) < LEAST_PROMPTS or len(set(texts)) < LEAST_PROMPTS:
        raise GenAttnError(
            f"a profile needs at least {LEAST_PROMPTS} different prompts, got {len(set(texts))}: a map of one prompt is that "
            "prompt's, not the model's; give more"
        )
    if not 0 < target_density <= 1:
        raise GenAttnError(f"target_density must be in (0, 1], got {target_density}; 0.3 is a usual start")
    ends = tuple(float(b) for b in bands)
    if not ends or list(ends) != sorted(set(ends)) or ends[0] <= 0 or ends[-1] != 1.0:
        raise GenAttnError(f"bands must rise within (0, 1] and end at 1, got {ends}; e.g. (0.333, 0.667, 1.0)")
    if isinstance(samples, bool) or samples < 1:
        raise GenAttnError(f"samples must be a number of queries per cell >= 1, got {samples!r}")
    if Path(out).suffix != ".safetensors":
        raise GenAttnError(f"out must end in .safetensors, got {str(out)!r}")
    recorder = Recorder(ends, samples)
    part = unfinished(out)
    with only_writer(out, "file"), apply(target, recorder):
        about = {"prompts": texts, "bands": list(ends), "samples": samples, "model": recorder.model, "heads": recorder.heads}
        about["weights"], about["precision"] = pipeline_fingerprint(target), precision(target)
        about["device"] = place_of(target).partition(":")[0]
        about["settings"] = json.loads(json.dumps(dict(settings or {})))
        done = recorder.load(part, about)
        total = len(texts) + CHECKS
        progress(done, total)
        for number, text in enumerate(texts[done:], done + 1):
            run(text)
            recorder.check_seen()
            recorder.save(part, about, number)
            progress(number, total)
        recorder.fit()
        for number, text in enumerate(texts[:CHECKS], len(texts) + 1):
            run(text)
            progress(number, total)
        made = recorder.map(target_density, len(texts))
        found = Profile(made, write_map(made, out))
        written(found)
        part.unlink(missing_ok=True)
        return found
