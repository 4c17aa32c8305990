"""The blocks of a model while two texts go through it, as entries of ComfyUI's `patches_replace`.

In joint attention the second text has to enter the blocks as the model would have let it in: embedded, refined, turned by its
own places. So the model is run once with the second text and blocks that only look (`Look`), which costs what stands around the
blocks; then the real run gets both texts at its first block (`TextBlock`).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from genattn.apps.comfyui.patching.two_texts import TwoTexts
from genattn.errors import GenAttnError

Replacement = Callable[[dict[str, Any], dict[str, Any]], dict[str, Any]]
STACKS = {
    "blocks": "double_block",
    "transformer_blocks": "double_block",
    "joint_blocks": "double_block",
    "double_blocks": "double_block",
    "single_blocks": "single_block",
}


def places(model: Any) -> Iterator[tuple[str, int]]:
    """Where a model's blocks stand in `patches_replace["dit"]`."""
    for attribute, name in STACKS.items():
        for layer in range(len(getattr(model, attribute, ()))):
            yield name, layer


@dataclass
class Look:
    """A block that hands on what it gets, and keeps what the first one saw of the text."""

    text: torch.Tensor | None = None
    places: torch.Tensor | None = None
    mask: torch.Tensor | None = None

    @torch.compiler.disable(recursive=False)
    def __call__(self, args: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
        """ComfyUI's replacement of a block."""
        if self.text is None:
            self.text, self.places = args["txt"], args.get("pe")
            self.mask = args.get("attn_mask", args.get("attention_mask"))
        return {"img": args["img"], "txt": args.get("txt")}


class TextBlock:
    """A block with both texts. seen: the second text before the blocks, None where it came in with the first.

    previous: the replacement that was there.
    """

    def __init__(self, texts: TwoTexts, seen: Look | None, previous: Replacement | None) -> None:
        self.texts, self.seen, self.previous = texts, seen, previous

    @torch.compiler.disable(recursive=False)
    def __call__(self, args: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
        """ComfyUI's replacement of a block; raises GenAttnError when its attention over the texts did not come by."""
        ran: list[int] = []

        def original(given: dict[str, Any]) -> dict[str, Any]:
            ran.append(1)
            return extra["original_block"](given)  # type: ignore[no-any-return]

        before = self.texts.calls
        given = args if self.seen is None else self._with_both(args, self.seen)
        out = original(given) if self.previous is None else self.previous(given, {**extra, "original_block": original})
        if ran and self.texts.calls == before:
            raise GenAttnError(
                "NAG must see the attention over the text, and another node answered it: put the NAG node after that node, or "
                "leave one of them out"
            )
        return out

    def _with_both(self, args: dict[str, Any], seen: Look) -> dict[str, Any]:
        texts = self.texts
        if not texts.picture:
            assert seen.text is not None
            texts.own, texts.other, texts.picture = args["txt"].shape[1], seen.text.shape[1], args["img"].shape[1]
            texts.mask = seen.mask
            args = {**args, "txt": torch.cat([args["txt"], seen.text.to(args["txt"])], 1)}
        if args.get("pe") is not None and seen.places is not None:
            args = {**args, "pe": self._places(args["pe"], seen.places)}
        return args

    def _places(self, pe: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """Rotary places of both texts and the picture, on the axis that counts tokens."""
        texts = self.texts
        axis = next(axis for axis in (1, 2) if pe.shape[axis] == texts.own + texts.picture)
        start = 0 if texts.text_first else texts.picture
        cut = start + texts.own
        parts = [pe.narrow(axis, 0, cut), other.narrow(axis, start, texts.other)]
        return torch.cat([*parts, pe.narrow(axis, cut, pe.shape[axis] - cut)], axis)
