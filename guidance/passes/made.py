"""Which part of a prediction the pipeline steps with: the rest belongs to what was given, reference images or first frames.

Editing models get reference images behind the latents and answer for both; image-to-video models get the first frames clean.
Pipelines drop that part of the answer, so whatever measures a prediction (a norm, a spread, a projection) must not see it.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from genattn.seam.plugin import Run

Place = tuple[int, torch.Tensor]
"""An axis, and the int64 positions on it that are made."""


def made_part(run: Run, prediction: torch.Tensor, kwargs: Mapping[str, Any], number: int = 0) -> Place | None:
    """The part of `prediction` that the pipeline steps with; None where that is all of it, or where nothing tells.

    Args:
        run: the forward's state.
        prediction: [B, tokens, C] or [B, C, F, H, W].
        kwargs: the forward's arguments by name; a noise level of 0 per token tells of given frames (LTX).
        number: which of the forward's predictions it is. The second is sound, of which the layout tells no more than where it
            stands: reference sound has a noise level of its own (MiniMax-H3).
    """
    if prediction.ndim == 5 and getattr(getattr(run.model, "config", None), "image_condition_type", None) == "token_replace":
        return (2, torch.arange(1, prediction.shape[2])) if prediction.shape[2] > 1 else None
    if prediction.ndim != 3:
        return None
    tokens = prediction.shape[1]
    if number:
        made = _noisy(kwargs.get("audio_timestep"), tokens) & _of_last_level(kwargs, tokens)
    else:
        made = _no_reference(run, tokens) & _noisy(kwargs.get("timestep"), tokens)
    places = made.nonzero().flatten()
    return None if len(places) in (0, len(made)) else (1, places)


def on_made(change: Callable[..., torch.Tensor], place: Place | None, *tensors: torch.Tensor) -> torch.Tensor:
    """`change(*tensors)`, of the part that is made alone; the rest of the first tensor stays as it is."""
    if place is None:
        return change(*tensors)
    axis, rows = place[0], place[1].to(tensors[0].device)
    some = change(*(tensor.index_select(axis, rows) for tensor in tensors))
    return tensors[0].index_copy(axis, rows, some)


def _no_reference(run: Run, tokens: int) -> torch.Tensor:
    """Bool [tokens]: what is no token of a reference, where the layout covers the answer's tokens."""
    parts = [] if run.layout is None else [s for s in run.layout.segments if s.kind in ("grid", "reference")]
    if sum(part.length for part in parts) != tokens:
        return torch.ones(tokens, dtype=torch.bool)
    return torch.cat([torch.full((part.length,), part.kind == "grid") for part in parts])


def _noisy(timestep: Any, tokens: int) -> torch.Tensor:
    """Bool [tokens]: what has a noise level above 0 in some sample."""
    if not isinstance(timestep, torch.Tensor) or timestep.ndim != 2 or timestep.shape[1] != tokens:
        return torch.ones(tokens, dtype=torch.bool)
    return (timestep != 0).any(0).cpu()


def _of_last_level(kwargs: Mapping[str, Any], tokens: int) -> torch.Tensor:
    """Bool [tokens]: the rows of sound whose noise level is that of the last one; what was given stands before."""
    rows, levels = kwargs.get("audio_indices"), kwargs.get("timestep_indices")
    if not isinstance(rows, torch.Tensor) or not isinstance(levels, torch.Tensor) or rows.numel() != tokens:
        return torch.ones(tokens, dtype=torch.bool)
    own = levels[rows]
    return (own == own[-1]).cpu()
