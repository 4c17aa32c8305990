"""What `genattn generate` takes where no model is named: the shipped model on which sparse attention pays, and its map."""

from dataclasses import replace
from typing import Any

from genattn.apps.sampling.load_pipeline import shipped_model
from genattn.apps.sampling.run import AttentionSettings, SamplingSettings
from genattn.errors import GenAttnError
from genattn.patterns.profiled import ProfiledPattern

FIRST_MODEL = "tiny-wan-long"
DENSITY = 0.4  # as near to dense as 30 dB, and the oracle finds no less (docs/adaptive.md)


def first_run(settings: SamplingSettings, attention: AttentionSettings) -> tuple[SamplingSettings, AttentionSettings]:
    """The settings with what was left out filled in; unchanged where a model is named, or where none is shipped.

    Args:
        settings: its model is None where the user named none.
        attention: `given` says which of its parts the user named; they stay.
    """
    if settings.model is not None:
        return settings, attention
    try:
        folder = shipped_model(FIRST_MODEL)
    except GenAttnError:  # an installation without it has tiny-wan
        return settings, attention
    settings = replace(settings, model=str(folder))
    profile = folder.parent / "maps" / f"{FIRST_MODEL}.safetensors"
    if "attention" in attention.given or not profile.is_file():
        return settings, attention
    sparse: dict[str, Any] = {name: 0 for name in ("dense_steps", "dense_layers") if name not in attention.given}
    pattern = ProfiledPattern(str(profile), density=DENSITY, tail="mean2")
    return settings, replace(attention, name="profiled", pattern=pattern, **sparse)
