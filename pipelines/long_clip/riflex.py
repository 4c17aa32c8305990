"""RIFLEx: a clip longer than trained without repeating itself (Zhao et al., ICML 2025, arXiv 2502.15894).

    theta_k <- 0.9 * 2 pi / T        k: the frequency that tells frames apart over the trained clip, T: frames of this clip

A rotary frequency repeats after 2 pi / theta frames. The one whose period just covers the trained clip decides where content
comes back; past its period the model sees frame 0 again. Lowered so that the clip stays within nine tenths of one period, the
repetition goes. Faster ones repeat within the trained clip anyway, slower ones have not come round yet.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from genattn.errors import GenAttnError
from genattn.layouts.site import AttentionSite
from genattn.pipelines.long_clip.rotary_tables import changing, close_tables, open_tables, temporal_frequencies
from genattn.seam.plugin import Plugin, Run


class TemporalRotary(Plugin):
    """A plugin that changes the frames' rotary angles where a clip is longer than `trained_frames` latent frames.

    trained_frames: latent frames of the clip that the model learned, >= 2 (Wan 21, HunyuanVideo 33, CogVideoX 13).
    """

    def __init__(self, trained_frames: int) -> None:
        if trained_frames < 2:
            raise GenAttnError(f"trained_frames must be >= 2 latent frames, got {trained_frames}; Wan 21, HunyuanVideo 33")
        self.trained_frames = trained_frames
        self._changed = 0

    def change(self, frequencies: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Frequencies [d / 2] and positions [T] to use in place of the given ones, float64."""
        raise NotImplementedError

    def attach(self, model: nn.Module, sites: Sequence[AttentionSite]) -> None:
        """See Plugin.attach."""
        open_tables(model)

    def detach(self, model: nn.Module) -> None:
        """See Plugin.detach."""
        close_tables(model)

    def wants(self, site: AttentionSite) -> bool:
        """No attention call is touched."""
        return False

    def begin_run(self, run: Run) -> None:
        """See Plugin.begin_run."""
        self._changed = 0

    def forward(self, run: Run, args: tuple[Any, ...], kwargs: dict[str, Any], inner: Callable[..., Any]) -> Any:
        """One forward with other tables, when the clip is longer than trained."""
        if run.layout is None or run.layout.grid is None or run.model is None:
            reason = run.why_no_layout or "no layout is known"
            raise GenAttnError(f"{type(self).__name__} needs the clip's frames, but {reason}")
        frames = run.layout.grid3[0]
        if frames <= self.trained_frames:
            return inner(*args, **kwargs)
        self._changed += 1
        with changing(run.model, frames, self.change, kwargs) as told:
            return inner(*args, **told)

    def describe(self) -> dict[str, Any]:
        """See Plugin.describe."""
        return {"plugin": type(self).__name__, **self.settings(), "forwards_changed": self._changed}


class RIFLEx(TemporalRotary):
    """See the module. trained_frames: as in TemporalRotary. k: index of the frequency, 0 is the fastest; the fastest one whose
    period covers the trained clip when None (Wan's authors found 5, HunyuanVideo's 3, CogVideoX's 1, counted from 0)."""

    def __init__(self, trained_frames: int, k: int | None = None) -> None:
        super().__init__(trained_frames)
        if k is not None and k < 0:
            raise GenAttnError(f"k must be >= 0, counted from the fastest frequency, got {k}")
        self.k = k

    def attach(self, model: nn.Module, sites: Sequence[AttentionSite]) -> None:
        """See Plugin.attach; k must exist."""
        count = len(temporal_frequencies(model))
        if self.k is not None and self.k >= count:
            raise GenAttnError(f"k must be below {count}, the frequencies that {model.__class__.__name__} has, got {self.k}")
        super().attach(model, sites)

    def change(self, frequencies: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See TemporalRotary.change; a frequency is lowered, never raised."""
        k = intrinsic(frequencies, self.trained_frames) if self.k is None else self.k
        lowered = frequencies.clone()
        lowered[k] = min(float(lowered[k]), 0.9 * 2 * math.pi / len(positions))
        return lowered, positions

    def settings(self) -> dict[str, Any]:
        """See Plugin.settings."""
        return {"trained_frames": self.trained_frames, "k": self.k}


class FrameStretch(TemporalRotary):
    """Position interpolation: all frames at rotary positions that the trained clip had, closer together (Chen et al., arXiv
    2306.15595). Time runs slower; what was to happen in a trained clip takes the long one. share: 1 squeezes into the trained
    clip, 0 leaves the positions alone."""

    def __init__(self, trained_frames: int, share: float = 1.0) -> None:
        super().__init__(trained_frames)
        if not 0 <= share <= 1:
            raise GenAttnError(f"share must be 0 (stock) to 1 (squeezed into the trained clip), got {share}")
        self.share = share

    def change(self, frequencies: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See TemporalRotary.change."""
        squeezed = (self.trained_frames - 1) / (len(positions) - 1)
        return frequencies, positions * squeezed**self.share

    def settings(self) -> dict[str, Any]:
        """See Plugin.settings."""
        return {"trained_frames": self.trained_frames, "share": self.share}


def intrinsic(frequencies: torch.Tensor, trained_frames: int) -> int:
    """Index of the fastest frequency that does not come round within the trained clip; the slowest if all do."""
    covering = torch.nonzero(2 * math.pi / frequencies >= trained_frames).flatten()
    return int(covering[0]) if len(covering) else len(frequencies) - 1
