"""The definition of the tail: pseudo-keys in the place of skipped key tiles, in the same softmax.

With the visited keys V of a query q, its skipped parts j of n_j unmasked keys, their mean key k_j and mean value v_j, scale s:

    num = sum_{k in V} e^{s q.k} v_k + sum_j n_j e^{s q.k_j} v_j,    den = the same without the values,    out = num / den

"mean", "mean2", "mean4" take a tile as one, two or four parts. Exact where the keys of a part are equal; by Jensen's inequality
a part counts for too little otherwise. (Adding half the variance of the scores overshoots: measured, docs/tail.md.) Keys that
are hidden inside a visited tile are not stood in for: only tiles that are not in the list at all.

How a kernel does it, forward, for one query tile `i` of list `n` (1 or head) with its running maximum, sum and accumulator:

    tables   plan.tail.skipped [N, NQ, W] (bits, see Tail), tail.parts; means and log counts come as tensors, made once per
             call: key [B, P, Hk, D], value [B, P, Hk, D], log_count [B, P], -inf for a part without an unmasked key
    columns  after (or before) the listed tiles, P columns more, a block of them at a time:
             s_j = scale <q, key_j> + log_count_j,    s_j = -inf unless bit (j // parts) of skipped[n, i] is set
             then the online softmax as for any other tile, `value_j` in the place of v. A block whose bits are all zero is
             passed over. All lanes of a query tile see the same columns, so a mask is one row of bits
    lse      includes the pseudo-keys, as the denominator does

Backward, with the forward's lse and delta = <out, do> - dlse as for other keys, and p_j = exp(s_j - lse):

    ds_j = p_j (<do, value_j> - delta),    dq += scale sum_j ds_j key_j
    dkey_j = scale sum_q ds_j q,           dvalue_j = sum_q p_j do          (over the queries of the heads that share the key)
    then every unmasked token t of part j gets dkey[t] += dkey_j / m_j, dvalue[t] += dvalue_j / m_j

with m_j the number of tokens that the mean is over: e^{log_count_j}, but in plans cut into pieces (`Tail.counted`). Parts are
disjoint, so the spreading needs no atomics.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from genattn.kernels.plan.tail import Tail

_GATHERED_AT_ONCE = 1 << 24


@dataclass(frozen=True, eq=False)
class TailKeys:
    """Pseudo-keys of one call. key, value: [B, P, Hk, D]. log_count: [B, P], natural log, -inf where nothing counts.

    tokens: [B, P], how many the means are over.
    """

    key: torch.Tensor
    value: torch.Tensor
    log_count: torch.Tensor
    tokens: torch.Tensor


def tail_keys(key: torch.Tensor, value: torch.Tensor, tail: Tail, key_mask: torch.Tensor | None = None) -> TailKeys:
    """The pseudo-keys of `tail` for key and value [B, Sk, Hk, D]; key_mask bool [B, Sk], False leaves a key out.

    In float32, or float64 for float64 inputs. Differentiable.
    """
    compute = torch.promote_types(key.dtype, torch.float32)
    used = (tail.tokens >= 0).expand(key.shape[0], -1, -1)
    if key_mask is not None:
        used = used & key_mask[:, tail.tokens.long().clamp_min(0)]
        # a hidden key must not leak through 0 * NaN
        key, value = (x.masked_fill(~key_mask[:, :, None, None], 0.0) for x in (key, value))
    weight = used.to(compute)
    tokens = weight.sum(-1)
    counted = used if tail.counted is None else used & tail.counted[tail.tokens.long().clamp_min(0)]
    log_count = counted.sum(-1).to(compute).log()
    mean_key, mean_value = (_means(x, tail, weight, tokens) for x in (key, value))
    return TailKeys(mean_key, mean_value, log_count, tokens)


def _means(x: torch.Tensor, tail: Tail, weight: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """[B, P, Hk, D]: mean over the tokens of each part of [B, Sk, Hk, D]."""
    step = max(1, _GATHERED_AT_ONCE // max(1, x[:, :1].numel() * tail.tokens.shape[1]))
    means = []
    for parts in torch.arange(tail.pseudo_keys, device=x.device).split(step):
        rows = tail.tokens[parts].long().clamp_min(0)
        gathered = x.index_select(1, rows.flatten()).unflatten(1, rows.shape).to(weight.dtype)
        share = weight[:, parts] / tokens[:, parts, None].clamp_min(1.0)
        means.append((gathered * share[..., None, None]).sum(2))
    return torch.cat(means, 1)


def tail_scores(
    query: torch.Tensor, keys: TailKeys, scale: float, lower: Callable[[torch.Tensor], torch.Tensor] | None = None
) -> torch.Tensor:
    """[B, H, Sq, P]: scores of the pseudo-keys, weights included, for query [B, Sq, H, D]; -inf where nothing counts.

    lower: what a plan's fade makes of the logits, before the weights.
    """
    group = query.shape[2] // keys.key.shape[2]
    scores = query.transpose(1, 2) @ keys.key.repeat_interleave(group, 2).permute(0, 2, 3, 1) * scale
    return (scores if lower is None else lower(scores)) + keys.log_count[:, None, None, :]


def spread_over_tokens(
    grad: torch.Tensor, tail: Tail, tokens: torch.Tensor, seqlen: int, key_mask: torch.Tensor | None
) -> torch.Tensor:
    """[B, Sk, Hk, D]: the gradient of each token by that of the mean it is part of, [B, P, Hk, D].

    tokens: [B, P] as in `TailKeys`. Hidden keys, and tokens of no part, get zeros.
    """
    used = tail.tokens >= 0
    part = torch.nonzero(used)[:, 0]
    share = grad / tokens[:, :, None, None].clamp_min(1.0)
    spread = grad.new_zeros(grad.shape[0], seqlen, *grad.shape[2:])
    spread[:, tail.tokens[used].long()] = share[:, part]
    return spread if key_mask is None else spread.masked_fill(~key_mask[:, :, None, None], 0.0)
