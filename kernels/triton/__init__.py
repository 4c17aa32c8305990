"""The Triton kernels and their host sides."""
