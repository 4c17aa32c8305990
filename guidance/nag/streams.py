"""How text goes through the blocks of every family: which arguments hold it, and in which order the attention sees it.

    apart     text and image are two arguments: SD3, FLUX, Qwen-Image, HunyuanVideo, CogVideoX, Mochi ...
    merged    they are one sequence: single-stream blocks of FLUX.2, Chroma, AuraFlow, HiDream; Lumina 2, Z-Image, MiniMax-H3
    keys      the image asks itself and the text, which no block changes and which never asks: PRX, Nucleus-Image
    cross     the image asks the text alone, which no block changes: Wan, LTX, PixArt, Cosmos, UNets ...

The negative text is put into the same arguments behind the positive one, so stock blocks carry it along.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from genattn.guidance.nag.cut import Cut

Extend = Callable[[Any, Any, Cut], Any]


@dataclass(frozen=True)
class Stream:
    """One list of blocks.

    Attributes:
        stack: its name in the model; "" for the model itself, where the text passes the root unchanged.
        gives: the arguments that a block's results replace, in order; a single name when it gives a bare tensor.
        text: arguments with tokens of text, [B, T, C]; empty where the blocks have none.
        merged: the argument that holds text and image in one sequence, "" where they come apart.
        text_first: whether the attention's sequence begins with the text; of no matter for cross-attention.
        cross: whether the text alone is asked.
        keys_only: whether the text stands among the keys of the image's own attention and never asks.
        extend: further arguments that follow the text's length, and how.
        one_by_one: whether every sample is attended alone, with its valid tokens only.
        images_before: whether tokens of given images may stand before the text in its argument (Wan).
        renewed: of the text as the last block gave it and as this block was handed the other text's, what goes in; None for
            the first alone.
    """

    stack: str
    gives: tuple[str, ...] | str
    text: tuple[str, ...] = ("encoder_hidden_states",)
    merged: str = ""
    text_first: bool = False
    cross: bool = False
    extend: Mapping[str, Extend] = field(default_factory=dict)
    one_by_one: bool = False
    keys_only: bool = False
    images_before: bool = False
    renewed: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None

    @property
    def only_looked_at(self) -> bool:
        """Whether no block changes the text."""
        return self.cross or self.keys_only


@dataclass(frozen=True)
class TextWay:
    """The way of the text through a denoiser.

    Attributes:
        streams: its lists of blocks, in the order of execution.
        inputs: what the denoiser is told of a text, by argument; the first holds the tokens.
        passed: lists of blocks that see no text and are left out when the negative text is prepared.
        fresh: how many tokens at the end of the text every block gets anew, read from the negative's inputs.
        image_tokens: of a merged sequence, read from the inputs, where no block before tells the length of the text.
        prepare: (model, inputs, the negative's) -> further inputs that describe the negative's own sequence.
        refuses: (model, inputs) -> why this forward cannot carry a second text; "" where it can.
    """

    streams: tuple[Stream, ...]
    inputs: tuple[str, ...] = ("encoder_hidden_states",)
    passed: Mapping[str, str] = field(default_factory=dict)
    fresh: Callable[[Mapping[str, Any]], int] = lambda inputs: 0
    image_tokens: Callable[[Any, Mapping[str, Any]], int] | None = None
    prepare: Callable[[Any, Mapping[str, Any], Mapping[str, Any]], dict[str, Any]] | None = None
    refuses: Callable[[Any, Mapping[str, Any]], str] | None = None


# ---- how an argument follows


def at_end(mine: Any, theirs: Any, cut: Cut) -> Any:
    """A mask over the text, its last axis as long as the text; None where nothing is masked."""
    if mine is None and theirs is None:
        return None
    mine, theirs = _masks(mine, theirs, cut.text, cut.more)
    return torch.cat([mine, theirs.to(mine.dtype)], -1)


def rows(axis: int) -> Extend:
    """A tensor or a tuple of tensors with one entry per token of the whole sequence along `axis`."""

    def extend(mine: Any, theirs: Any, cut: Cut) -> Any:
        if isinstance(mine, tuple | list):
            return type(mine)(extend(a, b, cut) for a, b in zip(mine, theirs, strict=True))
        if mine is None and theirs is None:
            return None
        mine, theirs = _masks(mine, theirs, cut.length, cut.image + cut.more)
        return spliced(mine, theirs, cut, axis % mine.ndim)

    return extend


def turned(mine: torch.Tensor, theirs: torch.Tensor, cut: Cut) -> torch.Tensor:
    """Rotary factors [B, S, C], complex, of models that number the image's tokens after the caption's.

    The negative caption may be of another length. Only distances count, so its tokens are moved by what its own image
    would stand apart from the one that is there.
    """
    image = cut.text if cut.text_first else 0
    own = cut.more if cut.text_first else 0
    moved = mine[:, image : image + 1] * theirs[:, own : own + 1].conj()
    return spliced(mine, theirs * moved, cut, 1)


def text_rows(axis: int) -> Extend:
    """A tensor or a tuple of tensors with one entry per token of text along `axis`."""

    def extend(mine: Any, theirs: Any, cut: Cut) -> Any:
        if isinstance(mine, tuple | list):
            return type(mine)(extend(a, b, cut) for a, b in zip(mine, theirs, strict=True))
        return None if mine is None else torch.cat([mine, theirs.to(mine.dtype)], axis)

    return extend


def inside(name: str, extend: Extend) -> Extend:
    """A dictionary of which one entry follows the text's length."""

    def extend_entry(mine: Any, theirs: Any, cut: Cut) -> Any:
        found = extend((mine or {}).get(name), (theirs or {}).get(name), cut)
        return mine if found is None else {**(mine or {}), name: found}

    return extend_entry


def text_part(mine: tuple[Any, Any], theirs: tuple[Any, Any], cut: Cut) -> tuple[Any, Any]:
    """Qwen-Image's (image, text) rotary factors."""
    return mine[0], torch.cat([mine[1], theirs[1]], 0)


def spliced(mine: torch.Tensor, theirs: torch.Tensor, cut: Cut, axis: int) -> torch.Tensor:
    """The negative's entries put in where its tokens stand."""
    start = 0 if cut.text_first else theirs.shape[axis] - cut.more
    before, after = mine.narrow(axis, 0, cut.at), mine.narrow(axis, cut.at, mine.shape[axis] - cut.at)
    return torch.cat([before, theirs.narrow(axis, start, cut.more).to(mine.dtype), after], axis)


def _masks(mine: Any, theirs: Any, tokens: int, own: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Both masks, where one of the two texts needed none."""
    some = mine if mine is not None else theirs
    missing = (*some.shape[:-1], own if mine is not None else tokens)
    # an additive mask hides nothing with 0, one of truth values or whole numbers with 1
    neutral = some.new_full(missing, not some.is_floating_point())
    return (neutral if mine is None else mine), (neutral if theirs is None else theirs)


# ---- one stream in a word


def apart(stack: str, *gives: str, text_first: bool = False, **extend: Extend) -> Stream:
    """Text and image in two arguments, joined in the attention."""
    return Stream(stack, gives, text_first=text_first, extend=extend)


def merged(stack: str, name: str = "hidden_states", text_first: bool = False, **extend: Extend) -> Stream:
    """Text and image in one sequence, the argument `name`."""
    return Stream(stack, name, text=(), merged=name, text_first=text_first, extend=extend)


def keys(stack: str, text_first: bool, **extend: Extend) -> Stream:
    """The text as further keys of the image's own attention."""
    return Stream(stack, "hidden_states", text_first=text_first, keys_only=True, extend=extend)


def cross(stack: str, *gives: str, text: tuple[str, ...] = ("encoder_hidden_states",), **extend: Extend) -> Stream:
    """Cross-attention."""
    return Stream(stack, gives if len(gives) > 1 else (gives or ("hidden_states",))[0], text=text, cross=True, extend=extend)


def wan(stack: str, *gives: str) -> Stream:
    """Cross-attention of Wan and its kin."""
    return replace(cross(stack, *gives), images_before=True)
