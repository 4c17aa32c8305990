"""The definition of an edited frame marginal, on the full S x S map in float64; slow and for small sequences only.

A[q, (t, s)] = M[q, t] C[q, s | t],   A'[q, (t, s)] = A M'/M   for edited frames,   A' = A   elsewhere
"""

import torch

from genattn.guidance.broadway.key_frames import KeyFrames
from genattn.guidance.broadway.temporal_map import EditScalars, MapEdit, band_projection, basis_maps, combine, gram, solve


def full_map(
    query: torch.Tensor,
    key: torch.Tensor,
    scale: float | None = None,
    visible: torch.Tensor | None = None,
) -> torch.Tensor:
    """Softmax probabilities, float64 [B, H, S, S].

    Args:
        query, key: [B, S, H, D]; scale: default D ** -0.5; visible: bool, broadcastable to [B, H, S, S].
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = torch.einsum("bqhd,bkhd->bhqk", query.double(), key.double()) * scale
    if visible is not None:
        scores = scores.masked_fill(~visible, float("-inf"))
    return scores.softmax(-1)


def frame_rows(attention: torch.Tensor, frames: KeyFrames) -> tuple[torch.Tensor, torch.Tensor]:
    """Mass of each edited frame per grid query: (normalised over the frames [B, Q, H, T], their sum [B, Q, H, 1])."""
    edited = attention[:, :, frames.queries]
    mass = torch.stack([edited[..., tokens].sum(-1) for tokens in frames.tokens], -1).transpose(1, 2)
    total = mass.sum(-1, keepdim=True)
    return mass / total, total


def reference_edit(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    frames: KeyFrames,
    edit: MapEdit,
    *,
    anchor: torch.Tensor | None = None,
    conditional: slice = slice(None),
    scale: float | None = None,
    visible: torch.Tensor | None = None,
) -> tuple[torch.Tensor, EditScalars]:
    """What `edited_attention` must give: [B, S, H, D] in float64, and the numbers.

    Args: as there; `visible` is the mask of plan and keys together, broadcastable to [B, H, S, S].
    """
    attention = full_map(query, key, scale, visible)
    rows, _ = frame_rows(attention, frames)
    seen = rows > 0 if visible is not None else None
    projection = band_projection(frames.frames, edit.tau, edit.tau_frames)
    basis = basis_maps(rows, anchor, projection, seen)
    measured = basis[:, conditional]
    scalars = solve(gram(measured) / (measured[0].numel() // frames.frames), edit, frames.frames)
    ratio = combine(basis, scalars).double() / rows.clamp_min(1e-300)
    edited = attention.clone()
    for t, tokens in enumerate(frames.tokens):
        block = edited[:, :, frames.queries[:, None], tokens]
        edited[:, :, frames.queries[:, None], tokens] = block * ratio[..., t].transpose(1, 2)[..., None]
    return torch.einsum("bhqk,bkhd->bqhd", edited, value.double()), scalars
