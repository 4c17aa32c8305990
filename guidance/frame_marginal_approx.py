"""Cheaper ways to steer the frame marginal; both add a change to the attention's ordinary output, whatever computed it.

    strided      the exact edit on every r-th key of each frame: 1/r of an attention more. r = 1 is exact.
    same-place   the F x F map of one place through time (as Enhance-A-Video measures it), edited and applied to the values
                 of that place: about 1/(tokens per frame) of an attention more. Blind to everything that moves.

With nothing edited both leave the output as it is, bit for bit.
"""

import torch

from genattn.guidance.frame_marginal import CHUNK_BYTES, EditedAttention, KeyFrames, edited_attention
from genattn.guidance.temporal_map import MapEdit, band_projection, basis_maps, gram, solve


def strided_edit(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    frames: KeyFrames,
    edit: MapEdit,
    base: torch.Tensor,
    stride: int,
    *,
    anchor: torch.Tensor | None = None,
    beta: torch.Tensor | None = None,
    conditional: slice = slice(None),
    scale: float | None = None,
    key_mask: torch.Tensor | None = None,
    chunk_bytes: int = CHUNK_BYTES,
) -> EditedAttention:
    """The edit estimated from every `stride`-th key of each frame, added to `base` [B, S, H, D].

    Args: as `edited_attention`. A frame of n keys stands for all of its keys, so the kept keys (text) keep their weight.
    """
    chosen = frames.every(stride)
    share = chosen.tokens.shape[1] / frames.tokens.shape[1]
    return edited_attention(
        query,
        key,
        value,
        chosen,
        edit,
        anchor=anchor,
        beta=beta,
        conditional=conditional,
        scale=scale,
        key_mask=key_mask,
        base=base,
        key_share=share,
        chunk_bytes=chunk_bytes,
    )


def same_place_edit(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    frames: KeyFrames,
    edit: MapEdit,
    base: torch.Tensor,
    *,
    anchor: torch.Tensor | None = None,
    beta: torch.Tensor | None = None,
    conditional: slice = slice(None),
    scale: float | None = None,
) -> EditedAttention:
    """The edit of each place's own frame-to-frame map, added to `base` [B, S, H, D]; rows are [B, T * n, H, T].

    Only the rows of edited frames change; a first frame that is left alone keeps its output.
    """
    rows = same_place_rows(query, key, frames, scale)
    batch, _, places, heads, count = rows.shape
    projection = band_projection(count, edit.tau, edit.tau_frames).to(query.device)
    target = None if anchor is None else _like(anchor, rows)
    basis = basis_maps(rows, target, projection)
    measured = basis[:, conditional]
    scalars = solve(gram(measured) / (measured[0].numel() // count), edit, count, beta)
    weights = scalars.coefficients if target is not None else scalars.coefficients[::2]
    change = torch.zeros_like(rows)
    for weight, part in zip(weights[1:], basis[1:], strict=True):
        change += weight * part
    values = value.index_select(1, frames.tokens.flatten()).unflatten(1, (count, places)).float()
    if values.shape[3] != heads:
        values = values.repeat_interleave(heads // values.shape[3], 3)
    out = torch.einsum("btphu,buphd->btphd", change, values).flatten(1, 2)
    result = base.index_add(1, frames.tokens.flatten(), out.to(base.dtype))
    return EditedAttention(result, scalars, rows.reshape(batch, count * places, heads, count))


def same_place_rows(query: torch.Tensor, key: torch.Tensor, frames: KeyFrames, scale: float | None = None) -> torch.Tensor:
    """Softmax over time at each place: [B, S, H, D] -> float32 [B, T, n, H, T] (query frame, place, head, key frame)."""
    count, places = frames.tokens.shape
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    index = frames.tokens.flatten()
    queries, keys = (x.index_select(1, index).unflatten(1, (count, places)) for x in (query, key))
    if keys.shape[3] != queries.shape[3]:
        keys = keys.repeat_interleave(queries.shape[3] // keys.shape[3], 3)
    scores = torch.einsum("btphd,buphd->bphtu", queries.float() * scale, keys.float())
    return scores.softmax(-1).permute(0, 3, 1, 2, 4)


def _like(anchor: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    anchor = anchor.unflatten(1, rows.shape[1:3])
    return anchor if anchor.shape[3] == rows.shape[3] else anchor.mean(3, keepdim=True)
