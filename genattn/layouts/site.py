"""One attention module of a model: where it stands, and what attends to what in it."""

from dataclasses import dataclass
from typing import Literal

SiteKind = Literal["self", "joint", "cross", "temporal", "spatial", "refiner"]


@dataclass(frozen=True)
class AttentionSite:
    """One attention module of a model.

    name: module path, e.g. "blocks.3.attn1". stack: the list of blocks it belongs to. layer: index within the stack.
    depth: index over all stacks in execution order (double-stream blocks, then single-stream); -1 outside them.
    kind: what attends to what. heads: number of query heads. model: component of the pipeline, e.g. "transformer_2".
    unreachable: why its attention never comes by here (linear attention, an old processor); empty when it does.
    """

    name: str
    stack: str
    layer: int
    depth: int
    kind: SiteKind
    heads: int
    model: str = ""
    unreachable: str = ""
