"""Plugins and their settings as a versioned JSON file, beside a model or on the hub.

    PluginConfig.of(RadialPattern(), schedule=Schedule(dense_steps=0.3)).save_pretrained("folder")
    handle = apply(pipe, *PluginConfig.from_pretrained("folder").plugins())

Names and settings only: what a file may name stands in a fixed table, and nothing in it is executed.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib import import_module
from os import PathLike
from typing import Any

from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.utils import PushToHubMixin

from genattn.errors import GenAttnError
from genattn.patterns.pattern import Pattern
from genattn.patterns.pattern_json import pattern_from_dict, pattern_to_dict
from genattn.plugin import Plugin
from genattn.schedule import Schedule
from genattn.sparse_plugin import SparsePlugin

FORMAT_VERSION = 1
# resolved when a file names them, so that reading a pattern needs no guidance
_MODULES = {"SoftPAG": "genattn.guidance.softpag", "BroadWay": "genattn.guidance.broadway"}
_FIELDS = frozenset({"format_version", "plugins"})


class PluginConfig(ConfigMixin, PushToHubMixin):  # type: ignore[misc]
    """The settings of a list of plugins, in diffusers' own way: save_pretrained, from_pretrained, push_to_hub."""

    config_name = "genattn_config.json"

    @register_to_config
    def __init__(self, plugins: Sequence[Mapping[str, Any]] = (), format_version: int = FORMAT_VERSION) -> None:
        if format_version != FORMAT_VERSION:
            raise GenAttnError(
                f"format_version must be {FORMAT_VERSION}, got {format_version!r}; "
                "the file was written by another version of genattn"
            )
        self._made = [_plugin(settings) for settings in plugins]

    @classmethod
    def of(cls, *plugins: Plugin | Pattern, schedule: Schedule | None = None, impl: str = "auto") -> "PluginConfig":
        """The settings of these plugins; a Pattern goes with `schedule` and `impl`, as in `apply`."""
        ready = [SparsePlugin(p, schedule, impl) if isinstance(p, Pattern) else p for p in plugins]
        return cls(plugins=[_settings(plugin) for plugin in ready])

    def plugins(self) -> list[Plugin]:
        """Fresh plugins with these settings, for `apply`."""
        return [_plugin(settings) for settings in self.config.plugins]

    def save_pretrained(self, save_directory: str | PathLike[str], push_to_hub: bool = False, **kwargs: Any) -> None:
        """Write genattn_config.json into the folder; with push_to_hub=True also to the hub."""
        self.save_config(str(save_directory), push_to_hub=push_to_hub, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | PathLike[str], **kwargs: Any) -> "PluginConfig":
        """Read it from a folder or from the hub. Raises GenAttnError for another version or an unknown field."""
        settings = cls.load_config(pretrained_model_name_or_path, **kwargs)
        return cls.from_dict({k: v for k, v in settings.items() if not k.startswith("_")})

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> "PluginConfig":
        """From the content of the file."""
        version = settings.get("format_version")
        unknown = sorted(set(settings) - _FIELDS)
        if version == FORMAT_VERSION and unknown:
            raise GenAttnError(f"unknown fields {unknown}; version {FORMAT_VERSION} has {', '.join(sorted(_FIELDS))}")
        return cls(plugins=settings.get("plugins", ()), format_version=version)  # type: ignore[arg-type]


def _settings(plugin: Plugin) -> dict[str, Any]:
    name = type(plugin).__name__
    if isinstance(plugin, SparsePlugin):
        schedule = json.loads(json.dumps(asdict(plugin.schedule)))
        return {"type": name, "pattern": pattern_to_dict(plugin.pattern), "schedule": schedule, "impl": plugin.impl}
    if name not in _MODULES or not hasattr(plugin, "to_config"):
        raise GenAttnError(f"{name} cannot be saved; plugins with a saved form are SparsePlugin, {', '.join(_MODULES)}")
    return {"type": name, **plugin.to_config()}


def _plugin(settings: Mapping[str, Any]) -> Plugin:
    given = dict(settings)
    name = given.pop("type", None)
    if name == "SparsePlugin":
        return _sparse(given)
    if name not in _MODULES:
        raise GenAttnError(f"a plugin's type must be SparsePlugin, {' or '.join(_MODULES)}, got {name!r}")
    cls = getattr(import_module(_MODULES[name]), name)
    try:
        plugin: Plugin = cls(**given)
    except TypeError as error:
        raise GenAttnError(f"settings of {name}: {error}") from None
    return plugin


def _sparse(given: dict[str, Any]) -> SparsePlugin:
    unknown = sorted(set(given) - {"pattern", "schedule", "impl"})
    if unknown or "pattern" not in given:
        raise GenAttnError(f"a SparsePlugin has pattern, schedule and impl, got {sorted(given)}")
    schedule = dict(given.get("schedule") or {})
    strange = sorted(set(schedule) - Schedule.names())
    if strange:
        raise GenAttnError(f"unknown settings {strange}; a schedule has {', '.join(sorted(Schedule.names()))}")
    return SparsePlugin(pattern_from_dict(given["pattern"]), Schedule(**schedule), given.get("impl", "auto"))
