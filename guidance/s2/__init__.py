"""S2-Guidance: guidance away from the model with blocks dropped at random."""

from genattn.guidance.s2.s2_guidance import S2Guidance

__all__ = ["S2Guidance"]
