"""Kernels of other libraries behind the same checks as ours: torch's own, flex_attention, and installed packages."""
