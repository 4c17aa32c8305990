"""BroadWay on full three-dimensional attention: edit how much a query takes from each frame, leave what it takes there.

    A[q, (t, s)] = M[q, t] C[q, s | t]        M: mass of key frame t, C: attention within the frame
    A' = A M'/M                               out[q] = sum_t M'[q, t] o_t[q],   o_t: attention restricted to frame t

One attention per key frame with its log-sum-exp gives both exactly: M is the softmax of the log-sum-exps over the frames and
the o_t are there already, for the multiplications of one ordinary attention. With one token per frame it is BroadWay itself.
Keys outside the edited frames (text, references, registers, a first frame left alone) keep their mass. M' may be negative.

The edit needs its energies over all queries before beta is known, but it is linear in few basis maps (see temporal_map):
queries come in chunks, each leaves one output per basis map, and the outputs are mixed once beta is solved.
`frame_marginal_reference` holds the definition on the full S x S map.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch

from genattn.errors import GenAttnError
from genattn.guidance.broadway.key_frames import KeyFrames
from genattn.guidance.broadway.temporal_map import EditScalars, MapEdit, band_projection, basis_maps, gram, solve
from genattn.kernels.block_sparse import block_sparse_attention
from genattn.kernels.plan.block_plan import BlockPlan, dense_plan
from genattn.kernels.plan.kept_entries import keep_entries
from genattn.kernels.plan.lasting import lasting
from genattn.kernels.triton.config import tile_sizes

CHUNK_BYTES = 256 << 20


@dataclass(frozen=True, eq=False)
class EditedAttention:
    """What an edit of one attention gives.

    Attributes:
        out: [B, S, H, D] in the query's type.
        scalars: alpha, beta, energies and disparity.
        rows: the frame marginal of the edited rows before the edit, float32 [B, Q, H, T].
    """

    out: torch.Tensor
    scalars: EditScalars
    rows: torch.Tensor


def edited_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    frames: KeyFrames,
    edit: MapEdit,
    *,
    anchor: torch.Tensor | None = None,
    beta: torch.Tensor | None = None,
    conditional: slice = slice(None),
    scale: float | None = None,
    key_mask: torch.Tensor | None = None,
    plan: BlockPlan | None = None,
    base: torch.Tensor | None = None,
    key_share: float = 1.0,
    chunk_bytes: int = CHUNK_BYTES,
) -> EditedAttention:
    """Attention whose frame marginal is edited.

    Args:
        query: [B, S, H, D]; key, value: [B, S, Hk, D] with Hk a divisor of H.
        frames: `key_frames` of the layout, on the tensors' device.
        edit: what to do with the marginal.
        anchor: marginal to move towards, [B, Q, H', T]; H' != H takes the mean over its heads.
        beta: 0-dim; use this factor instead of measuring one.
        conditional: samples of the batch on which energies are measured.
        scale: of the scores, default D ** -0.5.
        key_mask: bool [B, S]; False hides a key.
        plan: block-sparse plan over the S tokens; the marginal is then that of the sparse map.
        base: the attention's ordinary output, [B, S, H, D]. When given, only the change is computed and added to it, so that
            whatever computed it stays in force, and key and value may be averages (an approximation, see `pooled_edit`).
        key_share: keys of a frame in `frames` over keys that they stand for, in (0, 1]; weighs them against the kept keys.
        chunk_bytes: memory for the outputs per key frame of one chunk of queries; at least one row's worth (under a plan one
            head's, under one that differs by head all of it).
    """
    _check(query, key, frames, anchor)
    edited_rows = query.index_select(1, frames.queries)
    heads = query.shape[2]
    if key.shape[2] != heads:
        key, value = (x.repeat_interleave(heads // key.shape[2], 2) for x in (key, value))
    if anchor is not None and anchor.shape[2] != heads:
        anchor = anchor.mean(2, keepdim=True).expand(-1, -1, heads, -1)
    projection = band_projection(frames.frames, edit.tau, edit.tau_frames).to(query.device)
    total = torch.zeros(4, 4, dtype=torch.float32, device=query.device)
    marginal = torch.empty(*edited_rows.shape[:3], frames.frames, dtype=torch.float32, device=query.device)
    kinds = _output_kinds(edit, anchor is not None, change_only=base is not None)
    outputs = torch.empty(len(kinds), *edited_rows.shape, dtype=torch.float32, device=query.device)
    attend: _DenseFrames | _PlannedFrames
    if plan is None:
        attend = _DenseFrames(edited_rows, key, value, frames, scale, key_mask)
    else:
        attend = _PlannedFrames(query, key, value, frames, scale, key_mask, plan)
    for rows, head in _chunks(edited_rows, frames.frames, chunk_bytes, plan):
        outs, lse, kept = attend(rows, head)
        visible = None if plan is None and key_mask is None else lse > float("-inf")
        part = _softmax(lse, visible)
        basis = basis_maps(part, None if anchor is None else anchor[:, rows, head], projection, visible)
        total += gram(basis[:, conditional])
        marginal[:, rows, head] = part
        maps = _output_maps(basis, edit, kinds)
        outputs[:, :, rows, head] = _mix(maps, outs, lse - math.log(key_share), kept, add_kept=base is None)
    measured = marginal[conditional]
    scalars = solve(total / (measured.numel() // frames.frames), edit, frames.frames, beta)
    weights = torch.stack([_output_weight(kind, scalars) for kind in kinds])
    out = torch.tensordot(weights, outputs, 1).to(query.dtype)
    return EditedAttention(_place(out, query, key, value, frames, scale, key_mask, plan, base), scalars, marginal)


def restrict_keys(plan: BlockPlan, tokens: torch.Tensor) -> BlockPlan:
    """The plan with only the given keys: lists without the tiles that hold none of them, tiles without the other lanes."""
    member = torch.zeros(plan.seqlen_k, dtype=torch.bool, device=plan.device)
    member[tokens] = True
    lanes = plan.key_tiles.long()
    tiles = torch.where((lanes >= 0) & member[lanes.clamp_min(0)], plan.key_tiles, -1)
    stay = (tiles >= 0).any(1)[plan.columns.long()]
    # pseudo-keys stay what they are and weigh as many tokens as they have among these
    tail = None if plan.tail is None else plan.tail.only(member)
    return replace(keep_entries(plan, stay), key_tiles=tiles, tail=tail)


class _DenseFrames:
    """Dense attention of chunks of rows, one call for all frames: the frames stand in the batch."""

    def __init__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        frames: KeyFrames,
        scale: float | None,
        key_mask: torch.Tensor | None,
    ) -> None:
        self.query, self.scale, self.frames = query, scale, frames.frames
        self.frame_kv = [_by_frame(x, frames.tokens) for x in (key, value)]
        self.frame_mask = None if key_mask is None else _by_frame(key_mask, frames.tokens)
        self.kept_kv = [x.index_select(1, frames.kept) for x in (key, value)] if frames.kept.numel() else None
        self.kept_mask = None if key_mask is None else key_mask.index_select(1, frames.kept)

    def __call__(self, rows: slice, head: slice) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, torch.Tensor] | None]:
        """Outputs [T, B, q, h, D], log-sum-exps [B, q, h, T], and both of the kept keys."""
        query = self.query[:, rows, head]
        wide = query.unsqueeze(0).expand(self.frames, *query.shape).flatten(0, 1)
        out, lse = self._attend(wide, self.frame_kv, self.frame_mask, head)
        shape = (self.frames, query.shape[0])
        outs, lses = out.unflatten(0, shape), lse.unflatten(0, shape).movedim(0, -1)
        kept = None if self.kept_kv is None else self._attend(query, self.kept_kv, self.kept_mask, head)
        return outs, lses, kept

    def _attend(
        self, query: torch.Tensor, kv: list[torch.Tensor], mask: torch.Tensor | None, head: slice
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return _attend(query, kv[0][:, :, head], kv[1][:, :, head], self.scale, mask)


class _PlannedFrames:
    """As `_DenseFrames`, under a plan and for all rows of some heads: one call per key frame on the plan cut to it."""

    def __init__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        frames: KeyFrames,
        scale: float | None,
        key_mask: torch.Tensor | None,
        plan: BlockPlan,
    ) -> None:
        self.tensors, self.frames, self.plans = (query, key, value), frames, _frame_plans(plan, frames)
        self.scale, self.key_mask = scale, key_mask

    def __call__(self, rows: slice, head: slice) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, torch.Tensor] | None]:
        """Outputs, log-sum-exps, and both of the kept keys; `rows` must be all."""
        query, key, value = (x[:, :, head] for x in self.tensors)
        results: list[tuple[torch.Tensor, torch.Tensor]] = []
        for plan in self.plans:
            out, lse = block_sparse_attention(
                query, key, value, plan, scale=self.scale, key_mask=self.key_mask, return_lse=True
            )
            results.append((out.index_select(1, self.frames.queries), lse.index_select(1, self.frames.queries)))
        kept = results.pop() if self.frames.kept.numel() else None
        return torch.stack([out for out, _ in results]), torch.stack([lse for _, lse in results], -1), kept


def _frame_plans(plan: BlockPlan, frames: KeyFrames) -> list[BlockPlan]:
    """The plan cut to each edited frame, and to the kept keys last; remembered with the plan."""
    key = ("frame_plans", id(frames))
    if key not in plan.cache:
        pieces = [restrict_keys(plan, tokens) for tokens in frames.tokens]
        if frames.kept.numel():
            pieces.append(restrict_keys(plan, frames.kept))
        plan.cache[key] = (frames, pieces)  # holding `frames` keeps its id from being reused
    held: Any = plan.cache[key]
    return held[1]


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None, key_mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Dense attention with its log-sum-exp: [B, q, H, D] and float32 [B, q, H]."""
    tile = tile_sizes(query.device, query.shape[-1], query.dtype)
    plan = _dense_plan(query.shape[1], key.shape[1], query.device, tile)
    out, lse = block_sparse_attention(query, key, value, plan, scale=scale, key_mask=key_mask, return_lse=True)
    return out, lse


@lru_cache(maxsize=64)
@lasting
def _dense_plan(rows: int, keys: int, device: torch.device, tile: tuple[int, int]) -> BlockPlan:
    return dense_plan(rows, keys, *tile).to(device)


def _by_frame(tensor: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """[B, S, ...] -> [T * B, n, ...], frame by frame."""
    picked = tensor.index_select(1, tokens.flatten())
    return picked.unflatten(1, tuple(tokens.shape)).transpose(0, 1).flatten(0, 1)


def _softmax(lse: torch.Tensor, visible: torch.Tensor | None) -> torch.Tensor:
    """Softmax over frames; a row that sees no frame gets the uniform map, which nothing then reads."""
    lse = lse.float()
    if visible is not None:
        lse = lse.masked_fill(~visible.any(-1, keepdim=True), 0.0)
    return lse.softmax(-1)


def _output_kinds(edit: MapEdit, anchored: bool, change_only: bool) -> tuple[str, ...]:
    """Which maps leave an output: "map", "pull" (towards the anchor), and the high bands of both.

    With alpha known the map and its pull are one, and so are their bands: "guided" and "guided high".
    """
    if not anchored:
        return ("high",) if change_only else ("map", "high")
    if edit.alpha == "auto":
        return ("pull", "high", "pull high") if change_only else ("map", "pull", "high", "pull high")
    return ("known pull", "guided high") if change_only else ("guided", "guided high")


def _output_maps(basis: torch.Tensor, edit: MapEdit, kinds: tuple[str, ...]) -> list[torch.Tensor]:
    """The maps of these kinds, each [B, q, h, T]."""
    anchored = basis.shape[0] == 4
    alpha = 0.0 if edit.alpha == "auto" or not anchored else float(edit.alpha)
    made = {
        "map": lambda: basis[0],
        "pull": lambda: basis[1],
        "high": lambda: basis[2 if anchored else 1],
        "pull high": lambda: basis[3],
        "guided": lambda: basis[0] + alpha * basis[1],
        "known pull": lambda: alpha * basis[1],
        "guided high": lambda: basis[2] + alpha * basis[3],
    }
    return [made[kind]() for kind in kinds]


def _output_weight(kind: str, scalars: EditScalars) -> torch.Tensor:
    one, alpha, gain, both = scalars.coefficients
    return {"pull": alpha, "high": gain, "guided high": gain, "pull high": both}.get(kind, one)


def _mix(
    maps: list[torch.Tensor],
    outs: torch.Tensor,
    lse: torch.Tensor,
    kept: tuple[torch.Tensor, torch.Tensor] | None,
    add_kept: bool,
) -> torch.Tensor:
    """Output of each map, float32 [K, B, q, h, D]; the kept keys' share joins the first, which holds the map itself."""
    mixed = torch.zeros(len(maps), *outs.shape[1:], dtype=torch.float32, device=outs.device)
    for t, out in enumerate(outs):
        out = out.float()
        for total, rows in zip(mixed, maps, strict=True):
            total.addcmul_(rows[..., t, None], out)
    if kept is None:
        return mixed
    share = torch.sigmoid(kept[1].float() - lse.float().logsumexp(-1)).nan_to_num(0.0)[..., None]
    mixed *= 1.0 - share
    if add_kept:
        mixed[0].addcmul_(share, kept[0].float())
    return mixed


def _place(
    out: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    frames: KeyFrames,
    scale: float | None,
    key_mask: torch.Tensor | None,
    plan: BlockPlan | None,
    base: torch.Tensor | None,
) -> torch.Tensor:
    """Put the edited rows into the sequence; the other rows come from `base`, or attend as without an edit."""
    if base is not None:
        return base.index_add(1, frames.queries, out.to(base.dtype))
    whole = torch.empty_like(query)
    whole[:, frames.queries] = out
    if not frames.others.numel():
        return whole
    if plan is None:
        rows = query.index_select(1, frames.others)
        whole[:, frames.others] = _attend(rows, key, value, scale, key_mask)[0]
    else:
        stock, _ = block_sparse_attention(query, key, value, plan, scale=scale, key_mask=key_mask, return_lse=True)
        whole[:, frames.others] = stock[:, frames.others]
    return whole


def _chunks(rows: torch.Tensor, frames: int, chunk_bytes: int, plan: BlockPlan | None) -> Iterator[tuple[slice, slice]]:
    """Slices of rows and heads whose outputs per key frame fit into `chunk_bytes`.

    A plan is for all rows, so only heads are split under one; a plan that differs by head takes all at once.
    """
    batch, length, heads, dim = rows.shape
    if plan is not None and max(plan.num_heads, plan.rule.num_heads if plan.rule else 1) > 1:
        chunk_bytes = frames * rows.numel() * rows.element_size()
    per_head = frames * batch * length * dim * rows.element_size()
    step = max(1, min(heads, chunk_bytes // max(per_head, 1)))
    pieces = max(1, math.ceil(per_head * step / chunk_bytes)) if plan is None else 1
    span = math.ceil(length / min(pieces, length))
    for head in range(0, heads, step):
        for start in range(0, length, span):
            yield slice(start, min(start + span, length)), slice(head, min(head + step, heads))


def _check(query: torch.Tensor, key: torch.Tensor, frames: KeyFrames, anchor: torch.Tensor | None) -> None:
    rows = frames.queries.numel() + frames.others.numel()
    keys = frames.tokens.numel() + frames.kept.numel()
    if query.shape[1] != rows or key.shape[1] != keys:
        raise GenAttnError(
            f"query and key must have the layout's {rows} and {keys} tokens, got {query.shape[1]} and {key.shape[1]}; "
            "frame marginals are for self-attention over the whole clip"
        )
    if anchor is not None and (anchor.shape[1], anchor.shape[3]) != (frames.queries.numel(), frames.frames):
        raise GenAttnError(
            f"the anchor must be [B, {frames.queries.numel()}, H, {frames.frames}], got {tuple(anchor.shape)}; "
            "take it from a block with the same tokens"
        )
