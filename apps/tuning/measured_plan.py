"""`genattn plan --auto`: try candidate patterns on the given pipeline and write the settings that suit each layer and head.

planner's candidates -> one dense run, each candidate answered beside it -> per layer and head the cheapest that is good enough
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from genattn.apps.sampling.run import SamplingSettings, call_arguments, makes_video, open_pipeline
from genattn.errors import GenAttnError
from genattn.fingerprint import place_of
from genattn.functional.planned import tile_size
from genattn.patterns.as_json import pattern_to_dict, save_pattern
from genattn.patterns.pattern import Pattern
from genattn.patterns.radial import RadialPattern
from genattn.planning.planner import plan_settings
from genattn.planning.presets import preset
from genattn.profiling.measure import Measurement, measure_patterns, sparsest_above, with_and_without_tail

DENSITIES = (0.25, 0.4, 0.6)


@dataclass(frozen=True)
class MeasuredPlan:
    """The chosen pattern, the density it was chosen for, its PSNR (None unless asked for), and what was measured."""

    pattern: Pattern
    density: float
    psnr: float | None
    measurement: Measurement

    def facts(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "pattern": pattern_to_dict(self.pattern),
            "target_density": self.density,
            "psnr": self.psnr,
            **self.measurement.notes(),
        }


def measured_plan(
    settings: SamplingSettings,
    prompt: str,
    target_density: float = 0.25,
    min_psnr: float | None = None,
    seed: int = 0,
    out: Path | None = None,
) -> MeasuredPlan:
    """Measure on `settings.model` and choose per layer and head.

    Args:
        target_density: mean share of scores; used unless min_psnr is given.
        min_psnr: dB against the dense video; the sparsest settings that keep it are searched with whole runs.
        out: JSON file for `genattn generate --settings`.

    Raises:
        GenAttnError: a picture pipeline, or a density below what the candidates reach.
    """
    import torch

    if min_psnr is not None and not math.isfinite(min_psnr):
        raise GenAttnError(f"--min-psnr must be a number of dB, got {min_psnr}; 30 is near to dense")
    pipe = open_pipeline(settings)
    if not makes_video(pipe):
        raise GenAttnError(f"plan --auto needs a video pipeline, got {type(pipe).__name__}")
    call = call_arguments(pipe, settings)

    def frames() -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return pipe(**call, prompt=prompt, generator=generator, output_type="pt").frames

    found = measure_patterns(pipe, frames, candidates(str(pipe.config._name_or_path), call, place_of(pipe).partition(":")[0]))
    if min_psnr is None:
        plan = MeasuredPlan(found.choose(target_density=target_density), target_density, None, found)
    else:
        plan = MeasuredPlan(*sparsest_above(pipe, frames, found, min_psnr), found)
    if out is not None:
        save_pattern(plan.pattern, out, plan.facts())
    return plan


def candidates(model: str, call: dict[str, Any], device: str, most: int = 4) -> list[Pattern]:
    """The planner's fastest patterns at a few densities, for the tiles this sequence will run with, and two of Radial.

    Each without and with its tail, so that what is chosen has it where it helps.
    """
    size, frames = (call["height"], call["width"]), call["num_frames"]
    block = tile_size(preset(model).layout(size, frames).seqlen, device)
    found: list[Pattern] = [RadialPattern(), RadialPattern(decay=0.2, floor=0)]
    for density in DENSITIES:
        found += [s.pattern for s in plan_settings(model, size, frames, density, block=block).settings[:most]]
    return with_and_without_tail(found)
