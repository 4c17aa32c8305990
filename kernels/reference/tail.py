"""The definition of the tail: pseudo-keys in the place of skipped key tiles, in the same softmax.

With the visited keys V of a query q, its skipped parts j of n_j unmasked keys, their mean key k_j and mean value v_j, scale s:

    num = sum_{k in V} e^{s q.k} v_k + sum_j n_j e^{s q.k_j} v_j,    den = the same without the values,    out = num / den

"mean" takes a tile as one part, "mean2" as two parts of keys that are alike (`likeness.py`). Exact where the keys of a part are
equal; by Jensen's inequality a part counts for too little otherwise. (Adding half the variance of the scores overshoots:
measured, docs/tail.md.) Keys that are hidden inside a visited tile are not stood in for: only tiles that are not in the list
at all.

How a kernel does it, forward, for one query tile `i` of list `n` (1 or head) with its running maximum, sum and accumulator:

    tables   plan.tail.skipped [N, NQ, W] (bits, see Tail), tail.parts; means and log counts come as tensors, made once per
             call: key [B, P, Hk, D], value [B, P, Hk, D], log_count [B, G, P], -inf for a part without an unmasked key;
             G = 1, or Hk where the heads' weights differ (`Tail.counted` under "mean2")
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
from genattn.kernels.reference.likeness import parts_by_likeness, rows_by_head

_GATHERED_AT_ONCE = 1 << 24


@dataclass(frozen=True, eq=False)
class TailKeys:
    """Pseudo-keys of one call. key, value: [B, P, Hk, D]. log_count: [B, G, P], natural log, -inf where nothing counts; G = 1
    or Hk.

    tokens: [B, P], how many the means are over. members: int32 [B, G, P, L], over which, -1 for none; B and G may be 1.
    """

    key: torch.Tensor
    value: torch.Tensor
    log_count: torch.Tensor
    tokens: torch.Tensor
    members: torch.Tensor

    def weights_of(self, heads: int) -> torch.Tensor:
        """[B, 1 or heads, P]: the log counts by query head."""
        groups = self.log_count.shape[1]
        return self.log_count if groups == 1 else self.log_count.repeat_interleave(heads // groups, 1)


def tail_keys(key: torch.Tensor, value: torch.Tensor, tail: Tail, key_mask: torch.Tensor | None = None) -> TailKeys:
    """The pseudo-keys of `tail` for key and value [B, Sk, Hk, D]; key_mask bool [B, Sk], False leaves a key out.

    In float32, or float64 for float64 inputs. Differentiable.
    """
    compute = torch.promote_types(key.dtype, torch.float32)
    members = members_of(key, tail, key_mask)
    if key_mask is not None:
        # a hidden key must not leak through 0 * NaN
        key, value = (x.masked_fill(~key_mask[:, :, None, None], 0.0) for x in (key, value))
    used = members >= 0
    weighed = used if tail.counted is None else used & tail.counted[members.long().clamp_min(0)]
    counts = weighed.sum(-1).expand(key.shape[0], -1, -1)
    # parts are of equal size in every head; only how many of their tokens weigh can differ
    log_count = (counts[:, :1] if tail.counted is None else counts).to(compute).log()
    tokens = used[:, 0].sum(-1).expand(key.shape[0], -1).to(compute)
    mean_key, mean_value = (means_of_parts(x, members, tokens) for x in (key, value))
    return TailKeys(mean_key, mean_value, log_count, tokens, members)


def members_of(key: torch.Tensor, tail: Tail, key_mask: torch.Tensor | None = None) -> torch.Tensor:
    """Int32 [B or 1, Hk or 1, P, L]: the tokens of each pseudo-key, -1 for an unused lane or a hidden key."""
    if tail.parts > 1:
        return parts_by_likeness(key, tail, key_mask)
    members = tail.tokens[None, None]
    if key_mask is None:
        return members
    return members.where(key_mask[:, None, tail.tokens.long().clamp_min(0)], -1)


def means_of_parts(x: torch.Tensor, members: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """[B, P, Hk, D]: mean over the tokens of each part of x [B, Sk, Hk, D]; zeros for a part without one.

    members: int [B or 1, Hk or 1, P, L], -1 for an unused lane. tokens: [B, P], how many they are, in the dtype of the sums.
    """
    x = x.contiguous()  # once, not for every gather
    step = max(1, _GATHERED_AT_ONCE // max(1, x[:, :1].numel() * members.shape[-1]))
    sums = _sums_by_head if members.shape[1] > 1 or members.shape[0] > 1 else _sums
    found = torch.cat([sums(x, some, tokens.dtype) for some in members.split(step, 2)], 1)
    return torch.where((tokens > 0)[:, :, None, None], found / tokens[:, :, None, None].clamp_min(1.0), 0.0)


def _sums(x: torch.Tensor, members: torch.Tensor, compute: torch.dtype) -> torch.Tensor:
    """[B, p, Hk, D]: sums over some parts that are the same for all samples and heads, members [1, 1, p, L]."""
    index, weight = _rows_and_weights(members[0, 0], compute)
    rows = x.index_select(1, index.flatten()).unflatten(1, index.shape).to(compute)
    return (weight[:, None] @ rows.flatten(3)).unflatten(3, x.shape[2:])[:, :, 0]


def _sums_by_head(x: torch.Tensor, members: torch.Tensor, compute: torch.dtype) -> torch.Tensor:
    """[B, p, Hk, D]: the same for members [B, Hk or 1, p, L]."""
    index, weight = _rows_and_weights(members, compute)
    rows = rows_by_head(x, index).to(compute)
    return (weight[..., None, :] @ rows)[..., 0, :].transpose(1, 2)


def _rows_and_weights(members: torch.Tensor, compute: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Int64 tokens and weights of 1 and 0, [..., L] both. An unused lane takes the part's first token: 0 * NaN would be NaN."""
    used = members >= 0
    return members.where(used, members[..., :1]).long().clamp_min(0), used.to(compute)


def tail_scores(
    query: torch.Tensor, keys: TailKeys, scale: float, lower: Callable[[torch.Tensor], torch.Tensor] | None = None
) -> torch.Tensor:
    """[B, H, Sq, P]: scores of the pseudo-keys, weights included, for query [B, Sq, H, D]; -inf where nothing counts.

    lower: what a plan's fade makes of the logits, before the weights.
    """
    group = query.shape[2] // keys.key.shape[2]
    scores = query.transpose(1, 2) @ keys.key.repeat_interleave(group, 2).permute(0, 2, 3, 1) * scale
    return (scores if lower is None else lower(scores)) + keys.weights_of(query.shape[2])[:, :, None]


def spread_over_tokens(grad: torch.Tensor, keys: TailKeys, seqlen: int) -> torch.Tensor:
    """[B, Sk, Hk, D]: the gradient of each token by that of the mean it is part of, [B, P, Hk, D].

    Hidden keys, and tokens of no part, get zeros.
    """
    share = (grad / keys.tokens[:, :, None, None].clamp_min(1.0)).transpose(1, 2)
    lanes = keys.members.expand(*share.shape[:2], -1, -1).flatten(2).long()
    part = torch.arange(share.shape[2], device=grad.device).repeat_interleave(keys.members.shape[-1]).expand_as(lanes)
    # unused lanes write into a place of their own
    owner = lanes.new_full((*share.shape[:2], seqlen + 1), -1).scatter_(2, torch.where(lanes < 0, seqlen, lanes), part)[
        ..., :-1
    ]
    spread = share.take_along_dim(owner.clamp_min(0)[..., None], 2).masked_fill((owner < 0)[..., None], 0.0)
    return spread.transpose(1, 2)
