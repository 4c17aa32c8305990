"""Plugins and their settings as a versioned JSON file, beside a model or on the hub.

    PluginConfig.of(RadialPattern(), SoftPAG("L2H1"), schedule=Schedule(dense_steps=0.3)).save_pretrained("folder")
    handle = apply(pipe, *PluginConfig.from_pretrained("folder").plugins())

Names and settings only: what a file may name stands in a fixed table, and nothing in it is executed.
"""

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any

from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.utils import PushToHubMixin

from genattn.errors import GenAttnError, first_line
from genattn.patterns.pattern import Pattern
from genattn.seam.plugin import Plugin
from genattn.seam.schedule import Schedule
from genattn.seam.settings_file import FORMAT_VERSION, check_version, plugin_from_dict, plugin_to_dict
from genattn.seam.sparse_plugin import SparsePlugin


class PluginConfig(ConfigMixin, PushToHubMixin):  # type: ignore[misc]
    """The settings of a list of plugins, in diffusers' own way: save_pretrained, from_pretrained, push_to_hub."""

    config_name = "genattn_config.json"

    @register_to_config
    def __init__(self, plugins: Sequence[Mapping[str, Any]] = (), format_version: int = FORMAT_VERSION) -> None:
        check_version(format_version)
        if not isinstance(plugins, Sequence) or isinstance(plugins, str):
            raise GenAttnError(f"plugins must be a list of settings, got {plugins!r}")
        self._made = [plugin_from_dict(settings) for settings in plugins]

    @classmethod
    def of(cls, *plugins: Plugin | Pattern, schedule: Schedule | None = None, impl: str = "auto") -> "PluginConfig":
        """The settings of these plugins; a Pattern goes with `schedule` and `impl`, as in `apply`."""
        ready = [SparsePlugin(p, schedule, impl) if isinstance(p, Pattern) else p for p in plugins]
        return cls(plugins=[plugin_to_dict(plugin) for plugin in ready])

    def plugins(self) -> list[Plugin]:
        """Fresh plugins with these settings, for `apply`."""
        return [plugin_from_dict(settings) for settings in self.config.plugins]

    def save_pretrained(self, save_directory: str | PathLike[str], push_to_hub: bool = False, **kwargs: Any) -> None:
        """Write genattn_config.json into the folder; with push_to_hub=True also to the hub."""
        self.save_config(str(save_directory), push_to_hub=push_to_hub, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | PathLike[str], **kwargs: Any) -> "PluginConfig":
        """Read it from a folder or from the hub.

        Raises GenAttnError for what cannot be read, another version or an unknown field.
        """
        try:
            settings = cls.load_config(pretrained_model_name_or_path, **kwargs)
        except (OSError, ValueError, RecursionError) as error:
            told = f"{pretrained_model_name_or_path} must hold a readable {cls.config_name}"
            raise GenAttnError(f"{told}, got {first_line(error)}; check the path, or save it again") from error
        if not isinstance(settings, Mapping):
            raise GenAttnError(f"{cls.config_name} must hold an object, got {type(settings).__name__}; save it again")
        return cls.from_dict({k: v for k, v in settings.items() if not k.startswith("_")})

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> "PluginConfig":
        """From the content of the file."""
        check_version(settings.get("format_version"), settings)
        return cls(plugins=settings.get("plugins", ()), format_version=FORMAT_VERSION)
