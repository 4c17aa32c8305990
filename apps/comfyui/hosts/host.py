"""One family of ComfyUI's models: its blocks as attention sites, and the order of its tokens.

Nothing here imports ComfyUI: a model is read through its attributes. Token order differs from diffusers, which is why it is an
adapter of the host and no matter of the patterns.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from genattn.errors import GenAttnError
from genattn.geometry.token_layout import TokenLayout
from genattn.layouts.site import AttentionSite, SiteKind


@dataclass(frozen=True)
class Stack:
    """A list of blocks.

    attribute: its name in the model. replace: its blocks in ComfyUI's `patches_replace`; "" where ComfyUI lets nobody replace
    them and only tells `block_index`.
    """

    attribute: str
    replace: str
    kind: SiteKind


@dataclass(frozen=True)
class Entry:
    """What enters the model once. shape: of the latents [B, C, (T,) H, W]. text: context tokens, None when there are none.

    extras: the further arguments of the model, where references hide.
    """

    shape: tuple[int, ...]
    text: int | None
    extras: Mapping[str, Any]


Reader = Callable[[Any, Entry, int], TokenLayout]


@dataclass(frozen=True)
class Host:
    """One family of ComfyUI. diffusers: the class that holds the same weights there; head sets name it.

    patch: latents per token on the axes of the grid. text: whether the text stands in the sequence of the self-attention.
    """

    name: str
    diffusers: str
    stacks: tuple[Stack, ...]
    patch: Callable[[Any], tuple[int, ...]]
    reader: Reader
    picture_alone: bool = False
    text: bool = True

    def grid(self, model: Any, shape: Sequence[int]) -> tuple[int, ...]:
        """Tokens per axis for latents of a shape; an axis of one frame is left out where the family makes pictures."""
        return grid_of(shape, self.patch(model))

    @property
    def tells_index(self) -> bool:
        """Whether a running block is known by `block_index` alone."""
        return not self.stacks[0].replace

    def sites(self, model: Any) -> list[AttentionSite]:
        """The attention of every block, in execution order, depth counted over all stacks."""
        found: list[AttentionSite] = []
        depth = 0
        for stack in self.stacks:
            for layer, block in enumerate(getattr(model, stack.attribute)):
                name, heads = f"{stack.attribute}.{layer}", _heads(model, block)
                found.append(AttentionSite(name, stack.attribute, layer, depth, stack.kind, heads))
                if self.picture_alone and getattr(block.x_block, "x_block_self_attn", False):
                    found.append(AttentionSite(f"{name}.x_block.attn2", stack.attribute, layer, depth, "self", heads))
                depth += 1
        return found

    def layout(self, model: Any, entry: Entry, tokens: int) -> TokenLayout:
        """The order of `tokens` tokens of one attention call; raises GenAttnError with the reason when it is not known."""
        layout = self.reader(model, entry, tokens)
        if layout.seqlen != tokens:
            raise GenAttnError(f"{self.name}: {layout.describe()} are {layout.seqlen} tokens, the call has {tokens}")
        return layout


def bare(model: Any) -> Any:
    """A diffusion model without torch.compile around it: compile nodes put their own in its place while it runs."""
    return getattr(model, "_orig_mod", model)


def grid_of(shape: Sequence[int], patch: Sequence[int]) -> tuple[int, ...]:
    """Tokens per axis; ComfyUI pads what does not divide."""
    return tuple(-(-n // p) for n, p in zip(shape[-len(patch) :], patch))


_HEADS = ("num_heads", "n_heads", "heads", "n_local_heads")


def _heads(model: Any, block: Any) -> int:
    """Attention heads: the model tells them, or the first part of its block that does."""
    parts = [model, *(block.modules() if hasattr(block, "modules") else ())]
    return next(int(getattr(part, name)) for part in parts for name in _HEADS if isinstance(getattr(part, name, None), int))
