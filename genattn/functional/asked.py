"""What a call of `attention` asks for in a caller's own words: a grid instead of a layout, a name or a file's words instead of
a pattern, a tail beside it.
"""

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from genattn.errors import GenAttnError
from genattn.geometry.token_layout import TokenLayout
from genattn.patterns.as_json import pattern_from_dict
from genattn.patterns.dense import DensePattern
from genattn.patterns.pattern import Pattern
from genattn.planning.ladder import LADDER, Model, rung

OWN_TAIL = "pattern"


def asked_layout(
    tokens: int, layout: TokenLayout | None, grid: Sequence[int] | None, text_before: int, text_after: int
) -> TokenLayout:
    """The layout of `tokens` tokens: the one that is given, or a grid with text around it.

    Raises GenAttnError unless exactly one of the two is given, and when their lengths do not fit the tokens.
    """
    if (layout is None) == (grid is None):
        given = "both" if layout is not None else "neither"
        raise GenAttnError(f"give either layout=TokenLayout(...) or grid=(frames, height, width), got {given}")
    if grid is not None:
        return _around(grid, text_before, text_after, tokens)
    assert layout is not None
    if text_before or text_after:
        raise GenAttnError(
            f"text_before and text_after go with grid=...; a layout has its text already, got {text_before} and {text_after}"
        )
    return layout


def _around(grid: Sequence[int], before: int, after: int, tokens: int) -> TokenLayout:
    try:
        sizes = tuple(operator.index(n) for n in grid)
    except TypeError as error:
        raise GenAttnError(f"grid must be 1 to 3 whole numbers such as (frames, height, width), got {grid!r}") from error
    layout = TokenLayout.from_grid(sizes, text_before=before, text_after=after)
    if layout.seqlen != tokens:
        raise GenAttnError(
            f"grid {sizes} with text_before={before} and text_after={after} has {layout.seqlen} tokens, the query has "
            f"{tokens}; tokens around the grid (text, references) are counted by text_before and text_after"
        )
    return layout


def asked_pattern(
    pattern: Pattern | str | Mapping[str, Any], tail: str | None, query: torch.Tensor, layout: TokenLayout
) -> Pattern:
    """The pattern with the tail that is asked for.

    pattern: a Pattern, its description as `as_json` writes it, or a name. Raises GenAttnError for anything else.
    """
    if isinstance(pattern, str):
        pattern = _by_name(pattern, query, layout)
    elif isinstance(pattern, Mapping):
        pattern = pattern_from_dict(pattern)
    if not isinstance(pattern, Pattern):
        raise GenAttnError(
            f"pattern must be a Pattern such as RadialPattern(), its description, or one of {', '.join(LADDER)}, "
            f"got {type(pattern).__name__}: {pattern!r}"
        )
    if tail == OWN_TAIL:
        return pattern
    return pattern.with_measured_tail() if tail == "measured" else pattern.with_tail(tail)


def _by_name(name: str, query: torch.Tensor, layout: TokenLayout) -> Pattern:
    """What a name stands for where no model is known; "auto" is dense below the break-even length."""
    device = query.device.type
    heads, width = query.shape[2:]
    found = rung(name, Model("tensors", heads, 1, width, (), device, "cpu" if device == "cpu" else "triton"))
    return DensePattern() if layout.seqlen < found.schedule.get("min_tokens", 0) else found.pattern
