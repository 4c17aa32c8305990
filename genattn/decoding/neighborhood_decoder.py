"""LTX-2.5's diffusion decoder without its block mask: `genattn.apply(pipe, NeighborhoodDecoder())`.

Its blocks attend inside 3-D windows (3 x 7 x 7 to 11 x 11 x 11). Stock diffusers offers FlexAttention, whose mask takes
gigabytes before the first product, or a kernel fetched from the hub. Here the windows are a NeighborhoodPattern on the grid of
each stage; what is held beside the tensors is a few numbers per axis and the keys of the tiles in flight.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from genattn.errors import GenAttnError
from genattn.functional.planned import AnyPlan, plan_for, planned_attention
from genattn.geometry.token_layout import TokenLayout
from genattn.layouts.site import AttentionSite
from genattn.patterns.neighborhood import NeighborhoodPattern
from genattn.seam.plugin import AttentionCall, Inner, Plugin


@dataclass(frozen=True)
class GridWindow:
    """What stands in the mask's place: windows of `kernel_size` on a grid (frames, height, width)."""

    grid: tuple[int, int, int]
    kernel_size: tuple[int, int, int]
    impl: str = "halo"

    def plan(self, query: torch.Tensor, key: torch.Tensor) -> AnyPlan:
        """The plan for these tensors; kept by its settings."""
        return plan_for(query, key, NeighborhoodPattern(self.kernel_size), TokenLayout.from_grid(self.grid), self.impl)


def dispatch_attention_fn(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: GridWindow, *rest: Any, **options: Any
) -> torch.Tensor:
    """Attention under a `GridWindow`, heads-last; the queries are scaled already. The seam knows a core by this name."""
    return planned_attention(query, key, value, attn_mask.plan(query, key), impl=attn_mask.impl, scale=1.0)  # type: ignore[return-value]


class NeighborhoodProcessor:
    """A processor for `LTX2VideoVaeNeighborhoodAttention`; being none of stock's, no block mask is built for it."""

    def __init__(self, impl: str = "halo") -> None:
        self.impl = impl

    def __call__(self, attn: Any, hidden_states: torch.Tensor, block_mask: Any = None) -> torch.Tensor:
        frames, height, width = grid = hidden_states.shape[1:4]
        query, key, value = (tensor.flatten(1, 3) for tensor in attn.project_qkv(hidden_states))
        window = GridWindow((frames, height, width), tuple(attn.kernel_size), self.impl)
        out = dispatch_attention_fn(query, key, value, window, scale=1.0)
        return attn.to_out[0](out.flatten(2).unflatten(1, grid))  # type: ignore[no-any-return]


class NeighborhoodDecoder(Plugin):
    """Neighborhood attention of LTX-2.5's diffusion decoder on our kernels.

    impl: "halo" (boxes that follow the query tile, the least memory), or a backend of `genattn.attention` over fixed tiles.
    """

    def __init__(self, impl: str = "halo") -> None:
        self.impl = impl
        self._stock: dict[int, list[tuple[nn.Module, Any]]] = {}

    def attach(self, model: nn.Module, sites: Sequence[AttentionSite]) -> None:
        """Exchange the processors. Raises GenAttnError for a model without neighborhood attention."""
        modules = [model.get_submodule(site.name) for site in sites]
        found = [module for module in modules if hasattr(module, "kernel_size") and hasattr(module, "project_qkv")]
        if not found:
            raise GenAttnError(
                f"{type(model).__name__} has no neighborhood attention; "
                "NeighborhoodDecoder is for LTX2VideoDiffusionDecoderModel"
            )
        ours = NeighborhoodProcessor(self.impl)
        self._stock[id(model)] = [(module, module.processor) for module in found]
        for module in found:
            module.processor = ours  # type: ignore[assignment]

    def detach(self, model: nn.Module) -> None:
        """Put stock's processors back, except where another one has come since."""
        for module, processor in self._stock.pop(id(model), []):
            if isinstance(module.processor, NeighborhoodProcessor):
                module.processor = processor

    def wants(self, site: AttentionSite) -> bool:
        """All of the decoder."""
        return True

    def attention(self, call: AttentionCall, inner: Inner) -> torch.Tensor:
        """Write down the density; `inner` ends in `dispatch_attention_fn` above."""
        if isinstance(call.mask, GridWindow):
            call.record.ran_sparse(call.mask.plan(call.query, call.key).density)
        return inner(call)

    def describe(self) -> dict[str, Any]:
        """Windows are each site's own."""
        pattern = {"type": "NeighborhoodPattern", "window_size": "kernel_size of each site"}
        return {"plugin": type(self).__name__, "pattern": pattern, "impl": self.impl}
