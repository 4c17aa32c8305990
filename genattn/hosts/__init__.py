"""Ways in that other programs define: diffusers' attention backends by name, vLLM-Omni's entry point for sparse attention."""
