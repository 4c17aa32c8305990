"""The definition of block-sparse attention: eager, exact, differentiable. Every other backend is held against it.

    visible(q, k)  <=>  the tile of q lists the tile of k, and (that tile pair is full, or the element rule says yes),
                        and key_mask[b, k]
    out[q] = sum_k softmax_k(scale * <q, k>) v_k  over visible k,     lse[q] = log sum_k exp(scale * <q, k>)

Text, grid and reference tokens stand in one softmax. A query that sees nothing gets zeros and an lse of -inf. A plan with a
tail adds pseudo-keys to the sums in the place of the tiles that are not listed: see `tail.py` beside this file.

A plan with a fade lowers the logits of the tile pairs that it calls outside (`kernels/plan/fade.py`):

    logit(q, k) = factor * scale * <q, k> - penalty   if the tile of q and the tile of k are outside,   else   scale * <q, k>

and the sums above are over e^logit. A pseudo-key belongs to a key tile and is outside with it; its weight is no logit, so the
factor does not touch it: n_j e^{factor * scale * <q, k_j> - penalty}.
"""

from functools import partial

import torch

from genattn.kernels.plan.block_plan import BlockPlan
from genattn.kernels.plan.exact import exact
from genattn.kernels.plan.tail import Tail
from genattn.kernels.reference.tail import tail_keys, tail_scores

_SCORES_AT_ONCE = 1 << 26


@exact
def reference_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    plan: BlockPlan,
    *,
    scale: float | None = None,
    key_mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over the visible pairs of `plan`, computed in float32, or float64 for float64 inputs.

    query [B, Sq, H, D], key and value [B, Sk, Hk, D] with Hk a divisor of H; key_mask bool [B, Sk], False hides a key.
    Returns out [B, Sq, H, D] in the query's type and lse [B, Sq, H] (natural log, float32 or float64).
    """
    compute = torch.promote_types(query.dtype, torch.float32)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    pseudo = None if plan.tail is None else tail_keys(key, value, plan.tail, key_mask)
    if key_mask is not None:
        # a hidden key must not leak through 0 * NaN
        key = key.masked_fill(~key_mask[:, :, None, None], 0.0)
        value = value.masked_fill(~key_mask[:, :, None, None], 0.0)
    group = query.shape[2] // key.shape[2]
    keys = key.to(compute).repeat_interleave(group, dim=2).permute(0, 2, 3, 1)
    values = value.to(compute).repeat_interleave(group, dim=2).transpose(1, 2)
    if pseudo is not None:
        values = torch.cat([values, pseudo.value.repeat_interleave(group, 2).transpose(1, 2)], 2)
    batch, seqlen, heads, _ = query.shape
    rows = max(1, _SCORES_AT_ONCE // (batch * heads * plan.seqlen_k))
    outs, lses = [], []
    for index in torch.arange(seqlen, device=query.device).split(rows):
        rows_of_query = query[:, index].to(compute)
        scores = lowered(rows_of_query.transpose(1, 2) @ keys * scale, plan, index)
        visible = visible_rows(plan, index)[None]
        if key_mask is not None:
            visible = visible & key_mask[:, None, None, :]
        if pseudo is not None:
            lower = partial(lowered, plan=plan, query_index=index, tail=plan.tail)
            scores = torch.cat([scores, tail_scores(rows_of_query, pseudo, scale, lower)], -1)
            visible = _with_tail(visible, pseudo_rows(plan, index)[None], pseudo.weights_of(heads))
        out, lse = _masked_softmax(scores, visible, values)
        outs.append(out.transpose(1, 2))
        lses.append(lse.transpose(1, 2))
    return torch.cat(outs, 1).to(query.dtype), torch.cat(lses, 1)


def visible_rows(plan: BlockPlan, query_index: torch.Tensor) -> torch.Tensor:
    """Bool [N, len(query_index), Sk]: which keys the given queries see; N = 1, or heads where lists or rule differ."""
    device = query_index.device
    plan = plan.to(device)
    tile_of_query = _tile_of_token(plan.query_tiles, plan.seqlen_q)[query_index]
    tile_of_key = _tile_of_token(plan.key_tiles, plan.seqlen_k)
    state = tile_states(plan)[:, tile_of_query][:, :, tile_of_key]
    state = torch.where((tile_of_key >= 0) & (tile_of_query >= 0)[:, None], state, 0)
    visible = state == 2
    if plan.rule is not None:
        seen = plan.rule(query_index[:, None], torch.arange(plan.seqlen_k, device=device)[None, :])
        visible = visible | ((state == 1) & seen)
    return visible


def lowered(logits: torch.Tensor, plan: BlockPlan, query_index: torch.Tensor, tail: Tail | None = None) -> torch.Tensor:
    """Logits [..., len(query_index), Sk] of the given queries under the plan's fade; [..., P] of the pseudo-keys of `tail`."""
    if plan.fade is None:
        return logits
    plan = plan.to(query_index.device)
    fade = plan.fade
    assert fade is not None
    tile = _tile_of_token(plan.query_tiles, plan.seqlen_q)[query_index]
    if tail is None:
        keys = _tile_of_token(plan.key_tiles, plan.seqlen_k)
    else:
        keys = torch.arange(tail.pseudo_keys, device=tile.device) // tail.parts
    # what stands in no tile is not visible
    outside = fade.outside(tile.clamp_min(0)[:, None], keys.clamp_min(0)[None])
    return torch.where(outside, logits * fade.factor - fade.penalty, logits)


def pseudo_rows(plan: BlockPlan, query_index: torch.Tensor) -> torch.Tensor:
    """Bool [N, len(query_index), P]: which pseudo-keys of the plan's tail the given queries see."""
    assert plan.tail is not None
    plan = plan.to(query_index.device)
    tile = _tile_of_token(plan.query_tiles, plan.seqlen_q)[query_index]
    return plan.tail.stands_in()[:, tile.clamp_min(0)] & (tile >= 0)[:, None]  # type: ignore[union-attr]


def _with_tail(visible: torch.Tensor, stood_in: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Bool [B, N, rows, Sk + P]."""
    stood_in = stood_in & torch.isfinite(weights)[:, :, None]
    shape = torch.broadcast_shapes(visible.shape[:3], stood_in.shape[:3])
    return torch.cat([visible.expand(*shape, -1), stood_in.expand(*shape, -1)], -1)


_ENTRIES_AT_ONCE = 1 << 18


def visible_mask(plan: BlockPlan) -> torch.Tensor:
    """Bool [N, Sq, Sk]: the whole mask; for short sequences."""
    # some rows at a time: the rule works with eight bytes an entry
    at_once = max(1, _ENTRIES_AT_ONCE // plan.seqlen_k)
    first, *rest = torch.arange(plan.seqlen_q, device=plan.device).split(at_once)
    top = visible_rows(plan, first)
    mask = top.new_zeros(top.shape[0], plan.seqlen_q, top.shape[2])
    mask[:, first] = top
    for some in rest:
        mask[:, some] = visible_rows(plan, some)
    return mask


def _masked_softmax(scores: torch.Tensor, visible: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scores = scores.masked_fill(~visible, float("-inf"))
    empty = ~visible.any(-1, keepdim=True)
    # a row of -inf would give NaN, in the softmax and in its gradient
    probs = scores.masked_fill(empty, 0.0).softmax(-1).masked_fill(~visible, 0.0)
    lse = scores.masked_fill(empty, 0.0).logsumexp(-1).masked_fill(empty[..., 0], float("-inf"))
    return probs @ values, lse


def _tile_of_token(tiles: torch.Tensor, seqlen: int) -> torch.Tensor:
    """Int64 [S]: the tile in which each token stands, -1 for none."""
    tile = torch.full((seqlen,), -1, dtype=torch.long, device=tiles.device)
    owner = torch.arange(tiles.shape[0], device=tiles.device)[:, None].expand_as(tiles)
    used = tiles >= 0
    tile[tiles[used].long()] = owner[used]
    return tile


def tile_states(plan: BlockPlan) -> torch.Tensor:
    """Int8 [N, NQ, NK]: 0 not visited, 1 partial, 2 full."""
    heads, tiles = plan.num_full.shape
    states = torch.zeros(heads * tiles, plan.key_tiles.shape[0], dtype=torch.int8, device=plan.device)
    row, partial = plan.entries
    states[row, plan.columns.long()] = torch.where(partial, 1, 2).to(torch.int8)
    return states.view(heads, tiles, -1)
