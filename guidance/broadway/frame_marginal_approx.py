"""A cheaper way to steer the frame marginal, and the map of each place through time.

    pooled       the exact edit on keys and values averaged over cells of p x p places: 1/p^2 of an attention more, added to the
                 attention's ordinary output, whatever computed it. p = 1 is exact, one cell per frame costs next to nothing.

With nothing edited the output is left as it is, bit for bit. Taking every p-th key instead of averages was measured too: on a
trained video model it is further from the exact change than no change at all, and so is editing each place's own map.
"""

import torch
import torch.nn.functional as F

from genattn.guidance.broadway.frame_marginal import CHUNK_BYTES, EditedAttention, edited_attention
from genattn.guidance.broadway.key_frames import KeyFrames
from genattn.guidance.broadway.temporal_map import MapEdit


def pooled_edit(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    frames: KeyFrames,
    places: tuple[int, int],
    edit: MapEdit,
    base: torch.Tensor,
    pool: int,
    *,
    anchor: torch.Tensor | None = None,
    beta: torch.Tensor | None = None,
    conditional: slice = slice(None),
    scale: float | None = None,
    key_mask: torch.Tensor | None = None,
    chunk_bytes: int = CHUNK_BYTES,
) -> EditedAttention:
    """The edit estimated from averaged keys and values, added to `base` [B, S, H, D].

    Args: as `edited_attention`; places: (h, w) of a frame; pool: side p of a cell, >= 1; ragged frames get near-equal cells.
        An average stands for the keys it was taken from, so the kept keys (text) keep their weight.
    """
    count, cells = frames.frames, (-(-places[0] // pool), -(-places[1] // pool))
    shown = None if key_mask is None else key_mask.index_select(1, frames.tokens.flatten())
    keys, values = (
        torch.cat([_pool(x, frames, places, cells, shown), x.index_select(1, frames.kept)], 1) for x in (key, value)
    )
    cell_count = cells[0] * cells[1]
    index = torch.arange(keys.shape[1], device=key.device)
    pooled = KeyFrames(
        index[: count * cell_count].view(count, cell_count), index[count * cell_count :], frames.queries, frames.others
    )
    mask = None
    if key_mask is not None and shown is not None:
        any_shown = _cells(shown.float()[..., None], count, places, cells)[..., 0] > 0
        mask = torch.cat([any_shown, key_mask.index_select(1, frames.kept)], 1)
    return edited_attention(
        query,
        keys,
        values,
        pooled,
        edit,
        anchor=anchor,
        beta=beta,
        conditional=conditional,
        scale=scale,
        key_mask=mask,
        base=base,
        key_share=cell_count / frames.tokens.shape[1],
        chunk_bytes=chunk_bytes,
    )


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


def _pool(
    tensor: torch.Tensor,
    frames: KeyFrames,
    places: tuple[int, int],
    cells: tuple[int, int],
    shown: torch.Tensor | None,
) -> torch.Tensor:
    """[B, S, H, D] -> averages [B, T * cells, H, D] over the tokens of each cell that are not hidden."""
    tokens = tensor.index_select(1, frames.tokens.flatten())
    flat = tokens.flatten(2).float()
    if shown is None:
        mean = _cells(flat, frames.frames, places, cells)
    else:
        visible = shown.float()[..., None]
        total = _cells(flat.masked_fill(~shown[..., None], 0.0), frames.frames, places, cells)
        mean = total / _cells(visible, frames.frames, places, cells).clamp_min(1e-6)
    return mean.to(tensor.dtype).unflatten(2, tuple(tensor.shape[2:]))


def _cells(flat: torch.Tensor, count: int, places: tuple[int, int], cells: tuple[int, int]) -> torch.Tensor:
    """Means over near-equal cells: [B, T * h * w, C] -> [B, T * cells, C]."""
    batch, _, channels = flat.shape
    planes = flat.reshape(batch * count, *places, channels).permute(0, 3, 1, 2)
    pooled = F.adaptive_avg_pool2d(planes, cells).permute(0, 2, 3, 1)
    return pooled.reshape(batch, -1, channels)
