"""The attention modules of a model: where each stands in the order of execution, and which tokens attend to which.

A site is every module with a `processor`. Its block is the entry of a block list (`blocks.3`) that it lies in; blocks are
numbered through over all lists in execution order, whatever else lies between.
"""

import functools
import re
import weakref
from typing import Any

import torch
from torch import nn

from genattn.errors import GenAttnError
from genattn.geometry.token_layout import SegmentKind, TokenLayout
from genattn.layouts.family import Family
from genattn.layouts.site import AttentionSite, SiteKind
from genattn.seam.cores import StockCore
from genattn.seam.plugin import AttentionCall, Run

_COMPONENTS = (
    "transformer",
    "transformer_2",
    "transformer_3",
    "transformer_ref",
    "unet",
    "unet_2",
    "denoiser",
    "prior",
    "diffusion_decoder",
)
_UNREACHABLE = {
    "AttnProcessor": "multiplies by torch.baddbmm; use AttnProcessor2_0 (drop set_default_attn_processor)",
    "AttnAddedKVProcessor": "multiplies by torch.baddbmm; use AttnAddedKVProcessor2_0",
    "XFormersAttnProcessor": "calls xformers itself; use set_attention_backend('xformers') or no xformers",
    "XFormersAttnAddedKVProcessor": "calls xformers itself; use AttnAddedKVProcessor2_0",
    "SlicedAttnProcessor": "slices its own scores; call disable_attention_slicing()",
    "SlicedAttnAddedKVProcessor": "slices its own scores; call disable_attention_slicing()",
    "IPAdapterAttnProcessor": "multiplies by torch.baddbmm; use IPAdapterAttnProcessor2_0",
    "CustomDiffusionAttnProcessor": "multiplies by torch.baddbmm; use CustomDiffusionAttnProcessor2_0",
    "SanaLinearAttnProcessor2_0": "is linear attention: there is no score matrix to make sparse or to edit",
    "SanaLinearAttnProcessor3_0": "is linear attention: there is no score matrix to make sparse or to edit",
    "SanaMultiscaleAttnProcessor2_0": "is linear attention: there is no score matrix to make sparse or to edit",
    "PAGIdentitySanaLinearAttnProcessor2_0": "is linear attention: there is no score matrix to make sparse or to edit",
    "PAGCFGSanaLinearAttnProcessor2_0": "is linear attention: there is no score matrix to make sparse or to edit",
}
_HEADS = ("heads", "num_heads", "num_attention_heads", "n_heads")
_SECTION = {"down_blocks": 0, "mid_block": 1, "up_blocks": 2}
_INSIDE = {"attentions": 0, "motion_modules": 1, "temp_attentions": 1}
# classes that hold a model as their only child, by the child's name; looked up by name, since most need not be installed
_HELD_AS = {
    "OptimizedModule": "_orig_mod",
    "DistributedDataParallel": "module",
    "DataParallel": "module",
    "DeepSpeedEngine": "module",
    "FullyShardedDataParallel": "_fsdp_wrapped_module",
    "CheckpointWrapper": "_checkpoint_wrapped_module",
}
# what activation checkpointing, FSDP's first kind and torch.compile put around a module that stays where it was
_WRAPPERS = re.compile(r"(?:^|\.)(?:_checkpoint_wrapped_module|_fsdp_wrapped_module|_orig_mod)(?=\.|$)")


def find_sites(model: nn.Module, component: str, family: Family | None) -> list[tuple[nn.Module, AttentionSite]]:
    """(module, site) of every attention module, in the order of execution as far as the family tells it."""
    found = [(_WRAPPERS.sub("", name), module) for name, module in model.named_modules() if _is_attention(module)]
    stacks = family.stacks if family else _guess_stacks(model)
    blocks = {name: _block_of(name, stacks) for name, _ in found}
    order = sorted({block for block in blocks.values() if block is not None}, key=lambda block: _rank(block, stacks))
    depths = {block: depth for depth, block in enumerate(order)}
    sites = []
    for name, module in found:
        block = blocks[name]
        kind = _kind_of(name, block, family)
        stack, layer = block.rsplit(".", 1) if block else (name.rsplit(".", 1)[0], "0")
        depth = depths[block] if block else -1
        if family is not None and family.side_by_side and block:
            depth = int(layer)
        heads = _heads_of(module)
        site = AttentionSite(name, stack, int(layer), depth, kind, heads, component, unreachable_reason(module.processor))
        sites.append((module, site))
    return sorted(sites, key=lambda pair: pair[1].depth)


def denoisers(target: Any) -> dict[str, nn.Module]:
    """The denoisers of a pipeline by component name; a bare model under "". Compiled ones unwrapped."""
    if isinstance(target, nn.Module):
        return {"": unwrapped(target)}
    if isinstance(target, type):
        made = f"{target.__name__}.from_pretrained(...)"
        raise GenAttnError(f"target must be a pipeline or a model, got the class {target.__name__}; make one first: {made}")
    components = dict(getattr(target, "components", None) or {})
    found = {name: unwrapped(components[name]) for name in _COMPONENTS if isinstance(components.get(name), nn.Module)}
    if not found:
        raise GenAttnError(
            f"target must be a pipeline with one of {', '.join(_COMPONENTS)}, or a model, got {type(target).__name__} "
            f"with components {sorted(components) or 'none'}"
        )
    try:
        weakref.ref(target)
    except TypeError:
        told = f"target must be a pipeline or a model that can be referred to weakly, got {type(target).__name__}"
        raise GenAttnError(f"{told}; give its model, or add __weakref__ to the class") from None
    return found


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside the wrappers of torch.compile, data parallelism, FSDP's first kind, DeepSpeed and PEFT."""
    while True:
        names = {base.__name__ for base in type(model).__mro__}
        held = next((_HELD_AS[name] for name in _HELD_AS if name in names), None)
        if "PeftModel" in names:  # the adapters lie in the layers of the model itself
            model = model.get_base_model()  # type: ignore[operator]
        elif held is not None and model._modules.get(held) is not None:
            model = model._modules[held]  # type: ignore[assignment]
        else:
            return model


def head_dims(found: list[tuple[nn.Module, AttentionSite]]) -> dict[str, int]:
    """Channels of one head, by site name, where the module tells the width of its queries."""
    dims = {}
    for module, site in found:
        width = getattr(module, "inner_dim", None) or getattr(getattr(module, "to_q", None), "out_features", None)
        if width and site.heads:
            dims[site.name] = int(width) // site.heads
    return dims


def _heads_of(module: nn.Module) -> int:
    """Query heads, under any of the names that diffusers' attention modules use."""
    return next((int(n) for n in (getattr(module, name, None) for name in _HEADS) if n), 0)


def unreachable_reason(processor: object) -> str:
    """Why the seam never sees this processor's attention; empty when it does."""
    name = processor.__class__.__name__
    return f"{name} {_UNREACHABLE[name]}" if name in _UNREACHABLE else ""


def _is_attention(module: nn.Module) -> bool:
    return callable(getattr(module, "processor", None)) and "processor" in {*module.__dict__, *module._modules}


def _guess_stacks(model: nn.Module) -> tuple[str, ...]:
    return tuple(name for name, child in model.named_children() if isinstance(child, nn.ModuleList) and "refiner" not in name)


def _block_of(name: str, stacks: tuple[str, ...]) -> str | None:
    """ "blocks.3" for "blocks.3.attn1"; the transformer block itself in UNets."""
    for stack in stacks:
        found = re.match(rf"{re.escape(stack)}\.\d+(?=\.)", name)
        if found and stack not in _SECTION:
            return found.group()
    if name.startswith(tuple(_SECTION)):
        found = re.match(r".*transformer_blocks\.\d+", name)
        return found.group() if found else None
    return None


def _rank(block: str, stacks: tuple[str, ...]) -> tuple[int, ...]:
    """Sort key: the stack's place, then the numbers; in UNets motion modules come behind the attention of the same layer."""
    parts = block.split(".")
    if parts[0] in _SECTION:
        numbers = [int(p) for p in parts if p.isdigit()]
        inside = next((_INSIDE[p] for p in parts if p in _INSIDE), 0)
        outer = numbers[0] if parts[0] != "mid_block" else 0
        return (_SECTION[parts[0]], outer, numbers[-2] if len(numbers) > 1 else 0, inside, numbers[-1])
    stack, layer = block.rsplit(".", 1)
    return (stacks.index(stack), int(layer))


def _kind_of(name: str, block: str | None, family: Family | None) -> SiteKind:
    if block is None:
        return "refiner"
    for ending, kind in family.kinds if family else (("attn2", "cross"), ("cross_attn", "cross")):
        if re.search(rf"(^|\.){ending}$", name):
            return kind  # type: ignore[return-value]
    return "self"


def layout_at(site: AttentionSite, family: Family | None, run: Run, queries: int, keys: int) -> TokenLayout | None:
    """The layout of one call: the run's own where its length fits, the grid alone, or what the family says of this site."""
    whole = run.layout
    if whole is None or queries != keys:
        return None
    if family is not None and family.queries:  # other calls at such a site are over other tokens, whatever their number
        return whole if whole.seqlen == queries else None
    if family is not None and family.site_layout is not None:
        return family.site_layout(site.kind, queries, whole)
    if whole.seqlen == queries:
        return whole
    alone = _grid_alone(whole)
    if alone is not None and alone.seqlen == queries:
        return alone
    return _with_other_text(whole, queries) if family is not None and family.text_varies else None


def asking_layout(site: AttentionSite, family: Family | None, run: Run, queries: int, keys: int) -> TokenLayout | None:
    """The run's layout where only some of its segments ask: `keys` are the whole sequence, `queries` those segments."""
    whole = run.layout
    if whole is None or family is None or not family.queries or site.kind not in ("self", "joint"):
        return None
    asking = sum(s.length for s in whole.segments if s.kind in family.queries)
    return whole if queries < keys == whole.seqlen and queries == asking else None


def spread_queries(query: torch.Tensor, whole: TokenLayout, kinds: tuple[str, ...]) -> torch.Tensor:
    """Queries [B, Sq, H, D] of the segments of these kinds at their places in the sequence [B, S, H, D], zeros elsewhere."""
    parts, at = [], 0
    for segment in whole.segments:
        if segment.kind in kinds:
            parts.append(query[:, at : at + segment.length])
            at += segment.length
        else:
            parts.append(query.new_zeros(query.shape[0], segment.length, *query.shape[2:]))
    return torch.cat(parts, dim=1)


def gather_queries(whole_rows: torch.Tensor, whole: TokenLayout, kinds: tuple[str, ...]) -> torch.Tensor:
    """The inverse of `spread_queries`: rows [B, S, H, D] of the whole sequence to those of the segments that ask."""
    pieces = zip(whole.offsets, whole.segments)
    return torch.cat([whole_rows[:, at : at + s.length] for at, s in pieces if s.kind in kinds], dim=1)


class TheirRows:
    """Stock code for the rows of a sequence that asked, at their places among all rows."""

    def __init__(self, core: StockCore, whole: TokenLayout, kinds: tuple[SegmentKind, ...]) -> None:
        self.core, self.whole, self.kinds = core, whole, kinds

    def answer(self, call: AttentionCall) -> torch.Tensor:
        """See `StockCore.answer`; no log-sum-exp is told, for rows that nobody asked for have none."""
        rows = gather_queries(call.query, self.whole, self.kinds)
        answer = self.core(rows, call.key, call.value, call.mask, call.scale, call.is_causal, call.enable_gqa)
        return spread_queries(answer, self.whole, self.kinds)


@functools.lru_cache(maxsize=64)
def _grid_alone(whole: TokenLayout) -> TokenLayout | None:
    parts = tuple(s for s in whole.segments if s.kind == "grid")
    return TokenLayout(parts) if parts else None


@functools.lru_cache(maxsize=64)
def _with_other_text(whole: TokenLayout, length: int) -> TokenLayout | None:
    """`whole` with its one text segment cut so that the sequence has `length` tokens."""
    texts = [s for s in whole.segments if s.kind == "text"]
    rest = length - (whole.seqlen - sum(s.length for s in texts))
    if len(texts) != 1 or not 0 <= rest <= texts[0].length:
        return None
    cut = [s if s.kind != "text" else type(s)("text", (rest,)) for s in whole.segments if s.kind != "text" or rest]
    return TokenLayout(tuple(cut))
