"""BroadWay as published: edit the frame-to-frame map of a motion module's attention.

    out = A2 (I + g P) V,   A2 = A + alpha (A_anchor - A),   g = beta - 1,   P: projection on the high band

The edited map is never formed: the band acts on the values, F frames of them, and the energies come from A2's F x F Gram
matrix. `temporal_map.edit_map` forms it, `temporal_map.published_edit` is the definition.
"""

import torch

from genattn.guidance.broadway.temporal_map import (
    EditScalars,
    Energies,
    MapEdit,
    anchor_share,
    band_projection,
    solve_energies,
)


def motion_map(query: torch.Tensor, key: torch.Tensor, scale: float | None = None) -> torch.Tensor:
    """Softmax over key frames: [N, F, H, D] twice -> float32 [N, H, F, F]; N = samples x places."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = (query.transpose(1, 2).float() * scale) @ key.permute(0, 2, 3, 1).float()
    return scores.softmax(-1)


def motion_attention(
    rows: torch.Tensor,
    value: torch.Tensor,
    edit: MapEdit,
    *,
    anchor: torch.Tensor | None = None,
    conditional: slice = slice(None),
    beta: torch.Tensor | None = None,
) -> tuple[torch.Tensor, EditScalars]:
    """Attention with the edited map.

    Args:
        rows: `motion_map`, [N, H, F, F].
        value: [N, F, H, D].
        edit: what to do with the map.
        anchor: the anchor's map at this resolution, [N, H, F, F]; None in the anchor block itself.
        conditional: entries of the first axis on which energies are measured.
        beta: 0-dim; use this factor instead of measuring one.

    Returns:
        [N, F, H, D] in the value's type, and the numbers.
    """
    frames = rows.shape[-1]
    measured = rows[conditional]
    count = measured.numel() // frames
    e1 = measured.square().sum() / count
    alpha, disparity2 = torch.zeros_like(e1), torch.zeros_like(e1)
    guided = rows
    if anchor is not None:
        disparity2 = (anchor[conditional] - measured).square().sum() / count
        alpha = anchor_share(edit, anchor[conditional].square().sum() / count, disparity2, frames)
        guided = torch.lerp(rows, anchor, alpha)
    flat = guided[conditional].reshape(-1, frames)
    squares = flat.T @ flat / count
    projection = band_projection(frames, edit.tau, edit.tau_frames).to(rows.device, torch.float32)
    high = (squares * projection).sum()
    scalars = solve_energies(Energies(e1, squares.diagonal().sum(), high, high, disparity2), edit, alpha, beta)
    mixing = torch.eye(frames, device=rows.device) + (scalars.beta - 1.0) * projection
    values = mixing @ value.flatten(2).float()
    out = guided @ values.unflatten(2, value.shape[2:]).transpose(1, 2)
    return out.transpose(1, 2).to(value.dtype), scalars
