"""What `genattn generate` takes where no model is named, and `profile`: the shipped model on which sparsity pays, its map."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from genattn.apps.sampling.load_pipeline import shipped_model
from genattn.apps.sampling.run import AttentionSettings, SamplingSettings
from genattn.errors import GenAttnError
from genattn.patterns.profiled import ProfiledPattern

FIRST_MODEL = "tiny-wan-long-bound"
DENSITY = 0.4  # as near to dense as 30 dB, and the oracle finds hardly less (docs/adaptive.md)


def first_model(settings: SamplingSettings) -> SamplingSettings:
    """The settings with the model filled in; unchanged where one is named, or where this one is not shipped."""
    if settings.model is not None:
        return settings
    try:
        return replace(settings, model=str(shipped_model(FIRST_MODEL)))
    except GenAttnError:  # an installation without it has tiny-wan
        return settings


def first_run(settings: SamplingSettings, attention: AttentionSettings) -> tuple[SamplingSettings, AttentionSettings]:
    """The settings with what was left out filled in; unchanged where a model is named, or where none is shipped.

    Args:
        settings: its model is None where the user named none.
        attention: `given` says which of its parts the user named; they stay.
    """
    found = first_model(settings)
    if settings.model is not None or found.model is None:
        return settings, attention
    settings, folder = found, Path(found.model)
    profile = folder.parent / "maps" / f"{FIRST_MODEL}.safetensors"
    if "attention" in attention.given or not profile.is_file():
        return settings, attention
    sparse: dict[str, Any] = {name: 0 for name in ("dense_steps", "dense_layers") if name not in attention.given}
    pattern = ProfiledPattern(str(profile), density=DENSITY, tail="mean2")
    return settings, replace(attention, name="profiled", pattern=pattern, **sparse)
