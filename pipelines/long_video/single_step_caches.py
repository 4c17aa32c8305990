"""Caches that skip blocks by the timestep assume one timestep per call; in a queue that is never so, and they are put aside
for the run."""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from genattn.seam.report import GenAttnWarning


@contextmanager
def single_step_caches_off(models: Mapping[str, Any], tell: bool = True) -> Iterator[list[str]]:
    """Switch off diffusers' block caches of these models, tell so, and switch them on again afterwards.

    Gives the names of what was switched off.
    """
    found = {name: model._cache_config for name, model in models.items() if getattr(model, "is_cache_enabled", False)}
    named = [f"{type(config).__name__} of {name}" for name, config in found.items()]
    if named and tell:
        warnings.warn(
            f"{', '.join(named)} assumes one timestep per call and is switched off while endless video runs",
            GenAttnWarning,
            stacklevel=3,
        )
    try:
        for name in found:
            models[name].disable_cache()
        yield named
    finally:
        for name, config in found.items():
            models[name].enable_cache(config)
