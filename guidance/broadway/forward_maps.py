"""What the guided attentions of one forward of a denoiser share: the maps of its anchors, and whose sequences are whose."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch

from genattn.errors import GenAttnError
from genattn.guidance.broadway.blocks import GuidedSites
from genattn.guidance.broadway.calls import ClipShape, sample_groups
from genattn.guidance.broadway.temporal_map import resize_anchor


@dataclass
class ForwardMaps:
    """One forward of the denoiser. Keys of maps begin with the extra pass's name.

    Attributes:
        conditional: part of the batch on which energies are measured, (first, last) as fractions.
        clip: the video's shape, or None where the forward does not tell it.
        guided: the denoiser's guided attentions and their anchors.
        calls: how often each attention was called so far.
        maps: anchors' maps.
        mean: running sum of the clip's maps, and of how many.
        key_masks: masks that were read already, by shape.
        samples: of the pipeline; each is edited by its own energies, so that its neighbours in the batch do not matter.
    """

    conditional: tuple[float, float]
    clip: ClipShape | None
    guided: GuidedSites
    calls: Counter[tuple[str | None, str]] = field(default_factory=Counter)
    maps: dict[tuple[str | None, str, int], torch.Tensor] = field(default_factory=dict)
    mean: dict[str | None, tuple[torch.Tensor, int]] = field(default_factory=dict)
    key_masks: dict[torch.Size, torch.Tensor | None] = field(default_factory=dict)
    samples: int = 1

    def anchor(self, extra: str | None, source: str, index: int) -> torch.Tensor | None:
        """The anchor's map; an extra pass that skipped the anchor shares it with the pass it belongs to."""
        own = self.maps.get((extra, source, index))
        return self.maps.get((None, source, index)) if own is None else own

    def measured_part(self, extra: str | None) -> tuple[float, float]:
        """Where energies are measured, (first, last) as fractions of the batch: all of an extra pass."""
        return (0.0, 1.0) if extra else self.conditional

    def of_main_pass(self) -> "ForwardMaps":
        """The maps alone, for an extra pass that another plugin runs as a forward of its own."""
        maps = {k: v for k, v in self.maps.items() if k[0] is None}
        return ForwardMaps(self.conditional, self.clip, self.guided, maps=maps, samples=self.samples)

    def sequences(self, rows: torch.Tensor) -> list[torch.Tensor | None]:
        """The sequences of each sample among a motion module's maps [B * h * w, H, F, F]; those of one entry lie together."""
        if self.clip is None:
            return [None]
        height, width = self.clip.places(rows.shape[0])
        batch = rows.shape[0] // (height * width)
        groups = sample_groups(self.samples, batch, rows.device)
        inside = torch.arange(height * width, device=rows.device)
        return [None if group is None else (group[:, None] * (height * width) + inside).flatten() for group in groups]

    def motion_anchor(self, rows: torch.Tensor, extra: str | None, source: str, index: int) -> torch.Tensor:
        """The anchor's map of a motion module, at the resolution of `rows` [B * h * w, H, F, F].

        Raises:
            GenAttnError: if the anchor did not run, or has another resolution and the forward does not tell the clip's shape.
        """
        anchor = self.anchor(extra, source, index)
        if anchor is None:
            raise no_anchor(source)
        if anchor.shape == rows.shape:
            return anchor
        if self.clip is None:
            raise GenAttnError(
                f"an anchor of another resolution needs latents of shape [B, C, F, H, W], got maps {tuple(anchor.shape)} "
                f"and {tuple(rows.shape)} and no such input; guide blocks of one resolution with `blocks`"
            )
        there, here = self.clip.places(anchor.shape[0]), self.clip.places(rows.shape[0])
        return resize_anchor(anchor, there, here, rows.shape[1])


def batch_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Entries of the batch that a forward of a denoiser was given; 1 where its inputs do not tell."""
    given = next((x for x in (*args[:1], kwargs.get("sample"), kwargs.get("hidden_states")) if x is not None), None)
    return len(given) if given is not None else 1


def no_anchor(source: str) -> GenAttnError:
    """What is said when the anchor of a guided block did not run."""
    return GenAttnError(
        f"the anchor must run before the blocks it guides, got no call of {source!r} in this forward; a cache may have skipped "
        "it: take the cache off, or name another anchor"
    )
