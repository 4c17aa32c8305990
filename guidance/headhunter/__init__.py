"""HeadHunter: the search for heads that are worth perturbing."""

from genattn.guidance.headhunter.hunter import HeadHunter

__all__ = ["HeadHunter"]
