"""The tangential part of a prediction, amplified (arXiv 2510.04533).

    n = x / |x|_2,   radial = (p . n) n,   tangential = p - radial          per sample
    p' = radial + eta tangential

The paper amplifies the tangential part of a step's update. A step that is linear in x and in one prediction, as Euler's,
DDIM's and those of flow matching are, moves along x and along p; x has no tangential part, so both come to the same.
`amplify` is what runs, `amplify_reference` the definition in float64, one sample at a time.
"""

import torch

from genattn.errors import GenAttnError
from genattn.guidance.passes.made import Place, on_made


def amplify(prediction: torch.Tensor, latents: torch.Tensor, eta: float) -> torch.Tensor:
    """p' for a prediction at the latents.

    Args:
        prediction: [B, ...], floating point.
        latents: the same shape.
        eta: factor of the tangential part.

    Returns:
        The same shape and dtype, computed in at least float32.
    """
    wide = torch.promote_types(prediction.dtype, torch.float32)
    given, basis = prediction.to(wide), latents.to(wide)
    dims = tuple(range(1, given.ndim))
    square = basis.square().sum(dims, keepdim=True)
    share = (given * basis).sum(dims, keepdim=True) / torch.where(square > 0, square, torch.ones_like(square))
    return (eta * given + (1 - eta) * share * basis).to(prediction.dtype)


def amplify_reference(prediction: torch.Tensor, latents: torch.Tensor, eta: float) -> torch.Tensor:
    """The definition, float64, sample by sample."""
    answers = []
    for p, x in zip(prediction.double(), latents.double(), strict=True):
        norm = torch.linalg.vector_norm(x)
        unit = x / norm if float(norm) > 0 else torch.zeros_like(x)
        radial = (p * unit).sum() * unit
        answers.append(radial + eta * (p - radial))
    return torch.stack(answers)


def amplified(
    prediction: torch.Tensor, latents: torch.Tensor | list[torch.Tensor], eta: float, place: Place | None = None
) -> torch.Tensor:
    """`amplify` for a denoiser's answer and input.

    Leading channels are compared: further ones of the input carry a condition (image-to-video), further ones of the answer
    a variance (PixArt, Latte), which is handed on. Channels come first or last, or behind the frames (CogVideoX).

    Args:
        prediction: [B, ...].
        latents: what the denoiser was given for it.
        eta: factor of the tangential part.
        place: the part that the pipeline steps with, see `made_part`; all else is handed on.

    Raises:
        GenAttnError: if they differ in anything else.
    """
    if isinstance(latents, list) and len({part.shape for part in latents}) > 1:
        raise GenAttnError("TAG needs latents of one shape, got a list of several; run them one at a time")
    given = torch.stack(latents) if isinstance(latents, list) else latents
    axis = given.ndim - 1 if given.ndim == 3 else 1
    if given.ndim == 5 == prediction.ndim and given.shape[1] == prediction.shape[1] and given.shape[2] > prediction.shape[2]:
        axis = 2  # [B, F, C, H, W] with channels of a condition
    channels = min(given.shape[axis], prediction.shape[axis]) if given.ndim == prediction.ndim else 0
    if not channels or given.narrow(axis, 0, channels).shape != prediction.narrow(axis, 0, channels).shape:
        raise GenAttnError(
            f"TAG needs predictions of the latents' shape, got {tuple(prediction.shape)} for {tuple(given.shape)}; "
            "this model predicts something else"
        )
    lead, rest = prediction.narrow(axis, 0, channels), prediction.narrow(axis, channels, prediction.shape[axis] - channels)
    changed = on_made(lambda p, x: amplify(p, x, eta), place, lead, given.narrow(axis, 0, channels))
    return torch.cat([changed, rest], axis)
