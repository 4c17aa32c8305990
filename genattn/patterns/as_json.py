"""Patterns as JSON and back: names and settings only, nothing is executed.

{"type": "PerLayer", "patterns": [{"type": "DensePattern"}, {"type": "RadialPattern", "decay": 0.2}], "choice": [0, 1, 1]}
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from genattn.errors import GenAttnError
from genattn.patterns.adaptive import AdaptivePattern
from genattn.patterns.block_topk import BlockTopK
from genattn.patterns.combine import Intersection, PerHead, PerLayer, Union
from genattn.patterns.dense import DensePattern
from genattn.patterns.global_tokens import GlobalTokens
from genattn.patterns.logit_decayed import LogitDecayed
from genattn.patterns.neighborhood import NeighborhoodPattern
from genattn.patterns.pattern import Pattern
from genattn.patterns.profiled import ProfiledPattern
from genattn.patterns.radial import RadialPattern
from genattn.patterns.rotating_anchors import RotatingAnchors
from genattn.reading import read_json, whole
from genattn.selection.budget import Budget
from genattn.selection.estimate import PooledScore
from genattn.selection.guards import Similarity
from genattn.selection.rules import ErrorAware, Threshold, TopK, TopP
from genattn.selection.tiling import Boxes, Clusters, Runs
from genattn.whole_file import write_whole

TYPES: dict[str, Callable[..., Pattern]] = {
    cls.__name__: cls
    for cls in (
        AdaptivePattern,
        BlockTopK,
        DensePattern,
        GlobalTokens,
        Intersection,
        LogitDecayed,
        NeighborhoodPattern,
        PerHead,
        PerLayer,
        ProfiledPattern,
        RadialPattern,
        RotatingAnchors,
        Union,
    )
}


PARTS: dict[str, Callable[..., Any]] = {
    cls.__name__: cls for cls in (Boxes, Budget, Clusters, ErrorAware, PooledScore, Runs, Similarity, Threshold, TopK, TopP)
}


def pattern_to_dict(pattern: Pattern) -> dict[str, Any]:
    """Type and settings of `pattern`, JSON-ready; settings at their default are left out."""
    name = type(pattern).__name__
    if TYPES.get(name) is not type(pattern):
        raise GenAttnError(f"a pattern to be saved must be one of {', '.join(TYPES)}, got {name}")
    return _to_dict(pattern)


def _to_dict(value: Any) -> dict[str, Any]:
    found = {"type": type(value).__name__}
    for f in fields(value):
        setting = getattr(value, f.name)
        if setting != (f.default if f.default_factory is MISSING else f.default_factory()):
            found[f.name] = plain(setting)
    return found


def pattern_from_dict(settings: Mapping[str, Any]) -> Pattern:
    """The pattern that `pattern_to_dict` described. Raises GenAttnError for unknown types and settings."""
    if not isinstance(settings, Mapping):
        raise GenAttnError(f"a pattern must be an object with a type and settings, got {settings!r}")
    given = dict(settings)
    name = given.pop("type", None)
    if not isinstance(name, str) or name not in TYPES:
        raise GenAttnError(f"a pattern's type must be one of {', '.join(TYPES)}, got {name!r}")
    arguments = {key: from_plain(value) for key, value in given.items()}
    with whole(f"the description of a {name}"):
        return TYPES[name](**arguments)


def save_pattern(pattern: Pattern, path: str | Path, notes: Mapping[str, Any] | None = None) -> None:
    """Write `pattern` with `notes` (where it comes from) as a JSON file, whole or not at all."""
    text = json.dumps(
        {"format": "genattn-pattern-1", "pattern": pattern_to_dict(pattern), "notes": dict(notes or {})}, indent=1
    )
    write_whole(path, text + "\n")


def load_pattern(path: str | Path) -> Pattern:
    """The pattern in a file of `save_pattern`. Raises GenAttnError for a file that is missing or is something else."""
    content = read_json(path, "a pattern file")
    if not isinstance(content, dict) or content.get("format") != "genattn-pattern-1":
        raise GenAttnError(f'{path} must hold {{"format": "genattn-pattern-1", "pattern": ...}}, as save_pattern writes it')
    return pattern_from_dict(content.get("pattern") or {})


def plain(value: Any) -> Any:
    """`value` with tuples as lists and patterns and their parts as dicts, through lists and dicts."""
    if isinstance(value, Pattern):
        return pattern_to_dict(value)
    if PARTS.get(type(value).__name__) is type(value):
        return _to_dict(value)
    if isinstance(value, dict):
        return {key: plain(v) for key, v in value.items()}
    return [plain(v) for v in value] if isinstance(value, (tuple, list)) else value


def from_plain(value: Any) -> Any:
    """What `plain` gave back to patterns, parts and tuples."""
    if isinstance(value, dict):
        name = value.get("type")
        return _part(value) if isinstance(name, str) and name in PARTS else pattern_from_dict(value)
    return tuple(from_plain(v) for v in value) if isinstance(value, list) else value


def _part(settings: Mapping[str, Any]) -> Any:
    given = dict(settings)
    name = given.pop("type")
    arguments = {key: from_plain(value) for key, value in given.items()}
    with whole(f"the description of a {name}"):
        return PARTS[name](**arguments)
