"""flex_attention from the same plan: the peer to measure against, and a route on devices where it compiles.

Flex knows only runs of the sequence: for other tiles the tokens are put in their order before and back after, lanes without a
token hidden. Full tiles skip the mask, partial ones look it up. Pseudo-keys of a tail are appended as more key tiles, and their
weights added to the scores. Compiled, it is a block-sparse kernel; torch on the CPU gives it no log-sum-exp and no gradient.
"""

from functools import lru_cache

import torch
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from genattn.kernels.peers.block_lists import counts_and_indices, lane_order, restored
from genattn.kernels.plan.block_plan import BlockPlan
from genattn.kernels.plan.lasting import lasting
from genattn.kernels.reference.attention import pseudo_rows, tile_states, visible_mask
from genattn.kernels.reference.tail import TailKeys, tail_keys

_MASK_TOKENS = 32_768


def why_not_flex(query: torch.Tensor, plan: BlockPlan, return_lse: bool, key_mask: bool) -> str | None:
    """The reason why flex_attention cannot serve this call, or None."""
    if key_mask:
        return "a key mask would need a new compiled mask for every call; use another impl"
    if query.device.type == "cpu" and return_lse:
        return "flex_attention on the CPU returns no log-sum-exp"
    if query.device.type == "cpu" and torch.is_grad_enabled() and query.requires_grad:
        return "flex_attention on the CPU has no backward"
    if (plan.rule is not None or _orders(plan) is not None) and max(plan.seqlen_q, plan.seqlen_k) > _MASK_TOKENS:
        return f"its mask table must stay under {_MASK_TOKENS} tokens, got {plan.seqlen_k}"
    return None


def flex_block_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, plan: BlockPlan, *, scale: float | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(out [B, Sq, H, D], lse [B, Sq, H] or None on the CPU); compiles on the first call for a shape."""
    mask, orders = block_mask(plan), _orders(plan)
    pseudo = None if plan.tail is None else tail_keys(key, value, plan.tail)
    if orders is not None:
        query, key, value = (x[:, order.clamp_min(0)] for x, order in zip((query, key, value), (orders[0], *2 * orders[1:])))
    if pseudo is not None:
        more = -pseudo.key.shape[1] % plan.block_k
        key, value = (
            torch.cat([x, torch.nn.functional.pad(tail, (0, 0, 0, 0, 0, more)).to(x.dtype)], 1)
            for x, tail in ((key, pseudo.key), (value, pseudo.value))
        )
    on_cpu = query.device.type == "cpu"
    result = _compiled()(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        score_mod=_score_mod(plan, pseudo, query.shape[2]),
        block_mask=mask,
        scale=scale,
        enable_gqa=query.shape[2] != key.shape[2],
        return_lse=not on_cpu,
    )
    out, lse = (result, None) if on_cpu else result
    return _in_sequence(out.transpose(1, 2), plan), None if lse is None else _in_sequence(lse.transpose(1, 2), plan)


@lasting
def _orders(plan: BlockPlan) -> tuple[torch.Tensor, torch.Tensor] | None:
    """(queries, keys) in the order of the tiles, int64, -1 in unused lanes; None where they are the sequence as it is."""
    if plan.tail is not None:  # pseudo-keys follow the lanes of all tiles
        return plan.query_tiles.flatten().long(), plan.key_tiles.flatten().long()
    order = lane_order(plan)
    return None if order is None else (order.queries, order.keys)


def _in_sequence(answer: torch.Tensor, plan: BlockPlan) -> torch.Tensor:
    """Answers [B, lanes, ...] in the order of the tiles put back; every token stands in one query tile."""
    orders = _orders(plan)
    return restored(answer, None if orders is None else orders[0], plan.seqlen_q)


@lru_cache(maxsize=1)
def _compiled():  # type: ignore[no-untyped-def]
    return torch.compile(flex_attention, dynamic=False)


@lasting
def block_mask(plan: BlockPlan) -> BlockMask:
    """The BlockMask of `plan`, over the lanes of its tiles where these are no runs of the sequence; kept in the plan."""
    if "flex" not in plan.cache:
        states, orders = tile_states(plan)[None], _orders(plan)
        if orders is not None:
            # flex would let a full tile's unused lanes be seen
            states = states.clamp_max(torch.where((plan.key_tiles < 0).any(1), 1, 2).to(states.dtype))
        if plan.tail is not None:
            seen = plan.tail.stands_in()
            groups = torch.nn.functional.pad(seen, (0, -seen.shape[-1] % plan.block_k)).unflatten(-1, (-1, plan.block_k))
            states = torch.cat([states, groups.any(-1)[None].to(states.dtype)], -1)
        partial, full = (counts_and_indices(states[0] == kind) for kind in (1, 2))
        plan.cache["flex"] = BlockMask.from_kv_blocks(
            *partial,
            *full,
            BLOCK_SIZE=(plan.block_q, plan.block_k),
            mask_mod=_mask_mod(plan, orders),
            seq_lengths=(plan.seqlen_q, plan.seqlen_k) if orders is None else (len(orders[0]), states.shape[-1] * plan.block_k),
        )
    return plan.cache["flex"]  # type: ignore[return-value]


def _mask_mod(plan: BlockPlan, orders: tuple[torch.Tensor, torch.Tensor] | None):  # type: ignore[no-untyped-def]
    if plan.rule is None and orders is None:
        return None
    table = visible_mask(plan)
    if orders is not None:
        table = table[:, orders[0].clamp_min(0)][:, :, orders[1].clamp_min(0)] & (orders[1] >= 0)
    if plan.tail is not None and orders is not None:
        seen = pseudo_rows(plan, orders[0].clamp_min(0))
        seen = torch.nn.functional.pad(seen, (0, -seen.shape[-1] % plan.block_k))
        heads = max(len(table), len(seen))
        table = torch.cat([table.expand(heads, -1, -1), seen.expand(heads, -1, -1)], -1)
    heads = table.shape[0]

    def visible(batch, head, query_index, key_index):  # type: ignore[no-untyped-def]
        return table[head if heads > 1 else 0, query_index, key_index]

    return visible


def _score_mod(plan: BlockPlan, pseudo: TailKeys | None, heads: int):  # type: ignore[no-untyped-def]
    """What becomes of a score, or None: lowered where the tiles are outside, weighed where the key is a pseudo-key."""
    weighed = None if pseudo is None else _weigh(plan, pseudo, heads)
    if plan.fade is None:
        return weighed
    tile_of_key = torch.arange(len(plan.key_tiles), device=plan.device).repeat_interleave(plan.block_k)
    if plan.tail is not None:
        tile = torch.arange(plan.tail.pseudo_keys, device=plan.device) // plan.tail.parts
        tile_of_key = torch.cat([tile_of_key, torch.nn.functional.pad(tile, (0, -len(tile) % plan.block_k))])
    (low, high), block, factor, penalty = plan.fade.window.unbind(1), plan.block_q, plan.fade.factor, plan.fade.penalty
    first, last = (ends[tile_of_key] for ends in plan.fade.span.unbind(1))

    def faded(score, batch, head, query_index, key_index):  # type: ignore[no-untyped-def]
        # places are lanes of tiles, or runs of the sequence: a tile is a run of places either way
        tile = query_index // block
        outside = (last[key_index] < low[tile]) | (first[key_index] > high[tile])
        score = torch.where(outside, score * factor - penalty, score)
        return score if weighed is None else weighed(score, batch, head, query_index, key_index)

    return faded


def _weigh(plan: BlockPlan, pseudo: TailKeys, heads: int):  # type: ignore[no-untyped-def]
    """Adds the log of the number of keys that a pseudo-key stands for; they follow the lanes of all key tiles."""
    first = plan.key_tiles.numel()
    counts, more = pseudo.weights_of(heads).nan_to_num(neginf=-1e30), -pseudo.key.shape[1] % plan.block_k
    weights = torch.nn.functional.pad(counts, (first, more))
    by_head = weights.shape[1] > 1

    def weighed(score, batch, head, query_index, key_index):  # type: ignore[no-untyped-def]
        return score + weights[batch, head if by_head else 0, key_index]

    return weighed
