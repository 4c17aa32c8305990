"""How strongly NAG pushes when nothing else is asked for: the authors' released values.

Their repository ChenDarYen/Normalized-Attention-Guidance: the examples of its README for FLUX.1-schnell (scale 5), Wan 2.1
14B (9), SD3.5 large turbo (5) and SDXL with DMD2 (3); tau 2.5 and alpha 0.25 are the defaults of its pipelines, alpha 0.5
that of its UNet processor. Models that they did not release take the first row.
"""

from collections.abc import Mapping
from typing import Any

from genattn.guidance.nag.formula import Strength

RELEASED = Strength(scale=5.0, tau=2.5, alpha=0.25)
_WAN = Strength(scale=9.0, tau=2.5, alpha=0.25)
_UNET = Strength(scale=3.0, tau=2.5, alpha=0.5)
BY_MODEL: dict[str, Strength] = {
    "WanTransformer3DModel": _WAN,
    "WanVACETransformer3DModel": _WAN,
    "WanAnimateTransformer3DModel": _WAN,
    "ChronoEditTransformer3DModel": _WAN,
    "SkyReelsV2Transformer3DModel": _WAN,
    "UNet2DConditionModel": _UNET,
    "UNetMotionModel": _UNET,
}


def strength_for(model: str, given: Mapping[str, Any]) -> Strength:
    """What was given, the rest as released for a denoiser class; raises GenAttnError for values out of range."""
    released = vars(BY_MODEL.get(model, RELEASED))
    return Strength(**{name: released[name] if given.get(name) is None else given[name] for name in released})
