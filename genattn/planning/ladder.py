"""The names that users write instead of a pattern: "radial", "gna", "adaptive", "sol", "profile:PATH", "auto" and so on.

    apply(pipe, "radial")         the model's own Radial preset
    apply(pipe, "gna")            windows of whole tiles, made for the size that comes
    apply(pipe, "adaptive")       clusters of like tokens, chosen in every call, means standing in for the rest
    apply(pipe, "sol")            a published rule of choice, as "sparge" and "svg2" are (patterns/published.py)
    apply(pipe, "profile:PATH")   a map written by `genattn profile`; the path alone will do where it ends in .safetensors
    apply(pipe, "settings:PATH")  whatever a file of `genattn tune` holds (seam/settings_file.py)
    apply(pipe, "auto")           the model's preset, and dense where a sparse call would not be faster

Each gives a pattern, a schedule and a line that says which preset it is and why.
"""

import difflib
from dataclasses import dataclass, field
from typing import Any

from genattn.errors import GenAttnError
from genattn.patterns.adaptive import AdaptivePattern
from genattn.patterns.pattern import Pattern
from genattn.patterns.profiled import ProfiledPattern
from genattn.patterns.published import PUBLISHED, published
from genattn.patterns.radial import RadialPattern
from genattn.planning.break_even import break_even
from genattn.planning.fitted import FittedNeighborhood
from genattn.planning.model_preset import ModelPreset
from genattn.planning.recognise import recognise
from genattn.selection.estimate import PooledScore
from genattn.selection.rules import TopK
from genattn.selection.tiling import Clusters

PROFILE, MAP_ENDING = "profile:", ".safetensors"
LADDER = ("radial", "gna", "adaptive", *PUBLISHED, f"{PROFILE}PATH", "settings:PATH", "auto")
GNA_DENSITY, ADAPTIVE_DENSITY = 0.4, 0.3
# the least error and the highest PSNR of all choices at a like share, see docs/adaptive.md
ADAPTIVE = AdaptivePattern(TopK(0.2), PooledScore(0), Clusters(), tail="mean2")


@dataclass(frozen=True)
class Model:
    """What is known of a denoiser before it runs. components: names in its pipeline; device: a torch device type."""

    name: str
    heads: int
    layers: int
    head_dim: int = 128
    components: tuple[str, ...] = ()
    device: str = "cpu"
    backend: str = "cpu"


@dataclass(frozen=True)
class Rung:
    """pattern: what the name stands for. schedule: settings that come with it. why: for the report. known: whether the model
    has a preset.
    """

    pattern: Pattern
    schedule: dict[str, Any] = field(default_factory=dict)
    why: str = ""
    known: bool = True


def rung(name: str, model: Model) -> Rung:
    """What `name` means for `model`. Raises GenAttnError for an unknown name, or a map that cannot be used."""
    if name.startswith(PROFILE) or name.endswith(MAP_ENDING):
        path = name.removeprefix(PROFILE)
        pattern = ProfiledPattern(path)
        made = pattern.map.header
        return Rung(pattern, {}, f"map {path}: {made.prompts} prompts, {made.target_density:.0%} of the scores")
    if name in PUBLISHED:
        return Rung(published(name), {}, f"{name}: the published rule with its own settings; no preset of the model is used")
    # "neighborhood" is what the command line calls "gna"
    makers = {"radial": _radial, "gna": _gna, "neighborhood": _gna, "adaptive": _adaptive, "auto": _auto}
    if name not in makers:
        near = difflib.get_close_matches(name, [*makers, *PUBLISHED], n=1)
        guess = f"; did you mean {near[0]!r}?" if near else ""
        raise GenAttnError(f"a pattern's name must be one of {', '.join(LADDER)}, got {name!r}{guess}")
    return makers[name](model, recognise(model.name, model.heads, model.layers, model.components))


def _unknown(model: Model, instead: str) -> str:
    return f"no preset is known for {model.name} with {model.layers} layers of {model.heads} heads; {instead}"


def _radial(model: Model, preset: ModelPreset | None) -> Rung:
    if preset is None or not preset.radial:
        return Rung(RadialPattern(), {}, _unknown(model, "Radial's defaults are used"), False)
    best = preset.radial[0]
    schedule = {"dense_steps": best.dense_steps, "dense_layers": best.dense_layers}
    return Rung(best.pattern, schedule, f"radial preset of {preset.name} ({best.source})")


def _gna(model: Model, preset: ModelPreset | None) -> Rung:
    made = f"windows of whole tiles near {GNA_DENSITY:.0%} of the scores, made for each size"
    if preset is None or not preset.neighborhood:
        why = _unknown(model, made) if preset is None else f"no published window for {preset.name}; {made}"
        return Rung(FittedNeighborhood(GNA_DENSITY), {}, why, preset is not None)
    window, source = preset.neighborhood[0]
    grid = preset.grid(preset.size, preset.frames)
    known = ((grid, window),)
    return Rung(FittedNeighborhood(GNA_DENSITY, known), {}, f"gna preset of {preset.name}: {source}; at other sizes {made}")


def _adaptive(model: Model, preset: ModelPreset | None) -> Rung:
    schedule: dict[str, Any] = {}
    if preset is not None and preset.radial:
        schedule = {"dense_steps": preset.radial[0].dense_steps, "dense_layers": preset.radial[0].dense_layers}
    why = "a fifth of the clusters, means standing in for the rest: measured best of all choices, on the tiny models"
    return Rung(ADAPTIVE, schedule, why if preset is not None else _unknown(model, why), preset is not None)


def _auto(model: Model, preset: ModelPreset | None) -> Rung:
    """Radial where a script of it was published for the model, else by content; dense below the break-even length."""
    if preset is not None and preset.radial:
        found, density = _radial(model, preset), 0.5
    else:
        found, density = _adaptive(model, preset), ADAPTIVE_DENSITY
    chooses = found.pattern.needs_tensors
    least = break_even(model.device, model.backend, density, model.heads, model.head_dim, chooses)
    why = f"{found.why}; sparse from {least.tokens} tokens on ({least.source})"
    return Rung(found.pattern, found.schedule | {"min_tokens": least.tokens}, why, found.known)
