"""TAG: what turns the sample is amplified over what only scales it, at no further pass."""

from genattn.guidance.tag.tag import TAG

__all__ = ["TAG"]
