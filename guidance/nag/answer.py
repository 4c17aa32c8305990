"""One attention call over a sequence that carries the negative text: answered for either text, then joined by the formula.

Joint attention: the image's rows are answered twice, once beside the positive text and once beside the negative one; either
text's own rows are answered beside their own. Cross-attention: the image asks either text.
"""

from collections.abc import Callable
from dataclasses import replace

import torch

from genattn.geometry.token_layout import TokenLayout
from genattn.guidance.nag.carriers import Carried
from genattn.guidance.nag.cut import pick, pick_mask
from genattn.guidance.nag.formula import Strength, Total, guide
from genattn.guidance.nag.shared import shared_answers, shared_keys
from genattn.layouts.families import family_of
from genattn.seam.context_parallel import gathered
from genattn.seam.plugin import AttentionCall, Inner
from genattn.seam.sites import layout_at

WAN_TEXT = 512  # WanAttnProcessor takes this many tokens for text, and what is before them for image tokens
Blend = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(Z+, Z-) of one call, [B, S, H, D] each, to what goes on."""


def world_of(call: AttentionCall) -> int:
    """Processes that share the heads of a call."""
    return max(1, call.site.heads // call.query.shape[2])


def total_of(call: AttentionCall) -> Total | None:
    """Sums over the processes that share the heads, None when all are here."""
    if world_of(call) == 1:
        return None
    config = getattr(call.run.model, "_parallel_config", None)
    group = config.context_parallel_config._ulysses_mesh.get_group()  # type: ignore[union-attr]

    def total(norms: torch.Tensor) -> torch.Tensor:
        summed = norms.clone()
        torch.distributed.all_reduce(summed, group=group)
        return summed

    return total


def is_carried(call: AttentionCall, carried: Carried) -> bool:
    """Whether this call's keys are the text's; other attention of the same block is not touched."""
    cut, stream = carried.cut, carried.here
    assert cut is not None
    assert stream is not None
    keys, world = call.key.shape[1], world_of(call)
    if stream.cross and carried.doubled:
        return len(call.key) == 2 * len(call.query) and keys == min(cut.length, WAN_TEXT)
    if stream.cross:
        return call.site.kind == "cross" and keys in (cut.total, cut.total * world)
    if stream.one_by_one:
        return call.site.kind == "joint" and keys == cut.total
    if stream.keys_only:
        return call.site.kind == "joint" and keys == cut.total * world and call.query.shape[1] == cut.image * world
    return call.site.kind == "joint" and keys == call.query.shape[1] == cut.total * world


def untouched(call: AttentionCall, inner: Inner) -> torch.Tensor:
    """The answer where the keys are no text; image tokens that came twice (`Carried.doubled`) are looked at once."""
    half = len(call.query)
    if len(call.key) == 2 * half:
        call = call.with_tensors(key=call.key[:half], value=call.value[:half])
    return inner(call)


def blender(
    call: AttentionCall, guided: torch.Tensor, strength: Strength, heads: torch.Tensor | None, total: Total | None
) -> Blend:
    """The formula for the samples (bool [B]) and heads (bool [H], None for all) that are guided."""

    def blend(positive: torch.Tensor, negative: torch.Tensor) -> torch.Tensor:
        answer = guide(positive, negative, strength, total)
        if heads is not None:
            here = heads[call.head_offset : call.head_offset + positive.shape[2]].to(positive.device)
            answer = torch.where(here[:, None], answer, positive)
        if bool(guided.all()):
            return answer
        rows = guided.repeat_interleave(len(positive) // len(guided))  # some models fold frames into the samples
        return torch.where(rows.to(positive.device)[:, None, None, None], answer, positive)

    return blend


def cross(call: AttentionCall, inner: Inner, carried: Carried, blend: Blend) -> torch.Tensor:
    """The image's answer, [B, S, H, D]."""
    assert carried.cut is not None
    cut, keys = carried.cut, call.key.shape[1]
    if carried.doubled:
        half = len(call.query)
        parts = [
            call.with_tensors(key=call.key[rows], value=call.value[rows]) for rows in (slice(0, half), slice(half, 2 * half))
        ]
    else:
        world = keys // cut.total
        parts = [_asking(call, places) for places in (cut.stock(world), cut.negative(world))]
    return blend(inner(parts[0]), inner(parts[1]))


def _asking(call: AttentionCall, places: torch.Tensor) -> AttentionCall:
    """The same queries on some of the keys."""
    everything = torch.arange(call.query.shape[1])
    mask = pick_mask(call.mask, everything, places, call.key.shape[1])
    return call.with_tensors(key=pick(call.key, places, 1), value=pick(call.value, places, 1), mask=mask)


def keys_only(call: AttentionCall, inner: Inner, carried: Carried, blend: Blend, share: bool) -> torch.Tensor:
    """The image's answer, [B, S, H, D], where it asks itself and either text and no text asks; `share` as in `joint`."""
    assert carried.cut is not None
    cut, world = carried.cut, world_of(call)
    both = shared_keys(call, inner, cut) if share and world == 1 else None
    if both is None:
        carried.twice.add(call.site.name)
        parts = []
        for places, layout in ((cut.stock(world), call.run.layout), (cut.negative(world), carried.layout)):
            found = _layout_of(call, layout, call.query.shape[1], len(places), world)
            parts.append(replace(_asking(call, places), layout=found))
        both = inner(parts[0]), inner(parts[1])
    return blend(*both)


def joint(call: AttentionCall, inner: Inner, carried: Carried, blend: Blend, share: bool) -> torch.Tensor:
    """The answer for image, text and negative text, [B, S, H, D], each row where it came.

    share: let the image look at itself once for both texts, where its log-sum-exp is told.
    """
    assert carried.cut is not None
    cut, world = carried.cut, world_of(call)
    stock, negative = cut.stock(world), cut.negative(world)
    both = shared_answers(call, inner, cut) if share and world == 1 else None
    if both is None:
        carried.twice.add(call.site.name)
        both = (
            inner(_part(call, stock, call.run.layout, world)),
            inner(_part(call, negative, carried.layout, world)),
        )
    above, below = both
    image, image_below = (places.to(above.device) for places in cut.image_rows(world))
    blended = blend(above.index_select(1, image), below.index_select(1, image_below))
    out = above.new_zeros(*call.query.shape[:3], above.shape[-1])
    out.index_copy_(1, stock.to(out.device), above.index_copy(1, image, blended))
    own = cut.negative_rows(world)
    out.index_copy_(1, negative[own].to(out.device), below.index_select(1, own.to(out.device)))
    return out


def _part(call: AttentionCall, places: torch.Tensor, layout: "object", world: int) -> AttentionCall:
    """The call for some of its tokens, with the layout that they have."""
    found = _layout_of(call, layout, len(places), len(places), world)
    query, key, value = (pick(tensor, places, 1) for tensor in (call.query, call.key, call.value))
    mask = pick_mask(call.mask, places, places, call.query.shape[1])
    return call.with_tensors(query=query, key=key, value=value, mask=mask, layout=found)


def _layout_of(call: AttentionCall, layout: "object", queries: int, keys: int, world: int) -> TokenLayout | None:
    whole = gathered(layout, world) if layout is not None else None  # type: ignore[arg-type]
    family = family_of(call.run.model) if call.run.model is not None else None
    return layout_at(call.site, family, replace(call.run, layout=whole), queries, keys)


def one_by_one(call: AttentionCall, inner: Inner, carried: Carried, sample: int, blend: Blend) -> torch.Tensor:
    """Mochi's call for one sample, [1, S, H, D]: only the valid tokens of either text are attended; others give zero."""
    assert carried.cut is not None
    assert carried.keeps is not None
    cut = carried.cut
    keep, own = (mask[sample].cpu() for mask in carried.keeps)
    image = torch.arange(cut.image)
    text = cut.image + keep.nonzero().flatten()
    extra = cut.length + own.nonzero().flatten()
    stock, negative = torch.cat([image, text]), torch.cat([image, extra])
    above = inner(_part(call, stock, call.run.layout, 1))
    below = inner(_part(call, negative, carried.layout, 1))
    out = above.new_zeros(*call.query.shape[:3], above.shape[-1])
    out[:, : cut.image] = blend(above[:, : cut.image], below[:, : cut.image])
    out.index_copy_(1, text.to(out.device), above[:, cut.image :])
    out.index_copy_(1, extra.to(out.device), below[:, cut.image :])
    return out
