"""The token sequence of one attention call, as a list of segments.

    text(7) | grid(8, 6, 10)            CogVideoX, FLUX: text first
    grid(8, 6, 10) | text(7)            HunyuanVideo, SD3: text last
    text | grid(1, 64, 64) | reference(1, 64, 64)      FLUX Kontext
    text/2 | grid[0:240] | text/2 | grid[240:480]      two ranks of Ulysses context parallelism

Never only (frames, height, width) + text: references, a soundtrack, registers and padding are segments of their own.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal

import torch

from genattn.errors import GenAttnError
from genattn.kernels.plan.lasting import lasting
from genattn.settings import one_of, several, whole_number, whole_numbers

SegmentKind = Literal["text", "grid", "reference", "audio", "register", "padding"]
_KINDS = ("text", "grid", "reference", "audio", "register", "padding")


@dataclass(frozen=True)
class Segment:
    """A run of tokens.

    `shape` is `(n,)` for text, audio, registers and padding, and the raster shape (1 to 3 axes: frames, height, width) for a
    grid or a reference. `start` and `stop` cut a piece out of a raster when a grid is scattered over several segments.
    """

    kind: SegmentKind
    shape: tuple[int, ...]
    start: int = 0
    stop: int | None = None

    def __post_init__(self) -> None:
        one_of("segment kind", self.kind, _KINDS)
        what = "1 to 3 axes of at least one token each"
        object.__setattr__(self, "shape", whole_numbers("shape of a segment", self.shape, 1, what))
        if not 1 <= len(self.shape) <= 3:
            raise GenAttnError(f"shape of a segment must be {what}, got {self.shape}")
        object.__setattr__(self, "start", whole_number("start", self.start, None, "a place in the raster"))
        stop = math.prod(self.shape) if self.stop is None else whole_number("stop", self.stop, None, "a place in the raster")
        if not 0 <= self.start < stop <= math.prod(self.shape):
            raise GenAttnError(
                f"a piece of {self.shape} must lie in [0, {math.prod(self.shape)}], got [{self.start}, {self.stop}]"
            )
        object.__setattr__(self, "stop", stop)

    @property
    def length(self) -> int:
        """Tokens in this segment."""
        assert self.stop is not None
        return self.stop - self.start


@dataclass(frozen=True)
class TokenLayout:
    """Segments in the order in which the tokens stand in the sequence.

    All `grid` segments are pieces of one grid of the same shape. Everything that is not grid or padding is global: it sees
    every token and every token sees it. Padding is never a key.
    """

    segments: tuple[Segment, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "segments", several("segments", self.segments, "a list of Segment"))
        strange = [s for s in self.segments if not isinstance(s, Segment)]
        if strange:
            raise GenAttnError(
                f"segments must be Segment objects, got {strange[0]!r}; TokenLayout.from_grid makes the usual ones"
            )
        if not self.segments:
            raise GenAttnError("a layout needs at least one segment, got none")
        shapes = {s.shape for s in self.segments if s.kind == "grid"}
        if len(shapes) > 1:
            raise GenAttnError(
                f"all grid segments must be pieces of one grid, got shapes {sorted(shapes)}; "
                "call the further images 'reference'"
            )
        pieces = sorted((s.start, s.stop or 0) for s in self.segments if s.kind == "grid")
        ends = [0] + [stop for _, stop in pieces]
        total = math.prod(next(iter(shapes))) if shapes else 0
        if pieces and ([start for start, _ in pieces] != ends[:-1] or ends[-1] != total):
            raise GenAttnError(f"the grid pieces must cover [0, {total}] once, got {pieces}")

    @classmethod
    def from_grid(cls, grid: Sequence[int], text_before: int = 0, text_after: int = 0) -> "TokenLayout":
        """A grid of 1 to 3 axes (frames, height, width) with text before or after it.

        >>> layout = TokenLayout.from_grid((8, 6, 10), text_before=7)
        >>> layout.seqlen, layout.describe()
        (487, 'text 7 + grid 8x6x10')
        """
        what = "a number of text tokens >= 0"
        text_before, text_after = (
            whole_number("text_before", text_before, 0, what),
            whole_number("text_after", text_after, 0, what),
        )
        sizes = whole_numbers("grid", grid, 1, "1 to 3 whole numbers >= 1 such as (frames, height, width)")
        parts = [Segment("grid", sizes)]
        if text_before:
            parts.insert(0, Segment("text", (text_before,)))
        if text_after:
            parts.append(Segment("text", (text_after,)))
        return cls(tuple(parts))

    @cached_property
    def grid(self) -> tuple[int, ...] | None:
        """Raster shape of the grid, 1 to 3 axes, or None when there is none."""
        return next((s.shape for s in self.segments if s.kind == "grid"), None)

    @cached_property
    def grid3(self) -> tuple[int, int, int]:
        """The grid's (frames, height, width), with leading axes of one for images and lines."""
        shape = self.grid or (0, 0, 0)
        return (1,) * (3 - len(shape)) + shape  # type: ignore[return-value]

    @cached_property
    def seqlen(self) -> int:
        """Tokens in the sequence."""
        return sum(s.length for s in self.segments)

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Position of each segment's first token."""
        ends = [0]
        for segment in self.segments:
            ends.append(ends[-1] + segment.length)
        return tuple(ends[:-1])

    @property
    def raster_index(self) -> torch.Tensor:
        """Int64 [S]: raster position in the grid, -1 for global tokens, -2 for padding."""
        return _raster_index(self)

    @property
    def grid_positions(self) -> torch.Tensor:
        """Int64 [prod(grid)]: place in the sequence of each grid token, in raster order."""
        return _grid_positions(self)

    @property
    def is_contiguous(self) -> bool:
        """Whether the grid is one segment, so that raster order is sequence order."""
        return sum(s.kind == "grid" for s in self.segments) == 1

    def describe(self) -> str:
        """One line for logs: `text 7 + grid 8x6x10`."""
        return " + ".join(f"{s.kind} {'x'.join(map(str, s.shape))}" for s in self.segments)


@lru_cache(maxsize=64)
@lasting
def _raster_index(layout: TokenLayout) -> torch.Tensor:
    codes = {"padding": -2, **dict.fromkeys(("text", "reference", "audio", "register"), -1)}
    return torch.cat(
        [
            torch.arange(s.start, s.start + s.length) if s.kind == "grid" else torch.full((s.length,), codes[s.kind])
            for s in layout.segments
        ]
    )


@lru_cache(maxsize=64)
@lasting
def _grid_positions(layout: TokenLayout) -> torch.Tensor:
    index = _raster_index(layout)
    places = torch.nonzero(index >= 0).flatten()
    return places[torch.argsort(index[places])]
