"""From the widgets of a ComfyUI node to patterns, schedules and guidance; every wrong value is refused with what must hold."""

import json
import re
from collections.abc import Sequence
from typing import Any

from genattn.apps.sampling.attention_names import ATTENTIONS, pattern_from_name
from genattn.errors import GenAttnError
from genattn.guidance.heads.head_set import HeadSet
from genattn.guidance.softpag.softpag import SoftPAG
from genattn.patterns.dense import DensePattern
from genattn.patterns.pattern import Pattern
from genattn.seam.schedule import Schedule
from genattn.seam.sparse_plugin import SparsePlugin

PATTERNS = tuple(ATTENTIONS)
METHODS = ("softpag", "pag", "seg")
_BLOCK = re.compile(r"(-?\d+)(?:-(\d+))?")


def pattern_of(name: str, decay: float, window: str, stride: str, options: str) -> Pattern:
    """The pattern that the widgets describe.

    decay: of the radial patterns, 0 for their own. window, stride: of the neighborhood, "frames,height,width" tokens or one
    number for all axes. options: further settings of the pattern, a JSON object.
    """
    settings = _json(options)
    if name.startswith("radial") and decay:
        settings.setdefault("decay", decay)
    if name == "neighborhood":
        settings.setdefault("window_size", _axes("window", window))
        settings.setdefault("stride", _axes("stride", stride))
    return pattern_from_name(name, json.dumps(settings) if settings else None) or DensePattern()


def schedule_of(
    dense_steps: float, dense_blocks: str, blocks: int, sigma_start: float = 1.0, sigma_end: float = 0.0
) -> Schedule:
    """What stays dense. dense_steps: share of the steps below 1, else their number. blocks: how many the model has."""
    whole = sigma_start >= 1 and sigma_end <= 0
    return Schedule(
        dense_steps=int(dense_steps) if dense_steps >= 1 else float(dense_steps),
        dense_layers=blocks_of(dense_blocks, blocks),
        sigma=None if whole else (sigma_end, sigma_start),
    )


def sparse_of(
    pattern: str,
    decay: float,
    window: str,
    stride: str,
    pattern_options: str,
    impl: str,
    dense_steps: float,
    dense_blocks: str,
    blocks: int,
    sigma_start: float = 1.0,
    sigma_end: float = 0.0,
) -> SparsePlugin:
    """Pattern, schedule and backend as the plugin that both routes apply."""
    schedule = schedule_of(dense_steps, dense_blocks, blocks, sigma_start, sigma_end)
    return SparsePlugin(pattern_of(pattern, decay, window, stride, pattern_options), schedule, impl)


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
