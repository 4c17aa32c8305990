"""Sizes as people type them: `18x24x24`."""

import re

from genattn.errors import GenAttnError


def parse_shape(option: str, text: str) -> tuple[int, ...]:
    """`18x24x24` as (18, 24, 24).

    >>> parse_shape("--grid", "18x24x24")
    (18, 24, 24)

    Raises GenAttnError for anything but 1 to 3 whole numbers joined by x.
    """
    if not re.fullmatch(r"-?\d+(x-?\d+){0,2}", text.strip()):
        raise GenAttnError(f"{option} must be 1 to 3 whole numbers joined by x, e.g. 18x24x24, got {text!r}")
    return tuple(int(part) for part in text.split("x"))
