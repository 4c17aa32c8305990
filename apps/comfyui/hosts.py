"""What ComfyUI's own models are to us: their blocks as attention sites, and the order of their tokens.

    Wan            grid                              references before it
    HunyuanVideo   grid, text                        (or text, grid: the double blocks tell)
    FLUX           text, grid, references            references after the picture (Kontext)
    SD3            text, grid                        SD3.5 medium has a second attention, over the picture alone

Nothing here imports ComfyUI: a host is recognised by its class's name and read through its attributes. Token order differs from
diffusers, which is why it is an adapter of the host and no matter of the patterns.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from genattn.errors import GenAttnError
from genattn.geometry.token_layout import Segment, TokenLayout
from genattn.layouts.site import AttentionSite, SiteKind


@dataclass(frozen=True)
class Stack:
    """A list of blocks. attribute: its name in the model. replace: its blocks in ComfyUI's `patches_replace`."""

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
    """One family of ComfyUI. diffusers: the class that holds the same weights there; head sets name it."""

    name: str
    diffusers: str
    stacks: tuple[Stack, ...]
    patch: Callable[[Any], tuple[int, ...]]
    reader: Reader
    picture_alone: bool = False

    def grid(self, model: Any, shape: Sequence[int]) -> tuple[int, ...]:
        """Tokens per axis for latents of a shape."""
        return _grid(shape, self.patch(model))

    def sites(self, model: Any) -> list[AttentionSite]:
        """The attention of every block, in execution order, depth counted over all stacks."""
        found: list[AttentionSite] = []
        depth = 0
        for stack in self.stacks:
            for layer, block in enumerate(getattr(model, stack.attribute)):
                name, heads = f"{stack.attribute}.{layer}", int(model.num_heads)
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


def host_of(model: Any) -> Host:
    """The host of a diffusion model; raises GenAttnError that lists the families when it is none of them."""
    names = [cls.__name__ for cls in type(model).__mro__]
    for cls, host in _HOSTS.items():
        if cls in names:
            return host
    served = ", ".join(host.name for host in _HOSTS.values())
    raise GenAttnError(
        f"this MODEL is a {type(model).__name__}, and GenAttn's model nodes serve {served}; "
        "leave it unpatched, or load it as a diffusers pipeline"
    )


def _grid(shape: Sequence[int], patch: Sequence[int]) -> tuple[int, ...]:
    """Tokens per axis; ComfyUI pads what does not divide."""
    return tuple(-(-n // p) for n, p in zip(shape[-len(patch) :], patch))


def _patches(model: Any) -> tuple[int, ...]:
    return tuple(model.patch_size)


def _square(model: Any) -> tuple[int, ...]:
    return (int(model.patch_size),) * 2


def _embedded(model: Any) -> tuple[int, ...]:
    return tuple(model.x_embedder.patch_size)


def _text(length: int) -> list[Segment]:
    return [Segment("text", (length,))] if length else []


def _text_beside(host: str, entry: Entry, tokens: int, others: int, exact: bool) -> int:
    """Text tokens that are left when `others` are taken away."""
    text = tokens - others
    if text < 0 or (exact and entry.text is not None and text != entry.text):
        raise GenAttnError(
            f"{host}: {tokens} tokens are not {others} of the picture and {entry.text or 0} of text; another node adds some"
        )
    return text


def _wan(model: Any, entry: Entry, tokens: int) -> TokenLayout:
    shape = list(entry.shape)
    beside = entry.extras.get("time_dim_concat")
    if beside is not None:
        shape[-3] += beside.shape[-3]
    grid = _grid(shape, _patches(model))
    before = tokens - math.prod(grid)
    segments = [Segment("grid", grid)]
    if before > 0 and entry.extras.get("reference_latent") is not None:
        segments.insert(0, Segment("reference", (before,)))
    elif before:
        raise GenAttnError(f"Wan: {tokens} tokens are not the grid {grid}; this variant adds others, whose order is not known")
    return TokenLayout(tuple(segments))


def _hunyuan(model: Any, entry: Entry, tokens: int) -> TokenLayout:
    picture = [Segment("grid", _grid(entry.shape, _patches(model)))]
    reference = entry.extras.get("ref_latent")
    if reference is not None:
        picture.insert(0, Segment("reference", _grid(reference.shape, _patches(model))))
    text = _text(_text_beside("HunyuanVideo", entry, tokens, sum(s.length for s in picture), exact=False))
    picture_first = getattr(model.double_blocks[0], "flipped_img_txt", False)
    return TokenLayout(tuple([*picture, *text] if picture_first else [*text, *picture]))


def _flux(model: Any, entry: Entry, tokens: int) -> TokenLayout:
    patch = _square(model)
    references = [Segment("reference", _grid(ref.shape, patch)) for ref in entry.extras.get("ref_latents") or ()]
    picture = [Segment("grid", _grid(entry.shape, patch)), *references]
    text = _text(_text_beside("FLUX", entry, tokens, sum(s.length for s in picture), exact=True))
    return TokenLayout((*text, *picture))


def _sd3(model: Any, entry: Entry, tokens: int) -> TokenLayout:
    grid = Segment("grid", _grid(entry.shape, _embedded(model)))
    if tokens == grid.length:
        return TokenLayout((grid,))
    text = _text(_text_beside("SD3", entry, tokens, grid.length, exact=not getattr(model, "register_length", 0)))
    return TokenLayout((*text, grid))


_JOINT = (Stack("double_blocks", "double_block", "joint"), Stack("single_blocks", "single_block", "joint"))
_HOSTS = {
    "WanModel": Host("Wan", "WanTransformer3DModel", (Stack("blocks", "double_block", "self"),), _patches, _wan),
    "HunyuanVideo": Host("HunyuanVideo", "HunyuanVideoTransformer3DModel", _JOINT, _patches, _hunyuan),
    "Flux": Host("FLUX", "FluxTransformer2DModel", _JOINT, _square, _flux),
    "MMDiT": Host(
        "SD3", "SD3Transformer2DModel", (Stack("joint_blocks", "double_block", "joint"),), _embedded, _sd3, picture_alone=True
    ),
}


def heads_last(tensor: torch.Tensor, heads: int, split: bool) -> torch.Tensor:
    """A tensor of ComfyUI's attention call as [B, S, H, D]; split: it comes as [B, H, S, D], else as [B, S, H D] or whole."""
    return tensor.transpose(1, 2) if split else tensor.reshape(tensor.shape[0], tensor.shape[1], heads, -1)


def call_mask(mask: torch.Tensor | None) -> torch.Tensor | None:
    """ComfyUI's mask, [Sq, Sk], [B, Sq, Sk] or [B, H, Sq, Sk], with four axes."""
    if mask is None or mask.ndim == 4:
        return mask
    return mask[None, None] if mask.ndim == 2 else mask[:, None]
