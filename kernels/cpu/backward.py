"""Gradients on the CPU, eager: the groups of groups.py walked once more, probabilities recomputed from the log-sum-exp.

p = exp(scale <q, k> - lse),   ds = scale p (do v^T - <out, do> + dlse)
dq += ds k,   dk += ds^T q,   dv += p^T do

Under a tail the pseudo-keys are keys like others, and each hands its gradient on to its tokens in equal shares.
"""

import torch

from genattn.kernels.cpu.groups import Group, groups_of_plan
from genattn.kernels.plan.block_plan import BlockPlan
from genattn.kernels.plan.exact import exact
from genattn.kernels.reference.attention import pseudo_rows
from genattn.kernels.reference.keys_twice import Keys, lowered_tail_keys, with_keys_twice
from genattn.kernels.reference.tail import spread_over_tokens, tail_scores

_SCORES_AT_ONCE = 1 << 24


@exact
def grouped_backward(
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor | None,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    plan: BlockPlan,
    *,
    scale: float | None = None,
    key_mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of query, key and value, computed in float32 or wider; shapes as in `reference_attention`."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    compute = torch.promote_types(query.dtype, torch.float32)
    delta = (out.to(compute) * grad_out.to(compute)).sum(-1)
    if grad_lse is not None:
        delta = delta - grad_lse.to(compute)
    # queries that see nothing have lse -inf; +inf makes their probabilities zero
    lse = lse.to(compute).masked_fill(torch.isneginf(lse), float("inf"))
    given = with_keys_twice(plan, key, value, key_mask, compute)
    heads = [x.to(compute).transpose(1, 2) for x in (query, given.key, given.value, grad_out)]
    grads = [torch.zeros(x.shape, dtype=compute) for x in heads[:3]]
    group = query.shape[2] // key.shape[2]
    lists = groups_of_plan(given.plan)
    for head in range(query.shape[2]):
        for part in lists[head if len(lists) > 1 else 0]:
            rows = max(1, _SCORES_AT_ONCE // (query.shape[0] * part.keys.shape[1]))
            for run in range(part.queries.shape[0]):
                for first in range(0, part.queries.shape[1], rows):
                    piece = run, slice(first, first + rows)
                    _add(grads, heads, lse[..., head], delta[..., head], part, piece, head, head // group, scale, given)
    if plan.tail is not None:
        _add_tail(grads, (query, grad_out), lse, delta, given, scale)
    if plan.fade is not None:
        grads[1:] = _both_halves(grads[1], plan.fade.factor), _both_halves(grads[2])
    return tuple(g.transpose(1, 2).to(x.dtype) for g, x in zip(grads, (query, key, value)))  # type: ignore[return-value]


def _add(
    grads: list[torch.Tensor],
    inputs: list[torch.Tensor],
    lse: torch.Tensor,
    delta: torch.Tensor,
    part: Group,
    piece: tuple[int, slice],
    head: int,
    kv_head: int,
    scale: float,
    given: Keys,
) -> None:
    """Add what a piece (run, queries) of a group contributes to the gradients of one head."""
    queries, keys, key_mask = part.queries[piece], part.keys[piece[0]], given.key_mask
    query, grad = inputs[0][:, head, queries], inputs[3][:, head, queries]
    key, value = inputs[1][:, kv_head, keys], inputs[2][:, kv_head, keys]
    if key_mask is not None:
        hidden = ~key_mask[:, keys, None]
        key, value = key.masked_fill(hidden, 0.0), value.masked_fill(hidden, 0.0)
    scores = query @ key.mT * scale
    if given.penalty is not None:
        scores = scores - given.penalty[keys]
    for _, _, place in part.spans(piece[0], piece[0] + 1):
        scores[..., part.whole :].masked_fill_(~part.masks[place, piece[1]], float("-inf"))
    if key_mask is not None:
        scores = scores.masked_fill(hidden.mT, float("-inf"))
    probs = (scores - lse[:, queries, None]).exp()
    slope = probs * (grad @ value.mT - delta[:, queries, None]) * scale
    grads[0][:, head, queries] += slope @ key
    grads[1][:, kv_head].index_add_(1, keys, slope.mT @ query)
    grads[2][:, kv_head].index_add_(1, keys, probs.mT @ grad)


def _add_tail(
    grads: list[torch.Tensor],
    inputs: tuple[torch.Tensor, ...],
    lse: torch.Tensor,
    delta: torch.Tensor,
    given: Keys,
    scale: float,
) -> None:
    """Add what the pseudo-keys contribute; inputs: query and grad_out; lse and delta [B, Sq, H], grads [B, h, S, D]."""
    plan, pseudo, (query, grad_out) = given.plan, lowered_tail_keys(given), inputs
    assert plan.tail is not None
    means, grad_means = (pseudo.key, pseudo.value), (torch.zeros_like(pseudo.key), torch.zeros_like(pseudo.value))
    group, compute = query.shape[2] // pseudo.key.shape[2], pseudo.key.dtype
    keys, values = (x.repeat_interleave(group, 2).transpose(1, 2) for x in means)
    step = max(1, _SCORES_AT_ONCE // (query.shape[0] * query.shape[2] * plan.tail.pseudo_keys))
    for rows in torch.arange(plan.seqlen_q).split(step):
        queries, grad = (x[:, rows].to(compute) for x in (query, grad_out))
        scores = tail_scores(queries, pseudo, scale) - lse[:, rows].transpose(1, 2)[..., None]
        probs = scores.masked_fill(~pseudo_rows(plan, rows)[None], float("-inf")).exp()
        slope = probs * (grad.transpose(1, 2) @ values.mT - delta[:, rows].transpose(1, 2)[..., None]) * scale
        grads[0][:, :, rows] += slope @ keys
        for total, weights, vectors in zip(grad_means, (slope, probs), (queries, grad)):
            by_head = weights.mT @ vectors.transpose(1, 2)
            total += by_head.unflatten(1, (-1, group)).sum(2).transpose(1, 2)
    for total, grad_mean in zip(grads[1:], grad_means):
        total += spread_over_tokens(grad_mean, pseudo, plan.seqlen_k).transpose(1, 2)


def _both_halves(grad: torch.Tensor, factor: float = 1.0) -> torch.Tensor:
    """[B, h, S, D] of the gradient of keys that stood twice, [B, h, 2 S, D], the second time multiplied."""
    once, lowered = grad.chunk(2, 2)
    return once + factor * lowered
