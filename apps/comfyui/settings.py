"""From the widgets of a ComfyUI node to patterns, schedules and guidance; every wrong value is refused with what must hold."""

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from genattn.apps.sampling.attention_names import ATTENTIONS, pattern_from_name
from genattn.errors import GenAttnError
from genattn.guidance.heads.head_set import HeadSet
from genattn.guidance.softpag.softpag import SoftPAG
from genattn.kernels.plan.tail import TAILS
from genattn.patterns.dense import DensePattern
from genattn.patterns.pattern import Pattern
from genattn.planning.break_even import break_even
from genattn.planning.ladder import Model as Known, rung
from genattn.seam.schedule import Schedule
from genattn.seam.settings_file import load_sparse
from genattn.seam.sparse_plugin import SparsePlugin

NAMES = ("auto", "gna")  # what these stand for depends on the model
SAVED = "settings"  # the file says all of it
PATTERNS = (*ATTENTIONS, *NAMES, SAVED)
TAIL_CHOICES = ("auto", "none", *TAILS)
METHODS = ("softpag", "pag", "seg")
_BLOCK = re.compile(r"(-?\d+)(?:-(\d+))?")


def pattern_of(
    name: str, decay: float, window: str, stride: str, options: str, path: str = "", tail: str = "auto"
) -> Pattern | None:
    """The pattern that the widgets describe; None for a name that the model has to be asked about.

    decay: of the radial patterns, 0 for their own. window, stride: of the neighborhood, "frames,height,width" tokens or one
    number for all axes. options: further settings of the pattern, a JSON object. path: of a map, for profile, or of a settings
    file. tail: a key of TAIL_CHOICES; the options win.
    """
    if tail not in TAIL_CHOICES:
        raise GenAttnError(f"tail must be one of {', '.join(TAIL_CHOICES)}, got {tail!r}")
    settings = _json(options)
    if name == SAVED:
        return _saved(path).pattern
    if name in NAMES:
        if settings:
            raise GenAttnError(f"pattern_options belong to a pattern that is named, got {options!r} for {name}")
        return None
    if name == "dense":  # a switch: what the other widgets say is for the pattern that comes back
        return DensePattern()
    if name.startswith("radial") and decay:
        settings.setdefault("decay", decay)
    if name == "neighborhood":
        settings.setdefault("window_size", _axes("window", window))
        settings.setdefault("stride", _axes("stride", stride))
    if name == "profile" and path.strip():
        settings.setdefault("path", path.strip())
    if tail != "auto":
        settings.setdefault("tail", None if tail == "none" else tail)
    return pattern_from_name(name, json.dumps(settings) if settings else None)


def schedule_of(
    dense_steps: float,
    dense_blocks: str,
    blocks: int,
    sigma_start: float = 1.0,
    sigma_end: float = 0.0,
    start_percent: float = 0.0,
    end_percent: float = 1.0,
) -> Schedule:
    """What stays dense. dense_steps: share of the steps below 1, else their number. blocks: how many the model has.

    start_percent, end_percent: shares of the steps between which sparse may run.
    """
    if start_percent > end_percent:
        raise GenAttnError(f"start_percent must not be above end_percent, got {start_percent} and {end_percent}")
    whole = sigma_start >= 1 and sigma_end <= 0
    steps = int(dense_steps) if dense_steps >= 1 else max(float(dense_steps), start_percent)
    return Schedule(
        dense_steps=steps,
        dense_last_steps=round(1 - end_percent, 6),
        dense_layers=blocks_of(dense_blocks, blocks),
        sigma=None if whole else (sigma_end, sigma_start),
    )


def sparse_of(
    known: Known,
    pattern: str,
    decay: float,
    window: str,
    stride: str,
    pattern_options: str,
    impl: str,
    dense_steps: float,
    dense_blocks: str,
    path: str | None = None,
    tail: str | None = None,
    min_tokens: int | None = None,
    **moments: float | None,
) -> SparsePlugin:
    """Pattern, schedule and backend as the plugin that both routes apply.

    known: the model that will run. moments: of `schedule_of`; None is its default. Where a settings file is named, it says what
    stays dense, and the widgets for that are not read.
    """
    if pattern == SAVED:
        saved = _saved(path or "")
        plugin = SparsePlugin(saved.pattern, saved.schedule, impl if saved.impl == "auto" else saved.impl)
        plugin.origin, plugin.known_as = f"settings {path}", known.name
        return plugin
    given = {name: value for name, value in moments.items() if value is not None}
    schedule = schedule_of(dense_steps, dense_blocks, known.layers, **given)
    tail = tail or "auto"
    found, why = pattern_of(pattern, decay, window, stride, pattern_options, path or "", tail), ""
    if found is None:
        named = rung(pattern, known)
        found, why = named.pattern, f"{pattern}: {named.why}"
        if tail != "auto":
            found = found.with_tail(None if tail == "none" else tail)
    least = -1 if min_tokens is None else min_tokens
    if least < 0:
        # what a pattern visits depends on the size; half of the scores is what the measured lengths are between
        least = break_even(known.device, known.backend, 0.5, known.heads, known.head_dim, found.needs_tensors).tokens
    plugin = SparsePlugin(found, replace(schedule, min_tokens=least), impl)
    plugin.origin, plugin.known_as = why, known.name
    return plugin


def _saved(path: str) -> SparsePlugin:
    if not path.strip():
        raise GenAttnError("path must name a settings file of `genattn tune`, got nothing; write it into path")
    return load_sparse(path.strip())


def blocks_of(text: str, blocks: int) -> tuple[int, ...]:
    """ "0-2,-1" -> (0, 1, 2, last); "" is none. Negative numbers count from the last block, -1."""
    found: set[int] = set()
    for part in (p.strip() for p in text.split(",") if p.strip()):
        match = _BLOCK.fullmatch(part)
        if match is None:
            raise GenAttnError(f"blocks must be written like 0-2,5,-1, got {part!r} in {text!r}")
        first = int(match[1])
        last = first if match[2] is None else int(match[2])
        if first < 0:
            first, last = blocks + first, blocks + last
        if not 0 <= first <= last < blocks:
            raise GenAttnError(f"blocks must lie in 0 to {blocks - 1} (or -1 to -{blocks}) and rise, got {part!r}")
        found.update(range(first, last + 1))
    return tuple(sorted(found))


def guidance_of(
    method: str,
    heads: str,
    u: float,
    scale: float,
    head_set: HeadSet | None = None,
    **settings: Any,
) -> SoftPAG:
    """SoftPAG on heads, or PAG and SEG on whole layers. head_set: instead of `heads`, its own weights, softpag only."""
    settings = {"reuse_prefix": False, **settings}
    if method not in METHODS:
        raise GenAttnError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    if method == "softpag":
        return SoftPAG(head_set if head_set is not None else heads, u=u, scale=scale, **settings)
    if head_set is not None:
        raise GenAttnError(f"a head set belongs to softpag, got method {method!r}; unplug it or choose softpag")
    settings.pop("target", None)
    return SoftPAG.pag(heads, scale, **settings) if method == "pag" else SoftPAG.seg(heads, scale, **settings)


def sigma_bounds(start: float, end: float) -> dict[str, float | None]:
    """A window of noise levels as SoftPAG takes it; 1 to 0 is no bound."""
    return {"sigma_start": None if start >= 1 else start, "sigma_stop": None if end <= 0 else end}


def _axes(name: str, text: str) -> int | list[int]:
    try:
        numbers = [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        numbers = []
    if len(numbers) not in (1, 2, 3):
        raise GenAttnError(f"{name} must be tokens per axis like 5,12,12 (frames,height,width) or one number, got {text!r}")
    return numbers[0] if len(numbers) == 1 else numbers


def _json(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text) if text.strip() else {}
    except ValueError as error:
        raise GenAttnError(f"pattern_options must be a JSON object, got {text!r} ({error})") from None
    if not isinstance(found, dict):
        raise GenAttnError(f"pattern_options must be a JSON object, got {text!r}")
    return found


def size_multiple(name: str, value: int, multiple: int = 8) -> str:
    """Why a width or height cannot be, empty when it can."""
    return "" if value % multiple == 0 else f"{name} must be a multiple of {multiple}, got {value}"


def first_of(reasons: Sequence[str]) -> bool | str:
    """ComfyUI's answer to a check at submit time: True, or the first reason."""
    return next((reason for reason in reasons if reason), True)
