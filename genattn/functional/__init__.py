"""Attention under a pattern, as a plain function of tensors."""

from genattn.functional.dispatch import attention

__all__ = ["attention"]
