"""The attention names of the command line, and the patterns behind them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from genattn.errors import GenAttnError
from genattn.patterns.pattern import Pattern


def _radial(variant: Literal["paper", "official", "genattn"]) -> Callable[..., Pattern]:
    def make(**options: Any) -> Pattern:
        from genattn.patterns.radial import RadialPattern

        return RadialPattern(variant=variant, **options)

    return make


def _neighborhood(**options: Any) -> Pattern:
    from genattn.patterns.neighborhood import NeighborhoodPattern

    return NeighborhoodPattern(**options)


ATTENTIONS: dict[str, Callable[..., Pattern] | None] = {
    "dense": None,
    "radial": _radial("genattn"),
    "radial-paper": _radial("paper"),
    "radial-official": _radial("official"),
    "neighborhood": _neighborhood,
}


def pattern_from_file(path: Path) -> Pattern:
    """The pattern in a settings file, as `genattn plan --auto --out` writes it.

    Raises GenAttnError when the file cannot be read as one.
    """
    from genattn.patterns.as_json import load_pattern

    if not path.is_file():
        raise GenAttnError(f"--pattern-file must name a file, but there is no {str(path)!r}")
    return load_pattern(path)


def pattern_from_name(name: str, options: str | None = None) -> Pattern | None:
    """The pattern called `name`, None for dense; `options` is a JSON object of its settings.

    Raises GenAttnError for an unknown name (they are listed), malformed JSON or settings the pattern refuses.
    """
    if name not in ATTENTIONS:
        raise GenAttnError(f"--attention must be one of {', '.join(ATTENTIONS)}, got {name!r}")
    try:
        settings = json.loads(options) if options else {}
    except ValueError as error:
        raise GenAttnError(f"--pattern-options must be a JSON object, got {options!r} ({error})") from None
    if not isinstance(settings, dict):
        raise GenAttnError(f"--pattern-options must be a JSON object, got {options!r}")
    make = ATTENTIONS[name]
    if make is None:
        if settings:
            raise GenAttnError(f"dense attention has no settings, got --pattern-options {options}")
        return None
    settings = {k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()}
    try:
        return make(**settings)
    except TypeError as error:
        raise GenAttnError(f"--pattern-options for {name}: {error}") from None
