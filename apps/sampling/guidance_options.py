"""Guidance as a command names it: SoftPAG on heads or a head set, BroadWay, Enhance-A-Video."""

import math
from dataclasses import dataclass
from pathlib import Path

from genattn.errors import GenAttnError
from genattn.seam.plugin import Plugin


@dataclass(frozen=True)
class GuidanceSettings:
    """None leaves a method out.

    softpag: heads such as L3H1,L5 or a head set's JSON file; softpag_u in [0, 1] and softpag_scale >= 0 as in `SoftPAG`.
    broadway: the strength alpha, or the name of a preset. enhance: weight of Enhance-A-Video.
    """

    softpag: str | None = None
    softpag_u: float = 0.5
    softpag_scale: float = 3.0
    broadway: str | None = None
    enhance: float | None = None

    def __post_init__(self) -> None:
        if self.enhance is not None and not math.isfinite(self.enhance):
            raise GenAttnError(f"--enhance must be a finite number, got {self.enhance}")
        if self.softpag is not None and self.softpag.endswith(".json") and not Path(self.softpag).is_file():
            raise GenAttnError(f"--softpag must name heads (L3H1,L5) or a head set's file, and there is no {self.softpag!r}")
        self.plugins()  # what they refuse is known before a model is opened

    def plugins(self) -> list[Plugin]:
        """Fresh plugins, outermost first.

        Raises GenAttnError for heads, strengths or presets that the methods refuse.
        """
        found: list[Plugin] = []
        if self.softpag is not None:
            from genattn.guidance.heads.head_set import HeadSet
            from genattn.guidance.softpag import SoftPAG

            heads = HeadSet.load(self.softpag) if self.softpag.endswith(".json") else self.softpag
            found.append(SoftPAG(heads, u=self.softpag_u, scale=self.softpag_scale))
        if self.broadway is not None:
            found.append(_broadway(self.broadway))
        if self.enhance is not None:
            from genattn.guidance.broadway.enhance_a_video import EnhanceAVideo

            found.append(EnhanceAVideo(self.enhance))
        return found

    @property
    def name(self) -> str:
        """The methods in use, empty for none."""
        used = (("softpag", self.softpag), ("broadway", self.broadway), ("enhance-a-video", self.enhance))
        return ", ".join(name for name, value in used if value is not None)


def _broadway(text: str) -> Plugin:
    from genattn.guidance.broadway.broadway import PRESETS, BroadWay

    if text in PRESETS:
        return BroadWay.preset(text)
    try:
        alpha = float(text)
    except ValueError:
        raise GenAttnError(f"--broadway must be a strength (0.3) or one of {', '.join(PRESETS)}, got {text!r}") from None
    return BroadWay(alpha=alpha, energy="+20%")
