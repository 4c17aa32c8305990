"""SoftPAG: guidance by perturbing chosen attention heads."""

from genattn.guidance.softpag.softpag import SoftPAG

__all__ = ["SoftPAG"]
