"""Attention over two texts: one call of the model becomes one per text, and the answers are joined by NAG's formula.

    cross   q asks the keys of the first text, then those of the second
    joint   [text, picture] attends to itself, then [second text, picture]; the picture's rows are joined

Calls that do not look at the text pass.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from genattn.apps.comfyui.hosts.call import RawCall, held
from genattn.guidance.nag.formula import Strength, guide

TEXTS = "genattn_texts"
Ask = Callable[[RawCall, bool], torch.Tensor]


@dataclass
class TwoTexts:
    """Both texts of one forward of a model.

    guided: bool [B], the samples that are guided. joint: whether the texts stand in one sequence with the picture.
    own, other: tokens of the first and the second text. picture: the other tokens of a joint sequence, 0 until a block has run.
    keys: key tokens of a cross-attention over both. text_first: of a joint sequence. mask: of the second text's sequence.
    context: tokens of the second text as the model takes it in. calls: that were split. announced: whether the next call is
    known to be over the text, None where calls tell by their length.
    """

    strength: Strength
    guided: torch.Tensor
    joint: bool
    own: int = 0
    other: int = 0
    picture: int = 0
    keys: int = 0
    text_first: bool = True
    mask: torch.Tensor | None = None
    context: int = 0
    calls: int = 0
    announced: bool | None = None

    def answer(self, raw: RawCall, ask: Ask) -> torch.Tensor | None:
        """What a call over both texts gives, in the caller's shape; None for other calls.

        ask: runs a call over one text; told whether it is the second.
        """
        split = bool(raw.options.get("skip_reshape"))
        axis = 2 if split else 1
        queries, keys = held(raw.q).shape[axis], held(raw.k).shape[axis]
        if self.joint:
            if not self.picture or not queries == keys == self.own + self.other + self.picture:
                return None
            self.calls += 1
            return self._joint(raw, ask, axis)
        if keys != self.keys or (self.announced is None and queries == keys) or self.announced is False:
            return None
        if self.announced:
            self.announced = False
        self.calls += 1
        return self._cross(raw, ask, axis)

    def _cross(self, raw: RawCall, ask: Ask, axis: int) -> torch.Tensor:
        first, second = slice(0, self.own), slice(self.own, self.own + self.other)
        mine, theirs = ([_part(held(t), axis, text) for t in (raw.k, raw.v)] for text in (first, second))
        mask = raw.options.get("mask")
        positive = ask(_call(raw, (held(raw.q), *mine), None if mask is None else mask[..., first]), False)
        rows = self._rows(positive)
        asked = [t if rows is None else t[rows] for t in (held(raw.q), *theirs)]
        masked = None if mask is None else _of_rows(mask[..., second], rows, len(positive))
        negative = ask(_call(raw, asked, masked), True)
        return self._joined(positive, negative, rows, raw)

    def _joint(self, raw: RawCall, ask: Ask, axis: int) -> torch.Tensor:
        other, start = self.other, 0 if self.text_first else self.picture
        first, second = slice(start, start + self.own), slice(start + self.own, start + self.own + other)
        picture = slice(self.own + other, None) if self.text_first else slice(0, self.picture)
        whole = [held(t) for t in (raw.q, raw.k, raw.v)]
        mine, theirs = ([self._sequence(t, axis, text, picture) for t in whole] for text in (first, second))
        mask = raw.options.get("mask")
        hidden = self.mask
        if mask is not None and mask.shape[-1] == whole[0].shape[axis]:  # it covers both texts
            mask, hidden = (self._sequence_mask(mask, text, picture) for text in (first, second))
        positive = ask(_call(raw, mine, mask), False)
        rows = self._rows(positive)
        asked = [t if rows is None else t[rows] for t in theirs]
        negative = ask(_call(raw, asked, _of_rows(hidden, rows, len(positive))), True)
        out_axis = 2 if raw.options.get("skip_output_reshape") else 1
        shown = slice(self.own, None) if self.text_first else slice(0, self.picture)
        seen = slice(other, None) if self.text_first else slice(0, self.picture)
        joined = self._joined(_part(positive, out_axis, shown), _part(negative, out_axis, seen), rows, raw)
        texts = slice(0, self.own) if self.text_first else slice(self.picture, None)
        others = slice(0, other) if self.text_first else slice(self.picture, None)
        spoken = _part(negative, out_axis, others)
        if rows is not None:
            shape = list(positive.shape)
            shape[out_axis] = other
            spoken = positive.new_zeros(shape).index_copy_(0, rows, spoken)
        parts = [_part(positive, out_axis, texts), spoken]
        return torch.cat([*parts, joined] if self.text_first else [joined, *parts], out_axis)

    def _sequence(self, tensor: torch.Tensor, axis: int, text: slice, picture: slice) -> torch.Tensor:
        parts = [_part(tensor, axis, text), _part(tensor, axis, picture)]
        return torch.cat(parts if self.text_first else parts[::-1], axis)

    def _sequence_mask(self, mask: torch.Tensor, text: slice, picture: slice) -> torch.Tensor:
        cut = self._sequence(mask, mask.ndim - 1, text, picture)
        return cut if mask.shape[-2] == 1 else self._sequence(cut, mask.ndim - 2, text, picture)

    def _rows(self, like: torch.Tensor) -> torch.Tensor | None:
        """The guided samples; None when all are."""
        return None if bool(self.guided.all()) else self.guided.nonzero().flatten().to(like.device)

    def _joined(self, positive: torch.Tensor, negative: torch.Tensor, rows: torch.Tensor | None, raw: RawCall) -> torch.Tensor:
        split = bool(raw.options.get("skip_output_reshape"))
        mine = positive if rows is None else positive[rows]
        joined = guide(_heads_last(mine, raw.heads, split), _heads_last(negative, raw.heads, split), self.strength)
        joined = joined.transpose(1, 2) if split else joined.flatten(2)
        return joined if rows is None else positive.index_copy(0, rows, joined)


def _part(tensor: torch.Tensor, axis: int, part: slice) -> torch.Tensor:
    return tensor[(slice(None),) * axis + (part,)]


def _heads_last(tensor: torch.Tensor, heads: int, split: bool) -> torch.Tensor:
    return tensor.transpose(1, 2) if split else tensor.unflatten(2, (heads, -1))


def _of_rows(mask: torch.Tensor | None, rows: torch.Tensor | None, batch: int) -> torch.Tensor | None:
    """A mask [B or 1, ..., Sq or 1, Sk] for some of the samples; one of two axes is for all."""
    return mask if mask is None or rows is None or mask.ndim < 3 or len(mask) != batch else mask[rows]


def _call(raw: RawCall, tensors: Sequence[torch.Tensor], mask: torch.Tensor | None) -> RawCall:
    q, k, v = tensors
    told = {"mask": mask} if mask is not None or "mask" in raw.options else {}
    return replace(raw, q=q, k=k, v=v, options={**raw.options, **told})
