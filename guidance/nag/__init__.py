"""NAG: a negative prompt inside the attention, for distilled models and guidance scale 1."""

from genattn.guidance.nag.nag import NAG

__all__ = ["NAG"]
