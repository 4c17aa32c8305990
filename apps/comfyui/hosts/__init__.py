"""What ComfyUI's own models are to us, one file per question: which blocks, which tokens, which attention function."""
