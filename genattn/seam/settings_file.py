"""Settings in one JSON file: what `genattn tune` writes and every way in reads.

    genattn.apply(pipe, "settings:out/tuned/settings.json")
    genattn generate --settings out/tuned/settings.json --prompt "a cat"

    {"format_version": 1, "plugins": [{"type": "SparsePlugin", "pattern": {...}, "schedule": {...}}], "_notes": {...}}

`PluginConfig` (seam/plugin_config.py) reads and writes the same beside a model or on the hub. A pattern file
(`save_pattern`, `genattn plan --out`) is read too. A map that is named without a folder lies beside the file, so that both
can be moved together.
Names and settings only: what a file may name stands in a fixed table, and nothing in it is executed.
"""

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

from genattn.errors import GenAttnError
from genattn.patterns.as_json import pattern_from_dict
from genattn.reading import read_json, whole
from genattn.seam.plugin import Plugin
from genattn.seam.schedule import Schedule
from genattn.seam.sparse_plugin import SparsePlugin
from genattn.whole_file import write_whole

PREFIX = "settings:"
FORMAT_VERSION = 1
_FIELDS = ("format_version", "plugins")
# resolved when a file names them, so that reading a pattern needs no guidance
MODULES = {
    "SparsePlugin": "genattn.seam.sparse_plugin",
    "SoftPAG": "genattn.guidance.softpag.softpag",
    "NAG": "genattn.guidance.nag.nag",
    "S2Guidance": "genattn.guidance.s2.s2_guidance",
    "TAG": "genattn.guidance.tag.tag",
    "BroadWay": "genattn.guidance.broadway.broadway",
    "EnhanceAVideo": "genattn.guidance.broadway.enhance_a_video",
}


def load_plugins(path: str | Path) -> list[Plugin]:
    """Fresh plugins with the settings in the file.

    Raises GenAttnError for a file that is missing or is something else, that names an unknown plugin or setting, or whose map
    is not there.
    """
    content = read_json(path, "a settings file")
    if not isinstance(content, dict) or not {"plugins", "pattern"} & set(content):
        raise GenAttnError(
            'a settings file must hold {"format_version": 1, "plugins": [...]} or a pattern, as `genattn tune` and '
            f"`genattn plan --out` write them; got {path}"
        )
    folder = Path(path).resolve().parent
    content = _with_maps(content, lambda given: str(folder / given) if (folder / given).is_file() else given)
    if "plugins" not in content:
        return [SparsePlugin(pattern_from_dict(content["pattern"] or {}))]
    check_version(content.get("format_version"), [name for name in content if not name.startswith("_")])
    listed = content["plugins"]
    if not isinstance(listed, list) or not listed:
        raise GenAttnError(f"plugins in a settings file must be a list of at least one, got {listed!r} in {path}")
    return [plugin_from_dict(settings) for settings in listed]


def load_sparse(path: str | Path) -> SparsePlugin:
    """The one pattern with its schedule in the file, for ways in that have options of their own for all else.

    Raises GenAttnError as `load_plugins` does, and when the file holds anything but one pattern.
    """
    found = load_plugins(path)
    if len(found) != 1 or not isinstance(found[0], SparsePlugin):
        names = ", ".join(type(plugin).__name__ for plugin in found)
        raise GenAttnError(
            f"a settings file must hold one pattern here, and {path} holds {names}; "
            'genattn.apply(pipe, "settings:PATH") takes all of them'
        )
    return found[0]


def loaded_for(
    path: str | Path, schedule: Schedule | None = None, settings: Mapping[str, Any] | None = None, impl: str = "auto"
) -> list[Plugin]:
    """The plugins in the file as `apply` takes them: what is given beside the file wins over what stands in it."""
    found = load_plugins(path)
    for plugin in found:
        if isinstance(plugin, SparsePlugin):
            plugin.schedule = schedule or replace(plugin.schedule, **dict(settings or {}))
            plugin.impl = plugin.impl if impl == "auto" else impl
            plugin.origin = f"{PREFIX}{path}"
    return found


def save_settings(path: str | Path, plugins: Sequence[Plugin], notes: Mapping[str, Any] | None = None) -> None:
    """Write the settings of `plugins` as JSON, whole or not at all; a map in the same folder is named without it.

    notes: where they come from, JSON-ready.

    Raises GenAttnError for a plugin or pattern that has no saved form.
    """
    target = Path(path)
    content = {
        "format_version": FORMAT_VERSION,
        "plugins": _with_maps(
            [plugin_to_dict(plugin) for plugin in plugins], lambda path: _bare(path, target.resolve().parent)
        ),
        "_notes": dict(notes or {}),
    }
    write_whole(target, json.dumps(content, indent=1) + "\n")


def check_version(version: Any, names: Sequence[str] | Mapping[str, Any] = ()) -> None:
    """Raise GenAttnError for another version of the format, or for a field that this one does not have."""
    if version != FORMAT_VERSION:
        raise GenAttnError(
            f"format_version must be {FORMAT_VERSION}, got {version!r}; the file was written by another version of genattn"
        )
    unknown = sorted(set(names) - set(_FIELDS))
    if unknown:
        raise GenAttnError(f"unknown fields {unknown}; version {FORMAT_VERSION} has {', '.join(_FIELDS)}")


def plugin_to_dict(plugin: Plugin) -> dict[str, Any]:
    """Type and settings, JSON-ready. Raises GenAttnError for a plugin that has no saved form."""
    name = type(plugin).__name__
    if name not in MODULES or _class(name) is not type(plugin):
        raise GenAttnError(f"{name} cannot be saved; plugins with a saved form are {', '.join(MODULES)}")
    return {"type": name, **plugin.settings()}


def plugin_from_dict(settings: Mapping[str, Any]) -> Plugin:
    """The plugin that `plugin_to_dict` described. Raises GenAttnError for unknown types and settings."""
    if not isinstance(settings, Mapping):
        raise GenAttnError(f"a plugin must be an object with a type and settings, got {settings!r}")
    given = dict(settings)
    name = given.pop("type", None)
    if not isinstance(name, str) or name not in MODULES:
        raise GenAttnError(f"a plugin's type must be one of {', '.join(MODULES)}, got {name!r}")
    cls = _class(name)
    known = list(inspect.signature(cls).parameters)
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise GenAttnError(f"unknown settings {unknown}; a {name} has {', '.join(known)}")
    with whole(f"the settings of {name}"):
        return cls.from_settings(given)


def _class(name: str) -> type[Plugin]:
    found: type[Plugin] = getattr(import_module(MODULES[name]), name)
    return found


def _with_maps(value: Any, change: Callable[[str], str]) -> Any:
    """`value` with the path of every map in it changed."""
    if isinstance(value, list):
        return [_with_maps(part, change) for part in value]
    if not isinstance(value, dict):
        return value
    found = {name: _with_maps(part, change) for name, part in value.items()}
    if found.get("type") == "ProfiledPattern" and isinstance(found.get("path"), str):
        found["path"] = change(found["path"])
    return found


def _bare(path: str, folder: Path) -> str:
    return Path(path).name if Path(path).resolve().parent == folder else path
