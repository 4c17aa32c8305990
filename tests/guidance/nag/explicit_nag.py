"""NAG done the long way, in float64: every block runs twice, once beside each text, and the formula is applied token by token.

Nothing here knows the plugin, the seam or how it carries the negative text. The arguments that a block gets for the negative
text are recorded in a whole stock forward with that text. Then, block by block: with the same image, the block runs beside
the negative text, and what its attention gives the image's rows is kept as Z-; then it runs beside the positive text, and
its attention gives Z+ joined with Z-. Each text's stream goes its own way.
"""

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from genattn.guidance.nag.formula import Strength, guide_reference

_STOCK_SDPA = F.scaled_dot_product_attention
TEXT_FIRST = {"flux", "flux-kontext", "flux2", "chroma", "qwen-image", "qwen-image-edit", "lumina2", "aura-flow"}
TEXT_FIRST |= {"cogvideox", "cogvideox-1.5", "consisid", "bria", "ovis-image", "longcat-image", "bria-fibo", "flux3"}
TEXT_FIRST |= {"cogview3-plus", "cogview4", "easyanimate", "krea2", "minimax-h3", "minimax-h3-reference"}
STACKS = ("transformer_blocks", "joint_transformer_blocks", "double_stream_blocks", "double_blocks")
STACKS += ("single_transformer_blocks", "single_stream_blocks", "layers")
# what an attention module that only looks at the text is told of it
OF_TEXT = ("encoder_hidden_states", "context", "attention_mask", "attn_mask", "prompt_rotary_emb", "image_rotary_emb")
HALVES = {"bria-fibo"}  # half of the text's channels come anew with every block


class Score:
    """The dot-product calls of the attention that runs: kept, joined with what was kept, or plain."""

    def __init__(self, strength: Strength) -> None:
        self.strength, self.mode, self.inside = strength, "plain", 0
        self.kept: list[torch.Tensor] = []
        self.image: tuple[Any, Any] = (slice(None), slice(None))
        self.skip_first = False

    def __call__(self, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):  # type: ignore
        out = _STOCK_SDPA(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        if not self.inside or self.mode == "plain":
            return out
        out = out.transpose(1, 2)  # [B, S, H, D]
        if self.mode == "keep":
            self.kept.append(out[:, self.image[1]])
        else:
            below, rows = self.kept.pop(0), self.image[0]
            out = out.clone()
            out[:, rows] = guide_reference(out[:, rows], below, self.strength)
        return out.transpose(1, 2)


class Counting(nn.Module):
    """Around an attention module: its dot products are the score's business."""

    def __init__(self, module: nn.Module, score: Score) -> None:
        super().__init__()
        self.__dict__.update(module=module, score=score)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["module"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        score = self.__dict__["score"]
        score.inside += 1
        try:
            return self.__dict__["module"](*args, **kwargs)
        finally:
            score.inside -= 1


def arguments(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    signature = inspect.signature(type(module).forward)
    named = dict(list(signature.bind(None, *args, **kwargs).arguments.items())[1:])
    for name, parameter in signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            named = {**named.pop(name, {}), **named}
    return named


class TwiceCross(nn.Module):
    """A cross-attention module that asks either text; Wan's image tokens come before the text's and are asked as ever."""

    def __init__(self, module: nn.Module, theirs: dict[str, Any], score: Score) -> None:
        super().__init__()
        self.__dict__.update(module=module, theirs=theirs, score=score)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["module"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        module, theirs, score = (self.__dict__[name] for name in ("module", "theirs", "score"))
        mine = arguments(module, args, kwargs)
        other = {**mine, **{k: v for k, v in theirs.items() if k in OF_TEXT}}
        score.inside += 1
        score.mode = "keep"
        module(**other)
        if len(score.kept) > 1 and "context" not in mine:  # the first dot product is the image tokens'; both texts share it
            score.kept = score.kept[1:]
            score.mode = "after first"
        else:
            score.mode = "join"
        try:
            return self._joined(module, mine, score)
        finally:
            score.mode, score.inside = "plain", score.inside - 1

    def _joined(self, module: nn.Module, mine: dict[str, Any], score: Score) -> Any:
        if score.mode == "join":
            return module(**mine)
        calls = [0]
        score.mode = "join"

        def sdpa(*given: Any, **named: Any) -> Any:
            calls[0] += 1
            return _STOCK_SDPA(*given, **named) if calls[0] == 1 else score(*given, **named)

        before = F.scaled_dot_product_attention
        F.scaled_dot_product_attention = sdpa
        try:
            return module(**mine)
        finally:
            F.scaled_dot_product_attention = before


class TwiceJoint(nn.Module):
    """A block that runs beside either text."""

    def __init__(self, block: nn.Module, theirs: dict[str, Any], world: "World", merged: bool) -> None:
        super().__init__()
        self.__dict__.update(block=block, theirs=theirs, world=world, merged=merged)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["block"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        block, theirs, world = (self.__dict__[name] for name in ("block", "theirs", "world"))
        mine = arguments(block, args, kwargs)
        run = world.merged if self.__dict__["merged"] else world.apart
        return run(block, mine, dict(theirs))


class World:
    """The negative text's stream, and where image and text stand."""

    def __init__(self, family: str, score: Score, fresh: int, image: int | None) -> None:
        self.text_first, self.score, self.fresh, self.image = family in TEXT_FIRST, score, fresh, image
        self.halves = family in HALVES
        self.stream: torch.Tensor | None = None

    def _rows(self, length: int) -> slice:
        assert self.image is not None
        return slice(length - self.image, length) if self.text_first else slice(0, self.image)

    def _own(self, theirs: torch.Tensor) -> torch.Tensor:
        if self.stream is None:
            return theirs
        if self.halves:
            half = theirs.shape[2] // 2
            return torch.cat([self.stream[:, :, :half], theirs[:, :, half:]], 2)
        return torch.cat([self.stream, theirs[:, theirs.shape[1] - self.fresh :]], 1) if self.fresh else self.stream

    def _keep(self, text: torch.Tensor) -> None:
        self.stream = text[:, : text.shape[1] - self.fresh]

    def _both(self, block: nn.Module, other: dict[str, Any], mine: dict[str, Any], lengths: tuple[int, int]) -> tuple[Any, Any]:
        score = self.score
        score.image = (self._rows(lengths[0]), self._rows(lengths[1]))
        score.mode, score.kept = "keep", []
        below = block(**other)
        score.mode = "join"
        above = block(**mine)
        score.mode = "plain"
        assert not score.kept
        return above, below

    def apart(self, block: nn.Module, mine: dict[str, Any], theirs: dict[str, Any]) -> Any:
        hidden, text = mine["hidden_states"], mine["encoder_hidden_states"]
        self.image = hidden.shape[1]
        own = self._own(theirs["encoder_hidden_states"])
        # the modulation is the positive's: Mochi's holds a pooled text
        other = {**theirs, "hidden_states": hidden, "encoder_hidden_states": own, **{k: mine[k] for k in mine if k == "temb"}}
        above, below = self._both(block, other, mine, (hidden.shape[1] + text.shape[1], hidden.shape[1] + own.shape[1]))
        place = next((i for i, part in enumerate(below) if part is not None and part.shape[1] == own.shape[1]), None)
        if place is not None and below[1 - place] is not None:
            self._keep(below[place])
        return above

    def merged(self, block: nn.Module, mine: dict[str, Any], theirs: dict[str, Any]) -> Any:
        name = "x" if "x" in mine else "hidden_states"
        sequence, other = mine[name], theirs[name]
        own = other[:, : other.shape[1] - self.image] if self.text_first else other[:, self.image :]
        own = self._own(own)
        image = sequence[:, self._rows(sequence.shape[1])]
        theirs[name] = torch.cat([own, image] if self.text_first else [image, own], 1)
        above, below = self._both(block, theirs, mine, (sequence.shape[1], other.shape[1]))
        self._keep(below[:, : own.shape[1]] if self.text_first else below[:, self.image :])
        return above


def recorded(model: nn.Module, modules: list[nn.Module], inputs: dict[str, Any]) -> list[Any]:
    """The arguments that each module gets in a stock forward, None for one that is not called."""
    seen: dict[int, dict[str, Any]] = {}
    hooks = []
    for module in modules:

        def note(module: nn.Module, args: Any, kwargs: Any) -> None:
            seen[id(module)] = arguments(module, args, kwargs)

        hooks.append(module.register_forward_pre_hook(note, with_kwargs=True))
    model(**inputs)
    for hook in hooks:
        hook.remove()
    return [seen.get(id(module)) for module in modules]


@contextlib.contextmanager
def replaced(model: nn.Module, names: dict[str, nn.Module]) -> Iterator[None]:
    before = {name: model.get_submodule(name) for name in names}
    try:
        for name, module in names.items():
            parent, _, leaf = name.rpartition(".")
            model.get_submodule(parent)._modules[leaf] = module
        yield
    finally:
        for name, module in before.items():
            parent, _, leaf = name.rpartition(".")
            model.get_submodule(parent)._modules[leaf] = module


def guided(
    model: nn.Module,
    mine: dict[str, Any],
    theirs: dict[str, Any],
    strength: Strength,
    family: str,
    joint: list[str],
    looking: list[str],
    fresh: int = 0,
    image: int | None = None,
) -> Any:
    """The guided forward.

    joint: names of the attention modules that text and image share. looking: of those that look at the text as it is.
    """
    score = Score(strength)
    F.scaled_dot_product_attention = score
    try:
        with torch.no_grad():
            if not joint:
                seen = recorded(model, [model.get_submodule(name) for name in looking], theirs)
                pairs = [
                    (name, args)
                    for name, args in zip(looking, seen, strict=True)
                    if args is not None and args.get("encoder_hidden_states", args.get("context")) is not None
                ]
                stand = {}
                for name, args in pairs:
                    module = model.get_submodule(name)
                    stand[name] = TwiceCross(module, args, score)
                with replaced(model, stand):
                    return model(**mine)
            stacks = [stack for stack in STACKS if hasattr(model, stack)]
            names = [f"{stack}.{i}" for stack in stacks for i in range(len(model.get_submodule(stack)))]
            seen = recorded(model, [model.get_submodule(name) for name in names], theirs)
            world = World(family, score, fresh, image)
            with replaced(model, {name: Counting(model.get_submodule(name), score) for name in joint}):
                stand = {
                    name: TwiceJoint(model.get_submodule(name), args, world, args.get("encoder_hidden_states") is None)
                    for name, args in zip(names, seen, strict=True)
                }
                with replaced(model, stand):
                    return model(**mine)
    finally:
        F.scaled_dot_product_attention = _STOCK_SDPA
