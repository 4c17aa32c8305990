"""ComfyUI's attention calls: func(q, k, v, heads, **options), in the shapes and holders that its versions use.

Newer versions hand over q, k and v in holders (`AttentionTensorContainer`), so that a backend may free them early, and let a
layer name its own attention function (`ComfyAttention`), which counts only while nobody stands in the override slot.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from genattn.seam.plugin import AttentionCall

Attend = Callable[..., torch.Tensor]


def heads_last(tensor: torch.Tensor, heads: int, split: bool) -> torch.Tensor:
    """A tensor of ComfyUI's attention call as [B, S, H, D]; split: it comes as [B, H, S, D], else as [B, S, H D] or whole."""
    return tensor.transpose(1, 2) if split else tensor.reshape(tensor.shape[0], tensor.shape[1], heads, -1)


def call_mask(mask: torch.Tensor | None) -> torch.Tensor | None:
    """ComfyUI's mask, [Sq, Sk], [B, Sq, Sk] or [B, H, Sq, Sk], with four axes."""
    if mask is None or mask.ndim == 4:
        return mask
    return mask[None, None] if mask.ndim == 2 else mask[:, None]


def held(tensor: Any) -> torch.Tensor:
    """The tensor in a holder, which keeps it; a tensor itself."""
    found: torch.Tensor = tensor.peek() if hasattr(tensor, "peek") else tensor
    return found


def takes_holders(override: Any) -> bool:
    """Whether who stands in the slot asks for holders."""
    return getattr(override, "container_function", None) is not None


def core_attention() -> Attend | None:
    """ComfyUI's attention function when it takes holders, None otherwise."""
    module = sys.modules.get("comfy.ldm.modules.attention")
    found = getattr(module, "optimized_attention", None)
    return found if takes_holders(found) else None


def preferred_of(block: Any) -> list[Attend | None]:
    """The attention function that each layer of a block asks for, in their order; empty in older versions."""
    parts = block.modules() if hasattr(block, "modules") else ()
    return [part.function for part in parts if type(part).__name__ == "ComfyAttention"]


def agreed(functions: list[Attend | None]) -> Attend | None:
    """The one function that all ask for; None where they differ."""
    return functions[0] if functions and all(function is functions[0] for function in functions) else None


def preference(functions: list[Attend | None], place: int) -> Attend | None:
    """What the call at `place` of a block would have got; None where the layers differ and their order does not tell."""
    one = agreed(functions)
    return one if one is not None or place >= len(functions) else functions[place]


@dataclass
class RawCall:
    """One call as ComfyUI makes it.

    func: ComfyUI's own function, or the one that the layer prefers. under: whoever stood in the slot before us; it counts for
    more than a preference, as in ComfyUI.
    """

    func: Attend
    under: Attend | None
    q: Any
    k: Any
    v: Any
    heads: int
    options: dict[str, Any]

    def heads_last(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Query, key and value as [B, S, H, D]."""
        split = bool(self.options.get("skip_reshape"))
        return tuple(heads_last(held(t), self.heads, split) for t in (self.q, self.k, self.v))  # type: ignore[return-value]

    def stock(self) -> torch.Tensor:
        """What would have run without us."""
        return self._call(self.q, self.k, self.v, self.options)

    def _call(self, q: Any, k: Any, v: Any, options: dict[str, Any]) -> torch.Tensor:
        if self.under is None:
            return self.func(q, k, v, self.heads, **options)
        if hasattr(q, "peek"):
            return self.under.container_function(q, k, v, self.heads, **options)  # type: ignore[attr-defined, no-any-return]
        return self.under(self.func, q, k, v, self.heads, **options)

    def dense(self, given: AttentionCall, last: AttentionCall) -> torch.Tensor:
        """Stock attention as [B, S, H, D], on the tensors that the plugins hand on."""
        if last.query is given.query and last.key is given.key and last.value is given.value:
            out = self.stock()
            split = bool(self.options.get("skip_output_reshape"))
            return heads_last(out, self.heads, split)
        changed = [t.transpose(1, 2) for t in (last.query, last.key, last.value)]
        options = {**self.options, "skip_reshape": True, "skip_output_reshape": False}
        return heads_last(self._call(changed[0], changed[1], changed[2], options), self.heads, False)

    def as_given(self, out: torch.Tensor) -> torch.Tensor:
        """An answer [B, S, H, D] in the shape that the caller expects."""
        return out.transpose(1, 2) if self.options.get("skip_output_reshape") else out.flatten(2)
