"""Where the negative text stands in a sequence that carries it, and the two sequences that the model would have seen.

    carried     [text | negative | image]       or    [image | text | negative]
    positive    [text | image]                        [image | text]
    negative    [negative | image]                    [image | negative]

Everything is told per process: under context parallelism each process holds such a piece, and the gathered sequence is all
pieces one behind the other.
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Cut:
    """A carried sequence.

    Attributes:
        length: tokens that the stock model has, text and image.
        text: tokens of the positive text among them.
        more: tokens of the negative text.
        at: where these were put in, in [0, length].
        text_first: whether the text stands before the image.
    """

    length: int
    text: int
    more: int
    at: int
    text_first: bool

    @property
    def total(self) -> int:
        """Tokens of the carried sequence."""
        return self.length + self.more

    @property
    def image(self) -> int:
        """Tokens that are no text."""
        return self.length - self.text

    def stock(self, world: int = 1) -> torch.Tensor:
        """int64: places of the positive sequence in the carried one, in the model's own order."""
        return _places(self, world)[0]

    def negative(self, world: int = 1) -> torch.Tensor:
        """int64: places of the negative sequence in the carried one, in the model's own order."""
        return _places(self, world)[1]

    def image_rows(self, world: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
        """int64: places of the image's tokens in the positive sequence, and in the negative one."""
        _, _, above, below, _ = _places(self, world)
        return above, below

    def negative_rows(self, world: int = 1) -> torch.Tensor:
        """int64: places of the negative text in the negative sequence."""
        return _places(self, world)[4]


@functools.lru_cache(maxsize=256)
def _places(cut: Cut, world: int) -> tuple[torch.Tensor, ...]:
    extra = torch.arange(cut.at, cut.at + cut.more)
    stock = torch.cat([torch.arange(cut.at), torch.arange(cut.at + cut.more, cut.total)])
    image_in_stock = torch.arange(cut.text, cut.length) if cut.text_first else torch.arange(cut.image)
    image = stock[image_in_stock]
    negative = torch.cat([extra, image] if cut.text_first else [image, extra])
    image_in_negative = torch.arange(cut.image) + (cut.more if cut.text_first else 0)
    text_in_negative = torch.arange(cut.more) + (0 if cut.text_first else cut.image)
    sizes = (cut.total, cut.total, cut.length, cut.more + cut.image, cut.more + cut.image)
    found = (stock, negative, image_in_stock, image_in_negative, text_in_negative)
    return tuple(torch.cat([places + rank * size for rank in range(world)]) for places, size in zip(found, sizes))


def pick(tensor: torch.Tensor, places: torch.Tensor, dim: int) -> torch.Tensor:
    """The tokens at `places`; a view when they lie side by side."""
    first, count = int(places[0]) if len(places) else 0, len(places)
    if count == 0 or (int(places[-1]) - first == count - 1 and bool((places.diff() == 1).all())):
        return tensor.narrow(dim, first, count)
    return tensor.index_select(dim, places.to(tensor.device))


def pick_mask(mask: Any, rows: torch.Tensor, columns: torch.Tensor, tokens: int) -> Any:
    """An attention mask [B, Sk], [B, 1, 1, Sk], [B, 1, Sq, Sk] or [B, H, Sq, Sk] for chosen queries and keys.

    tokens: length of the carried sequence; an axis of another length, such as 1, is kept.
    """
    if not isinstance(mask, torch.Tensor):
        return mask
    if mask.shape[-1] == tokens:
        mask = pick(mask, columns, mask.ndim - 1)
    if mask.ndim > 2 and mask.shape[-2] == tokens:
        mask = pick(mask, rows, mask.ndim - 2)
    return mask
