"""The definition of block-sparse attention, which every kernel is held against, and of what stands in for skipped tiles."""

from genattn.kernels.reference.attention import reference_attention
from genattn.kernels.reference.tail import tail_keys

__all__ = ["reference_attention", "tail_keys"]
