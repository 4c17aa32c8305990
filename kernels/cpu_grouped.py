"""Block-sparse attention on the CPU without a compiler: dense SDPA over the groups of cpu_groups.py.

Keys that a whole group sees run without a mask, what is ragged with one, and the two parts are merged by their log-sum-exp.
"""

import functools
import math

import torch

from genattn.kernels.block_plan import BlockPlan
from genattn.kernels.cpu_groups import CallRates, Group, groups_of_plan

_KEPT_BIAS_BYTES = 1 << 30
_CHUNK_BYTES = 4 << 20
_FEW_KEYS = 256
# a second-level cache holds so many keys and values; more queries hide that they are fetched from further away
_KEYS_AT_ONCE, _MANY_QUERIES = 2048, 192
_FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
Parts = tuple[torch.Tensor, torch.Tensor]


def why_not_grouped(query: torch.Tensor, plan: BlockPlan) -> str | None:
    """The reason why the grouped path cannot serve this call, or None."""
    if query.device.type != "cpu":
        return f"it is for CPU tensors, got {query.device.type}"
    if query.dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        return f"the dtype must be a floating type that SDPA takes, got {query.dtype}"
    return None


def grouped_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    plan: BlockPlan,
    *,
    scale: float | None = None,
    key_mask: torch.Tensor | None = None,
) -> Parts:
    """Forward only; shapes and meaning as in `reference_attention`."""
    if key_mask is not None:
        key = key.masked_fill(~key_mask[:, :, None, None], 0.0)
        value = value.masked_fill(~key_mask[:, :, None, None], 0.0)
    rates = CallRates.of(query, plan)
    group = query.shape[2] // key.shape[2]
    out = torch.zeros(query.shape, dtype=query.dtype)
    lse = torch.full(query.shape[:3], float("-inf"), dtype=torch.promote_types(query.dtype, torch.float32))
    lists = groups_of_plan(plan, rates)
    biases = _biases(plan, query.dtype, rates) if key_mask is None else None
    for row, groups in enumerate(lists):
        heads = slice(None) if len(lists) == 1 else slice(row, row + 1)
        kv_heads = slice(None) if len(lists) == 1 else slice(row // group, row // group + 1)
        inputs = query[:, :, heads], key[:, :, kv_heads], value[:, :, kv_heads]
        for place, part in enumerate(groups):
            bias = None if biases is None else biases[row][place]
            _serve(part, bias, inputs, key_mask, scale, out[:, :, heads], lse[:, :, heads])
    return out, lse


def _serve(
    part: Group,
    bias: Parts | None,
    inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    key_mask: torch.Tensor | None,
    scale: float | None,
    out: torch.Tensor,
    lse: torch.Tensor,
) -> None:
    """Write what a group answers into `out` [B, S, H, D] and `lse` [B, S, H], a few of its runs at a time."""
    query, key, value = inputs
    batch, _, heads, dim = query.shape
    repeat = heads // key.shape[2]
    runs = part.queries.shape[0]
    step = _CHUNK_BYTES // (2 * batch * heads * dim * part.keys.shape[1] * query.element_size())
    step = min(max(1, step), runs)
    scratch = [
        x.new_empty(batch * step * n * x.shape[2] * dim)
        for x, n in zip(inputs, (part.queries.shape[1], *2 * (part.keys.shape[1],)))
    ]
    for first in range(0, runs, step):
        some = slice(first, first + step)
        queries, keys = part.queries[some], part.keys[some]
        gathered = (
            _rows(query, queries, scratch[0]),
            _rows(key, keys, scratch[1], repeat),
            _rows(value, keys, scratch[2], repeat),
        )
        answer, sums = _parts(part, some, bias, gathered, key_mask, scale)
        answer, sums = (x.unflatten(0, (batch, heads)).flatten(2, 3).transpose(1, 2) for x in (answer, sums))
        out.index_copy_(1, queries.flatten(), answer)
        lse.index_copy_(1, queries.flatten(), sums.to(lse.dtype))


def _rows(tensor: torch.Tensor, index: torch.Tensor, scratch: torch.Tensor, repeat: int = 1) -> torch.Tensor:
    """[B * H * repeat, G, L, D] of a [B, S, H, D] tensor by int64 index [G, L], in memory of `scratch`.

    Indexing by lists is four times as slow, and memory that is new at every step costs more than the copy.
    """
    shape = tensor.shape[0], index.numel(), *tensor.shape[2:]
    rows = scratch[: math.prod(shape)].view(shape)
    torch.index_select(tensor, 1, index.flatten(), out=rows)
    rows = rows.unflatten(1, index.shape)
    if repeat > 1:
        rows = rows.repeat_interleave(repeat, 3)
    return rows.permute(0, 3, 1, 2, 4).flatten(0, 1)


def _parts(
    part: Group,
    some: slice,
    bias: Parts | None,
    gathered: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    key_mask: torch.Tensor | None,
    scale: float | None,
) -> Parts:
    """(out [B * H, G, Lq, D], lse [B * H, G, Lq]) of some of a group's runs."""
    q, k, v = gathered
    if key_mask is not None:
        mask = _with_key_mask(part, some, key_mask, q.shape[0])
        return _sdpa(q, k, v, _as_bias(mask, q.dtype), scale)
    if part.mask is None:
        return _sdpa(q, k, v, None, scale)
    ragged = _as_bias(part.mask[some], q.dtype) if bias is None else (bias[0][some], bias[1][some])
    if part.whole < _FEW_KEYS:  # not worth a call of its own
        left = ragged[0].new_zeros(*ragged[0].shape[:2], part.whole)
        # a row that sees none of the ragged keys still sees the whole ones
        hidden = ragged[0].masked_fill(ragged[1][..., None], float("-inf")) if part.whole else ragged[0]
        empty = ragged[1] & (part.whole == 0)
        return _sdpa(q, k, v, (torch.cat([left, hidden], -1) if part.whole else hidden, empty), scale)
    whole = _sdpa(q, k[:, :, : part.whole], v[:, :, : part.whole], None, scale)
    return _joined(whole, _sdpa(q, k[:, :, part.whole :], v[:, :, part.whole :], ragged, scale))


def _sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: Parts | None, scale: float | None) -> Parts:
    """Dense attention [B, G, L, D] with its log-sum-exp; bias: (0 or -inf per score, rows that see nothing)."""
    mask, empty = (None, None) if bias is None else (bias[0] if bias[0].ndim == 4 else bias[0][None], bias[1])
    out, lse = _in_cache(q, k, v, scale) if mask is None else _FLASH(q, k, v, attn_mask=mask, scale=scale)
    if empty is not None and bool(empty.any()):
        out = out.masked_fill(empty[..., None], 0.0)
        lse = lse.masked_fill(empty, float("-inf"))
    return out, lse


def _in_cache(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None) -> Parts:
    """Attention without a mask, over a few keys at a time where few queries would fetch many keys again for every slice."""
    few = 1 if q.shape[2] >= _MANY_QUERIES else round(k.shape[2] / _KEYS_AT_ONCE)
    pieces = zip(k.tensor_split(max(1, few), 2), v.tensor_split(max(1, few), 2))
    return functools.reduce(_joined, (_FLASH(q, some_k, some_v, scale=scale) for some_k, some_v in pieces))


def _joined(one: Parts, other: Parts) -> Parts:
    """One softmax over the keys of both; the first sees at least one key everywhere."""
    lse = torch.logaddexp(one[1], other[1])
    weight = (other[1] - lse).exp().to(one[0].dtype)[..., None]
    return one[0].lerp(other[0], weight), lse


def _as_bias(mask: torch.Tensor, dtype: torch.dtype) -> Parts:
    """(0 or -inf, rows that see nothing); those rows are 0, or SDPA would make them NaN."""
    empty = ~mask.any(-1)
    return torch.zeros(mask.shape, dtype=dtype).masked_fill_(~(mask | empty[..., None]), float("-inf")), empty


def _biases(plan: BlockPlan, dtype: torch.dtype, rates: CallRates) -> list[list[Parts | None]] | None:
    """The masks as SDPA takes them, kept in the plan; None where they would take too much memory."""
    name = ("biases", dtype, rates)
    if name not in plan.cache:
        lists = groups_of_plan(plan, rates)
        scores = sum(part.mask.numel() for groups in lists for part in groups if part.mask is not None)
        fits = scores * dtype.itemsize <= _KEPT_BIAS_BYTES
        plan.cache[name] = (
            [[None if p.mask is None else _as_bias(p.mask, dtype) for p in groups] for groups in lists] if fits else None
        )
    return plan.cache[name]  # type: ignore[return-value]


def _with_key_mask(part: Group, some: slice, key_mask: torch.Tensor, rows: int) -> torch.Tensor:
    """Bool [B * H, G, Lq, Lk]: the group's mask under a key mask per sample."""
    keys, queries = part.keys[some], part.queries[some]
    seen = torch.ones(*queries.shape, keys.shape[1], dtype=torch.bool)
    if part.mask is not None:
        seen[..., part.whole :] = part.mask[some]
    shown = key_mask[:, keys].repeat_interleave(rows // key_mask.shape[0], 0)
    return seen & shown[:, :, None, :]
