"""Noise that belongs to a frame, not to a moment: one seed per (run seed, frame number, purpose, level).

A frame gets the same noise however many frames stand around it, on whatever device and in whichever process it is drawn, so
a run can be resumed, a section can be run again, and two processes agree without talking.
"""

from collections.abc import Sequence

import torch

from genattn.errors import GenAttnError

PURPOSES = {"start": 1, "tail": 2, "step": 3, "renoise": 4, "candidate": 5}
_MASK = (1 << 64) - 1


def _mix(state: int, value: int) -> int:
    # one round of splitmix64: neighbouring seeds must not give related streams
    state = (state + (value & _MASK) + 0x9E3779B97F4A7C15) & _MASK
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
    return state ^ (state >> 31)


def frame_seed(seed: int, frame: int, purpose: str, variant: int = 0) -> int:
    """The 63-bit seed of one draw; `variant` is a level, a tick or a candidate number, whichever tells two draws apart."""
    if purpose not in PURPOSES:
        raise GenAttnError(f"purpose must be one of {', '.join(PURPOSES)}, got {purpose!r}")
    state = 0
    for value in (seed, frame, PURPOSES[purpose], variant):
        state = _mix(state, value)
    return state >> 1


def frame_noise(
    seed: int,
    frames: Sequence[int],
    like: torch.Tensor,
    *,
    purpose: str,
    variants: Sequence[int] | None = None,
) -> torch.Tensor:
    """Standard normal noise [B, C, len(frames), H, W] with the batch, channels, places, dtype and device of `like`.

    frames: frame numbers, any integers. variants: one number per frame (0 for all when left out).
    Drawn in float32 on the CPU and moved, so that it is the same on every device.
    """
    variants = [0] * len(frames) if variants is None else list(variants)
    if len(variants) != len(frames):
        raise GenAttnError(f"variants must be one number per frame, got {len(variants)} for {len(frames)} frames")
    batch, channels, _, height, width = like.shape
    out = torch.zeros(batch, channels, len(frames), height, width)
    generator = torch.Generator()
    for i, (frame, variant) in enumerate(zip(frames, variants)):
        generator.manual_seed(frame_seed(seed, int(frame), purpose, int(variant)))
        out[:, :, i] = torch.randn(batch, channels, height, width, generator=generator)
    return out.to(like)
