"""What must be known about a model family, and nothing more: its blocks, its kinds of attention, its tokens, its timestep."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from genattn.errors import GenAttnError
from genattn.geometry.token_layout import Segment, SegmentKind, TokenLayout
from genattn.layouts.site import SiteKind

LayoutFunction = Callable[[Any, Mapping[str, Any]], TokenLayout | None]
SiteLayout = Callable[[SiteKind, int, TokenLayout], TokenLayout | None]


@dataclass(frozen=True)
class Family:
    """A family of denoisers that share their structure.

    name: short name. models: class names in diffusers. stacks: block lists in execution order.
    kinds: (end of the module path, kind); the first that fits decides, "self" when none does.
    layout: denoiser inputs by name -> segments of the self or joint attention.
    site_layout: for attention over other tokens than `layout` says (temporal, spatial): (kind, length, run's layout) ->
    segments.
    site_tokens: (model, site's name, run's layout) -> length, where sites of one kind differ in length.
    timestep: name of the argument. rising: whether it grows while sampling. cfg: how guidance passes come when the pipeline
    gives no cache context. reads_values: inputs of which `layout` reads values, not only shapes.
    lists: inputs with an entry per sample, where samples may differ in size, text or places; each then has a layout of its own.
    text_varies: sequences may hold fewer text tokens than the inputs have. queries: kinds of segments whose tokens ask, where
    the others are keys only (text that joins as keys, cached references); empty when every token asks. side_by_side: the
    stacks run through the layers together, so that block 0 of each is a first block. generic: whether `layout` reads the
    model's own positions by `genattn.layouts.positions`. note: what a user should know.
    """

    name: str
    models: tuple[str, ...]
    stacks: tuple[str, ...]
    layout: LayoutFunction
    kinds: tuple[tuple[str, SiteKind], ...] = (("attn2", "cross"),)
    site_layout: SiteLayout | None = None
    site_tokens: Callable[[Any, str, TokenLayout], int] | None = None
    timestep: str = "timestep"
    rising: bool = False
    cfg: str | None = None
    reads_values: tuple[str, ...] = field(default=())
    lists: tuple[str, ...] = ()
    text_varies: bool = False
    queries: tuple[SegmentKind, ...] = ()
    side_by_side: bool = False
    generic: bool = False
    note: str = ""


class MixedGrids(GenAttnError):
    """The samples of a batch differ in their grids or in the lengths of their texts: no one layout fits them all."""


def text(length: int) -> list[Segment]:
    """A text segment, or nothing."""
    return [Segment("text", (int(length),))] if length else []


def grid(*shape: int) -> list[Segment]:
    """The grid segment."""
    return [Segment("grid", tuple(int(n) for n in shape))]


def references(*shapes: tuple[int, ...]) -> list[Segment]:
    """Reference images behind or before the grid."""
    return [Segment("reference", tuple(int(n) for n in shape)) for shape in shapes]


def audio(length: int) -> list[Segment]:
    """A soundtrack in the sequence of a video, or nothing."""
    return [Segment("audio", (int(length),))] if length else []


def registers(length: int) -> list[Segment]:
    """Learned tokens, also those that fill up and are attended to; nothing when there are none."""
    return [Segment("register", (int(length),))] if length > 0 else []


def layout(*parts: list[Segment]) -> TokenLayout:
    """The parts one behind the other."""
    return TokenLayout(tuple(segment for part in parts for segment in part))


def patched(latents: Any, patch: tuple[int, int, int]) -> tuple[int, int, int]:
    """(frames, height, width) in tokens of latents [B, C, F, H, W] under a patch (frames, height, width)."""
    frames, height, width = latents.shape[2:]
    return frames // patch[0], height // patch[1], width // patch[2]


def refuse_mixed(sizes: Sequence[Any]) -> None:
    """Raise MixedGrids when the samples of a batch are not of one size."""
    if any(size != sizes[0] for size in sizes):
        raise MixedGrids("the batch holds images of several sizes, and one grid does not fit them all")


def refuse_mixed_rows(told: torch.Tensor) -> None:
    """Raise MixedGrids when the samples of a batch are told other things than the first; told: [B, ...]."""
    if bool((told != told[:1]).any()):
        raise MixedGrids("the samples of the batch differ in where their tokens stand, and one layout does not fit them all")
