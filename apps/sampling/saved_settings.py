"""A settings file (genattn/seam/settings_file.py) as the attention of a sampling run."""

from dataclasses import fields
from pathlib import Path
from typing import Any

from genattn.apps.sampling.run import AttentionSettings
from genattn.errors import GenAttnError
from genattn.seam.schedule import Schedule
from genattn.seam.settings_file import load_sparse


def attention_from_file(path: Path, dense_steps: float | None = None, dense_layers: int | None = None) -> AttentionSettings:
    """The pattern in the file, with what the file says stays dense; named values win over the file's.

    Raises GenAttnError for a file that is missing or holds something else, or that names a backend of its own.
    """
    if not path.is_file():
        raise GenAttnError(f"--settings must name a file, but there is no {str(path)!r}")
    plugin = load_sparse(path)
    if plugin.impl != "auto":
        raise GenAttnError(f"{path} names the backend {plugin.impl!r}, and a command takes the best there is; remove it there")
    stays = {each.name: getattr(plugin.schedule, each.name) for each in fields(Schedule)}
    own = {"dense_steps": dense_steps, "dense_layers": dense_layers}
    given: dict[str, Any] = {name: value for name, value in own.items() if value is not None}
    steps = given.get("dense_steps", stays.pop("dense_steps"))
    layers = given.get("dense_layers", stays.pop("dense_layers"))
    if not isinstance(layers, int):  # block numbers
        stays["dense_layers"], layers = layers, 0
    changed = {name: value for name, value in stays.items() if name not in given and value != getattr(Schedule(), name)}
    return AttentionSettings(path.stem, plugin.pattern, steps, layers, more=tuple(changed.items()))
