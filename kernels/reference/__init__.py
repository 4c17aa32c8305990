"""The definition of block-sparse attention, which every kernel is held against."""

from genattn.kernels.reference.attention import reference_attention

__all__ = ["reference_attention"]
