"""Blocks that carry the negative text along: what goes in is made longer, what comes out is made short again.

Around a stock block stands a `Carrier`. It puts the negative text behind the positive one in the block's arguments, says
where it stands (`Carried`), lets the block run, and takes it out of the results. The model's own code between the blocks
never sees it. What the negative text is at the first block, its masks and its rotary factors come from the model itself:
`Passer`s stand for all blocks while the model is run with the negative text, so that only its embedders work.
"""

import contextlib
import inspect
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from genattn.errors import GenAttnError
from genattn.geometry.token_layout import TokenLayout
from genattn.guidance.nag.cut import Cut
from genattn.guidance.nag.streams import Stream, TextWay
from genattn.guidance.passes.block_swap import Place, Stand, real_block
from genattn.seam.denoiser import current_run
from genattn.seam.plugin import Run

Inputs = Mapping[str, Any]


@dataclass
class Carried:
    """What one forward of a denoiser carries.

    Attributes:
        way: the text's way through this denoiser.
        guided: bool [B], the samples that are guided.
        theirs: per block the arguments that the negative text would have got.
        inputs: the denoiser's own inputs by name.
        fresh: tokens at the text's end that every block gets anew.
        doubled: whether the negative text comes as further samples instead of further tokens (Wan with image tokens).
        layout: tokens of the negative's sequence, None when not known.
        image: tokens of the image in a merged sequence, where the inputs have to tell.
        text: tokens of the positive text, once a block has told.
        stream: the negative text as the last block gave it.
        cut, here: places in the sequence of the block that runs, and its stream.
        keeps: which tokens of either text are valid, bool [B, T] each, where samples go one by one.
        hits: attention calls guided.
        twice: sites at which the image had to be asked for both texts.
        calls: attention calls so far, by site, where samples go one by one.
    """

    way: TextWay
    guided: torch.Tensor
    theirs: dict[Place, dict[str, Any]]
    inputs: Inputs
    fresh: int = 0
    doubled: bool = False
    layout: TokenLayout | None = None
    image: int | None = None
    text: int | None = None
    stream: torch.Tensor | None = None
    cut: Cut | None = None
    here: Stream | None = None
    keeps: tuple[torch.Tensor, torch.Tensor] | None = None
    hits: int = 0
    twice: set[str] = field(default_factory=set)
    calls: dict[str, int] = field(default_factory=dict)


class _Here(threading.local):
    def __init__(self) -> None:
        self.carried: Carried | None = None


HERE = _Here()


@contextlib.contextmanager
def carrying(carried: Carried) -> Iterator[None]:
    """The attention calls of this thread belong to blocks that carry the negative text."""
    before = HERE.carried
    HERE.carried = carried
    try:
        yield
    finally:
        HERE.carried = before


@contextlib.contextmanager
def own_caches(run: Run, always: bool) -> Iterator[None]:
    """Block caches keep states of another length while the negative text is carried, where it is not at every step."""
    if always or not getattr(run.model, "is_cache_enabled", False):
        yield
        return
    with run.extra_pass("carried") as extra, current_run(replace(extra, extra=run.extra, pass_name=run.pass_name)):
        yield


def by_name(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """A block's arguments by name; what was not given has its default."""
    bound = inspect.signature(type(real_block(block)).forward).bind(None, *args, **kwargs)
    bound.apply_defaults()
    return dict(list(bound.arguments.items())[1:])


class Passer(Stand):
    """Hands its inputs on as results and remembers all arguments."""

    def __init__(self, block: nn.Module, gives: tuple[str, ...] | str) -> None:
        super().__init__(block)
        self.gives = gives
        self.__dict__["seen"] = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The arguments that the block's results would replace."""
        given = by_name(self.__dict__["block"], args, kwargs)
        self.__dict__["seen"] = given
        return given[self.gives] if isinstance(self.gives, str) else tuple(given[name] for name in self.gives)


class Carrier(Stand):
    """Runs the block with the negative text among its arguments."""

    def __init__(self, block: nn.Module, place: Place, stream: Stream, carried: Carried) -> None:
        super().__init__(block)
        self.__dict__.update(place=place, stream_of_block=stream, carried=carried)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the block gives for the positive text and the image; the negative text is kept for the next one."""
        block, carried = self.__dict__["block"], self.__dict__["carried"]
        stream: Stream = self.__dict__["stream_of_block"]
        if self.__dict__["place"] == (carried.way.streams[0].stack, 0):
            carried.stream = None  # another plugin's pass begins anew within the same forward
        mine = by_name(block, args, kwargs)
        theirs = carried.theirs[self.__dict__["place"]]
        if not stream.merged and mine[stream.text[0]] is None:
            return block(*args, **kwargs)
        cut = cut_of(stream, carried, mine, theirs)
        args, kwargs = _replaced(block, args, kwargs, longer(stream, carried, cut, mine, theirs))
        carried.cut, carried.here = cut, stream
        with carrying(carried):
            out = block(*args, **kwargs)
        return shorter(stream, carried, cut, out)


def cut_of(stream: Stream, carried: Carried, mine: Inputs, theirs: Inputs) -> Cut:
    """Where the negative text will stand in the attention's sequence."""
    if stream.merged:
        length, own = (values[stream.merged].shape[1] for values in (mine, theirs))
        if carried.text is None:
            assert carried.image is not None
            carried.text = length - carried.image
        more = own - (length - carried.text)
        if carried.stream is not None:
            more = carried.stream.shape[1] + carried.fresh
        return Cut(length, carried.text, more, length, stream.text_first)
    text, more = _tokens(mine[stream.text[0]]).shape[1], _tokens(theirs[stream.text[0]]).shape[1]
    if stream.cross:
        return Cut(text, text, more, text, True)
    carried.text = text
    length = text + mine["hidden_states"].shape[1]
    return Cut(length, text, more, text if stream.text_first else length, stream.text_first)


def longer(stream: Stream, carried: Carried, cut: Cut, mine: Inputs, theirs: Inputs) -> dict[str, Any]:
    """The arguments that change, by name."""
    changed = {name: extend(mine[name], theirs[name], cut) for name, extend in stream.extend.items() if name in mine}
    if stream.one_by_one:
        mask, own = mine["encoder_attention_mask"], theirs["encoder_attention_mask"]
        carried.keeps = (mask.bool(), own.bool())
        changed["encoder_attention_mask"] = torch.ones_like(changed["encoder_attention_mask"])
    if stream.merged:
        extra = _own_tokens(carried, cut, theirs[stream.merged], stream)
        changed[stream.merged] = torch.cat([mine[stream.merged], extra.to(mine[stream.merged].dtype)], 1)
        return changed
    for name in stream.text:
        changed[name] = _with_tokens(mine[name], theirs[name], carried, stream)
    return changed


def shorter(stream: Stream, carried: Carried, cut: Cut, out: Any) -> Any:
    """The stock results; the negative text is taken out and kept."""
    if stream.only_looked_at:
        return out
    if stream.merged:
        carried.stream = _kept(out[:, cut.length :], carried)
        return out[:, : cut.length]
    parts = list(out)
    place = stream.gives.index(stream.text[0])  # type: ignore[union-attr]
    if parts[place] is None:
        carried.stream = None
    else:
        carried.stream = _kept(parts[place][:, cut.text :], carried)
        parts[place] = parts[place][:, : cut.text]
    return tuple(parts)


def _kept(text: torch.Tensor, carried: Carried) -> torch.Tensor:
    return text[:, : text.shape[1] - carried.fresh] if carried.fresh else text


def _tokens(value: Any) -> torch.Tensor:
    """The text among a block's argument; Cosmos 2.5 hands in (text, image)."""
    found: torch.Tensor = value[0] if isinstance(value, tuple | list) else value
    return found


def _own_tokens(carried: Carried, cut: Cut, merged: torch.Tensor, stream: Stream) -> torch.Tensor:
    """The negative text at a block with one sequence: as the last block gave it, or as the embedders did."""
    anew = merged[:, : cut.more] if cut.text_first else merged[:, merged.shape[1] - cut.more :]
    if carried.stream is None:
        return anew
    if stream.renewed is not None:
        return stream.renewed(carried.stream, anew)
    fresh = merged[:, merged.shape[1] - carried.fresh :]
    return torch.cat([carried.stream, fresh], 1) if carried.fresh else carried.stream


def _with_tokens(mine: Any, theirs: Any, carried: Carried, stream: Stream) -> Any:
    if isinstance(mine, tuple | list):
        return type(mine)((_with_tokens(mine[0], theirs[0], carried, stream), *mine[1:]))
    own = theirs
    if not stream.only_looked_at and carried.stream is not None:
        own = torch.cat([carried.stream, theirs[:, theirs.shape[1] - carried.fresh :]], 1) if carried.fresh else carried.stream
        own = own if stream.renewed is None else stream.renewed(own, theirs)
    if carried.doubled and mine.shape[1:] != own.shape[1:]:
        raise GenAttnError(
            f"this model tells image tokens from text by its 512 tokens of text, got a negative text of {own.shape[1]} tokens "
            f"beside {mine.shape[1]}; encode both to the same length"
        )
    return torch.cat([mine, own.to(mine.dtype)], 0 if carried.doubled else 1)


def _replaced(
    block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], changed: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments with some exchanged, each given as it was, by position or by name."""
    names = list(inspect.signature(type(real_block(block)).forward).parameters)[1:]
    places = dict(zip(names, range(len(args))))
    given = tuple(changed.get(name, value) for name, value in zip(names, args))
    return given, {**kwargs, **{name: value for name, value in changed.items() if name not in places and name in kwargs}}
