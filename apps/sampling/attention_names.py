"""The attention names of the command line, and the patterns behind them.

auto                                the model's own preset; dense where a sparse call would not be faster
radial                              the pattern with its own settings
neighborhood                        the model's published window, else whole tiles near 40 % of the scores
neighborhood:18x24x24/16x8x8        a window and a stride per axis, in tokens: frames, height, width
adaptive, sol, sparge, svg2         tiles chosen by content, by our rule or by a published one
map.safetensors                     a map of `genattn profile`; also profile:PATH, or profile with path=PATH as an option
--pattern-options decay=0.3         or a JSON object: {"decay": 0.3}
"""

import difflib
import json
from collections.abc import Callable
from dataclasses import fields
from typing import Any, Literal

from genattn.apps.sampling.shapes import parse_shape
from genattn.errors import GenAttnError
from genattn.patterns.pattern import Pattern

WINDOWED, AUTO = "neighborhood", "auto"
# names that a model fills with its own preset, and what `genattn.apply` calls them
_BY_MODEL = {AUTO: "auto", WINDOWED: "gna"}
_EXAMPLE = "--window 18x24x24 --stride 16x8x8 (tokens: frames, height, width; two numbers for a picture)"


def _radial(variant: Literal["paper", "official", "genattn"]) -> Callable[..., Pattern]:
    def make(**options: Any) -> Pattern:
        from genattn.patterns.radial import RadialPattern

        _check_names("radial", RadialPattern, options, fixed=("variant",))
        return RadialPattern(variant=variant, **options)

    return make


def _neighborhood(**options: Any) -> Pattern:
    """One window for every size; without a window, whole tiles for each size, near a `density` of the scores."""
    from genattn.patterns.neighborhood import NeighborhoodPattern
    from genattn.planning.fitted import FittedNeighborhood
    from genattn.planning.ladder import GNA_DENSITY

    if set(options) <= {"density", "tail"}:
        return FittedNeighborhood(**({"density": GNA_DENSITY} | options))
    _check_names(WINDOWED, NeighborhoodPattern, options)
    if "window_size" not in options:
        raise GenAttnError(f"--attention {WINDOWED} needs a window beside {', '.join(sorted(options))}; give {_EXAMPLE}")
    return NeighborhoodPattern(**options)


def _adaptive(**options: Any) -> Pattern:
    """Amount and rule by name: rule=top-p, mass=0.8; the rest are settings of AdaptivePattern.

    Without settings the pattern of `genattn.apply(pipe, "adaptive")`; a prior, or looking closer, takes boxes of a frame.
    """
    from genattn.patterns.adaptive import AdaptivePattern
    from genattn.patterns.as_json import from_plain
    from genattn.planning.ladder import ADAPTIVE
    from genattn.selection.estimate import PooledScore
    from genattn.selection.rules import RULES, rule_named

    given = {key: from_plain(value) for key, value in options.items()}
    own = {"tiles": ADAPTIVE.tiles, "score": ADAPTIVE.score} if not {"inside", "always", "levels"} & set(given) else {}
    rule = rule_named(str(given.pop("rule"))) if "rule" in given else ADAPTIVE.chosen_by
    if rule.amount_name in given:
        rule = rule.with_amount(given.pop(rule.amount_name))
    other = sorted(key for key in given if key in {r.amount_name for r in RULES.values()})
    if other:
        raise GenAttnError(f"the rule has the amount {rule.amount_name!r}, got {', '.join(other)}; name rule=... too")
    if "levels" in given:
        given["score"] = PooledScore(given.pop("levels"))
    _check_names("adaptive", AdaptivePattern, given, fixed=("selection",))
    return AdaptivePattern(rule, **({"tail": ADAPTIVE.tail} | own | given))


def _published(name: str) -> Callable[..., Pattern]:
    def make(**options: Any) -> Pattern:
        from genattn.patterns.published import published

        return published(name, **options)

    return make


def _profile(**options: Any) -> Pattern:
    from genattn.patterns.profiled import ProfiledPattern

    _check_names("a map", ProfiledPattern, options, fixed=("layer", "band", "heads"))
    if "path" not in options:
        raise GenAttnError(
            "--attention profile needs the file of a map; give profile:map.safetensors, or path=... as an option"
        )
    return ProfiledPattern(**options)


ATTENTIONS: dict[str, Callable[..., Pattern] | None] = {
    "dense": None,
    "radial": _radial("genattn"),
    "radial-paper": _radial("paper"),
    "radial-official": _radial("official"),
    WINDOWED: _neighborhood,
    "adaptive": _adaptive,
    "sol": _published("sol"),
    "sparge": _published("sparge"),
    "svg2": _published("svg2"),
    "profile": _profile,
}


def _check_names(name: str, cls: type[Pattern], options: dict[str, Any], fixed: tuple[str, ...] = ()) -> None:
    """Raise GenAttnError for a setting that the pattern does not have: the nearest name, and all there are."""
    own = [each.name for each in fields(cls) if each.name not in fixed]  # type: ignore[arg-type]
    known = sorted(own, key=lambda setting: setting == "tail")  # what all patterns have comes last
    for option in options:
        if option not in known:
            near = difflib.get_close_matches(option, known, n=1)
            guess = f"; did you mean {near[0]!r}?" if near else "."
            raise GenAttnError(f"{name} has no setting {option!r}{guess} It has: {', '.join(known)}")


def pattern_from_name(
    name: str, options: str | None = None, window: str | None = None, stride: str | None = None
) -> Pattern | None:
    """The pattern called `name`, None for dense.

    Args:
        name: a key of ATTENTIONS, `neighborhood:WINDOW`, `neighborhood:WINDOW/STRIDE`, or the file of a map.
        options: settings of the pattern, as a JSON object or as KEY=VALUE, separated by commas.
        window, stride: of neighborhood attention, such as 18x24x24.

    Raises:
        GenAttnError: an unknown name (they are listed), settings that cannot be read or that the pattern refuses, or a window
            for a pattern that has none.
    """
    base, _, spec = name.partition(":")
    if base == AUTO:
        raise GenAttnError(f"{AUTO} is for sampling with a model; name a pattern with --attention")
    if name.endswith(".safetensors"):
        if window or stride:
            raise GenAttnError(f"--window and --stride belong to {WINDOWED}, got the map {name}")
        return _profile(**_settings(options), path=name.removeprefix("profile:"))
    base = WINDOWED if base == "gna" else base  # what `genattn.apply` calls it
    if base not in ATTENTIONS:
        known = f"{AUTO}, {', '.join(ATTENTIONS)} or a map.safetensors"
        near = difflib.get_close_matches(base, [AUTO, *ATTENTIONS], n=1)
        guess = f"; did you mean {near[0]!r}?" if near else ""
        raise GenAttnError(f"--attention must be one of {known}, got {name!r}{guess}")
    if spec:
        window, stride = _one_way(name, spec, window, stride)
    settings = _settings(options)
    if base != WINDOWED and (window or stride):
        raise GenAttnError(f"--window and --stride belong to {WINDOWED}, got --attention {name}; use --pattern-options")
    for key, option, text in (("window_size", "--window", window), ("stride", "--stride", stride)):
        if text:
            if key in settings:
                raise GenAttnError(f"give either {option} or {key!r} in --pattern-options, got both")
            settings[key] = _one_or_all(parse_shape(option, text))
    make = ATTENTIONS[base]
    if make is None:
        if settings:
            raise GenAttnError(f"dense attention has no settings, got --pattern-options {options}")
        return None
    return make(**settings)


def attention_from_name(
    name: str, options: str | None = None, window: str | None = None, stride: str | None = None
) -> Pattern | str | None:
    """As `pattern_from_name`, for a run of a model: a string where `genattn.apply` fills the name with the model's preset.

    Raises GenAttnError as `pattern_from_name` does, and for settings beside "auto".
    """
    told = {"--pattern-options": options, "--window": window, "--stride": stride}
    given = [option for option, value in told.items() if value]
    if name == AUTO and given:
        raise GenAttnError(f"{AUTO} takes its settings from the model's preset, got {', '.join(given)}; name the pattern too")
    name = WINDOWED if name == "gna" else name
    return _BY_MODEL[name] if name in _BY_MODEL and not given else pattern_from_name(name, options, window, stride)


def _one_way(name: str, spec: str, window: str | None, stride: str | None) -> tuple[str, str | None]:
    if window or stride:
        raise GenAttnError(f"give the window in the name or by --window and --stride, got both: {name!r}")
    first, _, second = spec.partition("/")
    return first, second or None


def _one_or_all(values: tuple[int, ...]) -> int | tuple[int, ...]:
    return values[0] if len(values) == 1 else values


def _settings(options: str | None) -> dict[str, Any]:
    """`{"decay": 0.3}` or `decay=0.3,tile=runs` as a dict; lists become tuples."""
    if not options:
        return {}
    text = options.strip()
    if not text.startswith(("{", "[")) and "=" in text:
        pairs = [part.partition("=") for part in text.split(",")]
        bare = next((key for key, sign, _ in pairs if not sign), None)
        if bare is not None:
            raise GenAttnError(f"--pattern-options must be KEY=VALUE pairs, got {bare!r} alone; write a shape as 5x9x9")
        return {key.strip(): _value(value.strip()) for key, _, value in pairs}
    try:
        found = json.loads(text)
    except ValueError as error:
        raise GenAttnError(f"--pattern-options must be a JSON object or KEY=VALUE, got {options!r} ({error})") from None
    if not isinstance(found, dict):
        raise GenAttnError(f"--pattern-options must be a JSON object or KEY=VALUE, got {options!r}")
    return {key: tuple(value) if isinstance(value, list) else value for key, value in found.items()}


def _value(text: str) -> Any:
    """What a person means by 0.3, true, runs or 8x4x4."""
    try:
        return json.loads(text.lower() if text.lower() in ("true", "false", "null") else text)
    except ValueError:
        pass
    try:
        return parse_shape("value", text)
    except GenAttnError:
        return text
