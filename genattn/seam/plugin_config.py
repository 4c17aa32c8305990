"""Plugins and their settings as a versioned JSON file, beside a model or on the hub.

    PluginConfig.of(RadialPattern(), SoftPAG("L2H1"), schedule=Schedule(dense_steps=0.3)).save_pretrained("folder")
    handle = apply(pipe, *PluginConfig.from_pretrained("folder").plugins())

Names and settings only: what a file may name stands in a fixed table, and nothing in it is executed.
"""

import inspect
from collections.abc import Mapping, Sequence
from importlib import import_module
from os import PathLike
from typing import Any

from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.utils import PushToHubMixin

from genattn.errors import GenAttnError
from genattn.patterns.pattern import Pattern
from genattn.reading import whole
from genattn.seam.plugin import Plugin
from genattn.seam.schedule import Schedule
from genattn.seam.sparse_plugin import SparsePlugin

FORMAT_VERSION = 1
# resolved when a file names them, so that reading a pattern needs no guidance
_MODULES = {
    "SparsePlugin": "genattn.seam.sparse_plugin",
    "SoftPAG": "genattn.guidance.softpag.softpag",
    "NAG": "genattn.guidance.nag.nag",
    "S2Guidance": "genattn.guidance.s2.s2_guidance",
    "TAG": "genattn.guidance.tag.tag",
    "BroadWay": "genattn.guidance.broadway.broadway",
    "EnhanceAVideo": "genattn.guidance.broadway.enhance_a_video",
}
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
        if not isinstance(plugins, Sequence) or isinstance(plugins, str):
            raise GenAttnError(f"plugins must be a list of settings, got {plugins!r}")
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
    if name not in _MODULES or _class(name) is not type(plugin):
        raise GenAttnError(f"{name} cannot be saved; plugins with a saved form are {', '.join(_MODULES)}")
    return {"type": name, **plugin.settings()}


def _plugin(settings: Mapping[str, Any]) -> Plugin:
    if not isinstance(settings, Mapping):
        raise GenAttnError(f"a plugin must be an object with a type and settings, got {settings!r}")
    given = dict(settings)
    name = given.pop("type", None)
    if not isinstance(name, str) or name not in _MODULES:
        raise GenAttnError(f"a plugin's type must be one of {', '.join(_MODULES)}, got {name!r}")
    cls = _class(name)
    known = list(inspect.signature(cls).parameters)
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise GenAttnError(f"unknown settings {unknown}; a {name} has {', '.join(known)}")
    with whole(f"the settings of {name}"):
        return cls.from_settings(given)


def _class(name: str) -> type[Plugin]:
    found: type[Plugin] = getattr(import_module(_MODULES[name]), name)
    return found
