"""Extra forwards of a denoiser: which part is conditional, what is replaced, and what the difference adds."""
