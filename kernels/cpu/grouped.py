"""Block-sparse attention on the CPU without a compiler: batched matrix products over the groups of groups.py.

    s = scale q k^T (+ a large negative number where a query does not see a key)
    p = softmax(s),   lse = max s - log max p,   out = p v

The scores of a few runs at a time stay in the caches. Dense SDPA would slice the queries again, 32 at a time where there are
few, and is a quarter slower then.
"""

import functools
import math
from typing import NamedTuple

import torch

from genattn.kernels.cpu.groups import LINE, Group, groups_with_tail, tile_of_query
from genattn.kernels.plan.block_plan import BlockPlan
from genattn.kernels.plan.lasting import lasting
from genattn.kernels.reference.keys_twice import Keys, lowered_tail_keys, with_keys_twice
from genattn.kernels.reference.tail import TailKeys

_KEPT_BIAS_BYTES = 1 << 30
# scores of a run, and scores, keys and values of a thread, at a time: more leave the caches, fewer cost calls
_SCORES_OF_RUN, _NUMBERS_OF_THREAD = 1 << 19, 1_000_000
_QUERIES_AT_ONCE, _FEWEST_KEYS, _FEWEST_QUERIES = 512, 512, 32
_UNSEEN = -1e30  # not -inf: a row that sees none of some keys must still join those it sees
Parts = tuple[torch.Tensor, torch.Tensor]


def why_not_grouped(query: torch.Tensor, plan: BlockPlan) -> str | None:
    """The reason why the grouped path cannot serve this call, or None."""
    if query.device.type != "cpu":
        return f"it is for CPU tensors, got {query.device.type}"
    if query.dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        return f"the dtype must be a floating type of 16 bits or more, got {query.dtype}"
    return None


def grouped_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    plan: BlockPlan,
    *,
    scale: float | None = None,
    key_mask: torch.Tensor | None = None,
    with_lse: bool = True,
) -> Parts:
    """Forward only; shapes and meaning as in `reference_attention`. Without `with_lse` the second result is undefined."""
    compute = torch.promote_types(query.dtype, torch.float32)
    if key_mask is not None:
        key, value = (x.masked_fill(~key_mask[:, :, None, None], 0.0) for x in (key, value))
    given = with_keys_twice(plan, key, value, key_mask, compute)
    plan, key, value, key_mask = given.plan, given.key, given.value, given.key_mask
    bias = _bias_of_keys(given, query.shape[0], compute)
    pseudo = None if plan.tail is None else lowered_tail_keys(given)
    out = query.new_zeros(query.shape[0], query.shape[2], query.shape[1], query.shape[3])
    lse = query.new_full(out.shape[:3], _UNSEEN, dtype=compute)
    lists, scratch = groups_with_tail(plan), _Scratch()
    if bias is not None and pseudo is not None:
        bias = torch.nn.functional.pad(bias, (0, _whole_lines(plan.tail.pseudo_keys)))  # type: ignore[union-attr]
    for heads in _head_blocks(query.shape[0], query.shape[2], len(lists)):
        parts = lists[heads.start if len(lists) > 1 else 0]
        queries, keys, values = _heads_of((query, key, value), heads, compute, pseudo)
        call = _Call(
            query=queries,
            key=keys,
            value=values,
            key_bias=() if bias is None else tuple(bias.repeat_interleave(heads.stop - heads.start, 0)),
            out=tuple(head for sample in out[:, heads] for head in sample),
            lse=tuple(head for sample in lse[:, heads] for head in sample),
            scale=query.shape[3] ** -0.5 if scale is None else scale,
            with_lse=with_lse or key_mask is not None or any(part.again for part in parts),
            scratch=scratch,
            tail=() if pseudo is None else _tail_weights(plan, pseudo, heads, query.shape[2], key_mask is not None),
            tile_of_query=tile_of_query(plan),
            first_pseudo=plan.seqlen_k,
        )
        for part in parts:
            _serve(part, _bias_of(part, plan, compute), call)
    blind = lse < _UNSEEN / 2
    if bool(blind.any()):
        out.masked_fill_(blind[..., None], 0.0)
        lse.masked_fill_(blind, float("-inf"))
    return out.transpose(1, 2), lse.transpose(1, 2)


def _bias_of_keys(given: Keys, batch: int, dtype: torch.dtype) -> torch.Tensor | None:
    """[B, Sk], what is added to the scores of each key; None for nothing."""
    if given.key_mask is None and given.penalty is None:
        return None
    bias = torch.zeros(batch, given.plan.seqlen_k, dtype=dtype)
    if given.penalty is not None:
        bias -= given.penalty
    return bias if given.key_mask is None else bias.masked_fill_(~given.key_mask, _UNSEEN)


class _Scratch:
    """Memory that is there: new pages at every step cost more than the products."""

    def __init__(self) -> None:
        self._held: dict[tuple[str, torch.dtype], torch.Tensor] = {}
        self._views: dict[tuple[str, tuple[int, ...], torch.dtype], torch.Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A contiguous tensor with undefined contents."""
        view = self._views.get((name, shape, dtype))
        if view is None:
            size, held = math.prod(shape), self._held.get((name, dtype))
            if held is None or held.numel() < size:
                held = self._held[name, dtype] = torch.empty(size, dtype=dtype)
            view = self._views[name, shape, dtype] = held[:size].view(shape)
        return view

    def rows(self, name: str, tensors: tuple[torch.Tensor, ...], lanes: torch.Tensor, length: int) -> torch.Tensor:
        """[N * G, L, D] of N tensors [S, D] by the index of lanes [G * L]."""
        count, dim = lanes.shape[0], tensors[0].shape[1]
        flat = self.take(name, (len(tensors) * count // length, length, dim), tensors[0].dtype)
        for tensor, rows in zip(tensors, flat.view(len(tensors), count, dim)):
            torch.index_select(tensor, 0, lanes, out=rows)
        return flat


class _Call(NamedTuple):
    """Heads of samples served together, and what all groups share.

    Of each head: query [Sq, D], key and value [Sk, D], key_bias [Sk] or none; out [Sq, D] and lse [Sq] are written. Under a
    tail, pseudo-keys follow the keys; tail: what is added to their scores, by tile of the query, [NQ, P] for each head or one
    for all, none without.
    """

    query: tuple[torch.Tensor, ...]
    key: tuple[torch.Tensor, ...]
    value: tuple[torch.Tensor, ...]
    key_bias: tuple[torch.Tensor, ...]
    out: tuple[torch.Tensor, ...]
    lse: tuple[torch.Tensor, ...]
    scale: float
    with_lse: bool
    scratch: _Scratch
    tail: tuple[torch.Tensor, ...]
    tile_of_query: torch.Tensor
    first_pseudo: int


def _whole_lines(count: int) -> int:
    return -(-count // LINE) * LINE


def _tail_weights(plan: BlockPlan, pseudo: TailKeys, heads: slice, all_heads: int, by_sample: bool) -> tuple[torch.Tensor, ...]:
    """What is added to the scores of pseudo-keys, [NQ, P] each: log of their count where the tile is skipped, else unseen.

    One for all heads of the call, or one for each where they differ by sample or head.
    """
    assert plan.tail is not None
    seen = plan.tail.stands_in(slice(heads.start, heads.start + 1) if plan.num_heads > 1 else slice(1))[0]
    more = _whole_lines(seen.shape[1]) - seen.shape[1]
    weights = pseudo.weights_of(all_heads)
    by_head = weights.shape[1] > 1
    # parts by likeness hold other tokens in each sample, of which other ones weigh
    by_sample = by_sample or (plan.tail.counted is not None and plan.tail.parts > 1)
    if not by_head and not by_sample:
        weights = weights[:1]
    rows = (weights[:, heads] if by_head else weights).clamp_min(_UNSEEN)
    tables = [
        [torch.nn.functional.pad(row.where(seen, _UNSEEN), (0, more), value=_UNSEEN) for row in sample] for sample in rows
    ]
    if by_head or not by_sample:
        return tuple(table for sample in tables for table in sample)
    return tuple(table for (table,) in tables for _ in range(heads.stop - heads.start))


def _head_blocks(batch: int, heads: int, lists: int) -> list[slice]:
    """Heads served together: enough to keep the threads busy where runs are few; one where each has its list."""
    step = 1 if lists > 1 else max(1, torch.get_num_threads() // batch)
    return [slice(first, min(first + step, heads)) for first in range(0, heads, step)]


def _heads_of(
    inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor], heads: slice, compute: torch.dtype, pseudo: TailKeys | None
) -> list[tuple[torch.Tensor, ...]]:
    """Query, key and value of some heads of every sample of [B, S, H, D]; copied where strides or types are other ones.

    Pseudo-keys come behind the keys, filled up with zeros to whole cache lines of scores.
    """
    group, kept = inputs[0].shape[2] // inputs[1].shape[2], inputs[2].dtype if _multiplies(inputs[2].dtype) else compute
    shared = slice(heads.start // group, (heads.stop - 1) // group + 1)
    blocks = [
        _copied(tensor[:, :, some], dtype, None if tail is None else tail[:, :, some])
        for tensor, some, dtype, tail in zip(
            inputs,
            (heads, shared, shared),
            (compute, compute, kept),
            (None, None, None) if pseudo is None else (None, pseudo.key, pseudo.value),
        )
    ]
    places = [(head - heads.start, head // group - shared.start) for head in range(heads.start, heads.stop)]
    return [
        tuple(block[sample, place[of]] for sample in range(len(block)) for place in places)
        for block, of in zip(blocks, (0, 1, 1))
    ]


def _copied(tensor: torch.Tensor, dtype: torch.dtype, tail: torch.Tensor | None) -> torch.Tensor:
    """[B, h, S (+ P), D], contiguous, of [B, S, h, D] and [B, P, h, D]."""
    if tail is None:
        return tensor.transpose(1, 2).to(dtype).contiguous()
    batch, seqlen, heads, dim = tensor.shape
    last = seqlen + tail.shape[1]
    whole = tensor.new_empty(batch, heads, seqlen + _whole_lines(tail.shape[1]), dim, dtype=dtype)
    whole[:, :, :seqlen] = tensor.transpose(1, 2)
    whole[:, :, seqlen:last] = tail.transpose(1, 2)
    whole[:, :, last:] = 0.0
    return whole


@functools.cache
def _multiplies(dtype: torch.dtype) -> bool:
    """Whether this machine multiplies matrices of a 16-bit type faster than it would after a conversion."""
    if not torch.backends.mkldnn.is_available():
        return False
    known = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }
    return dtype in known and bool(known[dtype]())


def _bias_of(part: Group, plan: BlockPlan, dtype: torch.dtype) -> torch.Tensor | None:
    """The group's masks [U, Lq, Lr] as something to add, kept in the plan; None where they would take too much memory."""
    name = ("bias", id(part), dtype)
    if name not in plan.cache:
        fits = part.masks.numel() * dtype.itemsize <= _KEPT_BIAS_BYTES
        plan.cache[name] = _as_bias(part.masks, dtype) if fits else None
    return plan.cache[name]  # type: ignore[return-value]


@lasting
def _as_bias(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(mask.shape, dtype=dtype).masked_fill_(~mask, _UNSEEN)


def _serve(part: Group, bias: torch.Tensor | None, call: _Call) -> None:
    """Write what a group answers, a few of its runs at a time."""
    pieces = _key_pieces(part)
    with_lse = call.with_lse or len(pieces) > 1 or not part.all_see
    for first, last, start, stop in _steps(part, len(call.query), call.query[0].shape[1]):
        rows, keys, runs = part.queries[first:last, start:stop], part.keys[first:last], last - first
        lanes = _split(rows) if len(call.query) == 1 else rows
        query = call.scratch.rows("query", call.query, lanes.flatten(), lanes.shape[1])
        spans = [(a - first, b - first, _mask(part, bias, u, query.dtype)[start:stop]) for a, b, u in part.spans(first, last)]
        outs = call.scratch.take("outs", (len(pieces), *query.shape), call.value[0].dtype)
        ends = [call.scratch.take(name, (len(pieces), *query.shape[:2]), query.dtype) for name in ("most", "peak")]
        for place, (begin, end) in enumerate(pieces):
            chosen = keys[:, begin:end].flatten()
            scores = _scores(query, call.scratch.rows("key", call.key, chosen, end - begin), call)
            by_run = scores.view(len(call.query), runs, -1, end - begin)[:, :, : stop - start]
            listed = part.keys.shape[1] - part.tail
            if end > part.whole and spans:
                _hide(by_run[..., : listed - begin], part.whole - begin, spans)
            if end > listed:
                some = rows[:, :1] if part.tail_alike else rows
                _weigh(by_run, listed - begin, some, keys[:, max(listed, begin) : end] - call.first_pseudo, call)
            for seen, key_bias in zip(by_run, call.key_bias):
                seen.add_(key_bias[chosen].view(runs, 1, -1))
            probs = _softmax(scores, (ends[0][place], ends[1][place]) if with_lse else None)
            value = call.scratch.rows("value", call.value, chosen, end - begin)
            torch.bmm(_as_type(probs, value.dtype, call.scratch), value.expand(len(query), -1, -1), out=outs[place])
        answer, sums = _joined(outs, ends[0] - ends[1].log() if with_lse else None)
        _write(call, rows, answer, sums, part.again)


def _steps(part: Group, heads: int, dim: int) -> list[tuple[int, int, int, int]]:
    """(first run, last run, first query, last query) of what is computed together, so that every thread has work."""
    runs, queries = part.queries.shape
    threads = torch.get_num_threads()
    first, last = _key_pieces(part)[0]
    fitting = round(_NUMBERS_OF_THREAD / ((last - first) * (min(queries, _QUERIES_AT_ONCE) + 2 * dim)))
    step = max(1, max(1, fitting) * threads // heads)
    return [
        (*some, start, min(start + _QUERIES_AT_ONCE, queries))
        for begin in range(0, runs, step)
        for some in _even(begin, min(begin + step, runs), max(1, threads // heads))
        for start in range(0, queries, _QUERIES_AT_ONCE)
    ]


def _even(first: int, last: int, threads: int) -> list[tuple[int, int]]:
    """Runs that can be dealt to all threads, then the rest one by one."""
    cut = last - (last - first) % threads
    return [(first, cut)] * (cut > first) + [(run, run + 1) for run in range(cut, last)]


def _split(rows: torch.Tensor) -> torch.Tensor:
    """A single run [1, L] as a part for each thread, [T, L / T], the last query repeated; several runs as they are."""
    parts = min(torch.get_num_threads(), rows.shape[1] // _FEWEST_QUERIES)
    if len(rows) > 1 or parts < 2:
        return rows
    missing = -rows.shape[1] % parts
    return torch.cat([rows, rows[:, -1:].expand(-1, missing)], 1).view(parts, -1)


def _key_pieces(part: Group) -> list[tuple[int, int]]:
    """Keys [first, last) taken at once: about equally many, whole cache lines of scores."""
    keys = part.keys.shape[1]
    most = max(_FEWEST_KEYS, _SCORES_OF_RUN // min(part.queries.shape[1], _QUERIES_AT_ONCE))
    step = -(-keys // -(-keys // most) // LINE) * LINE
    return [(first, min(first + step, keys)) for first in range(0, keys, step)]


def _scores(query: torch.Tensor, key: torch.Tensor, call: _Call) -> torch.Tensor:
    """[N, Lq, n] of [N, Lq, D] and [N, n, D]; one set of keys may serve all."""
    scores = call.scratch.take("scores", (*query.shape[:2], key.shape[1]), query.dtype)
    return torch.baddbmm(scores, query, key.expand(len(query), -1, -1).mT, beta=0.0, alpha=call.scale, out=scores)


def _mask(part: Group, bias: torch.Tensor | None, place: int, dtype: torch.dtype) -> torch.Tensor:
    return _as_bias(part.masks[place], dtype) if bias is None else bias[place]


def _hide(scores: torch.Tensor, whole: int, spans: list[tuple[int, int, torch.Tensor]]) -> None:
    """Add the bias [Lq, Lr] of each span of runs to what is there of its keys in scores [N, G, Lq, n], from `whole` on."""
    begin = max(0, whole)
    for first, last, bias in spans:
        scores[:, first:last, :, begin:].add_(bias[:, begin - whole : scores.shape[3] - whole])


def _weigh(scores: torch.Tensor, first: int, rows: torch.Tensor, places: torch.Tensor, call: _Call) -> None:
    """Add the weights of pseudo-keys `places` [G, p], from `first` on in scores [N, G, Lq, n].

    rows: the queries [G, Lq], or one of each run [G, 1] where all of them see the same.
    """
    begin, tiles = max(0, first), call.tile_of_query[rows]
    alike = len(places) == 1 or bool((places[1:] == places[:1]).all())
    one_run = bool((places[0].diff() == 1).all())
    columns = slice(int(places[0, 0]), int(places[0, -1]) + 1) if one_run else places[0]
    for seen, weights in zip(scores if len(call.tail) > 1 else (scores,), call.tail):
        some = weights[:, columns][tiles] if alike else weights[tiles[:, :, None], places[:, None, :]]
        seen[..., begin:].add_(some)


def _softmax(scores: torch.Tensor, ends: Parts | None) -> torch.Tensor:
    """Softmax over the last dimension in place; its largest score and probability go to `ends`, lse = most - log peak."""
    if ends is None:
        return torch.softmax(scores, -1, out=scores)
    torch.amax(scores, -1, out=ends[0])
    # in place: a second array of scores would leave the caches and cost 3 to 5 %; torch reads an element before it writes it
    torch.softmax(scores, -1, out=scores)
    torch.amax(scores, -1, out=ends[1])
    return scores


def _as_type(probs: torch.Tensor, dtype: torch.dtype, scratch: _Scratch) -> torch.Tensor:
    return probs if probs.dtype == dtype else scratch.take("probs", tuple(probs.shape), dtype).copy_(probs)


def _joined(outs: torch.Tensor, lse: torch.Tensor | None) -> Parts:
    """(out [N, L, D], lse [N, L]) of one softmax over the keys of all pieces [P, N, L, D]; lse is 0 where there is none."""
    if lse is None:
        return outs[0], outs.new_zeros(outs.shape[1:3], dtype=torch.promote_types(outs.dtype, torch.float32))
    if len(outs) == 1:
        return outs[0], lse[0]
    weights = lse.softmax(0)[..., None]
    return (outs.mul_(weights) if outs.dtype == weights.dtype else outs * weights).sum(0), lse.logsumexp(0)


def _write(call: _Call, rows: torch.Tensor, answer: torch.Tensor, sums: torch.Tensor, again: bool) -> None:
    """Store the answers of queries [G, L] by all heads, or join them with those that are there."""
    index, kept = rows.flatten(), (len(call.out), rows.shape[0], -1)
    for out, lse, new, new_lse in zip(call.out, call.lse, answer.view(*kept, answer.shape[2]), sums.view(kept)):
        new, new_lse = new[:, : rows.shape[1]].flatten(0, 1), new_lse[:, : rows.shape[1]].flatten()
        if again:
            before, lse_before = out.index_select(0, index), lse.index_select(0, index)
            new = before.to(lse.dtype).lerp(new.to(lse.dtype), (new_lse - lse_before).sigmoid()[:, None])
            new_lse = torch.logaddexp(new_lse, lse_before)
        out.index_copy_(0, index, new.to(out.dtype))
        lse.index_copy_(0, index, new_lse)
