"""What GenAttn puts on a clone of ComfyUI's MODEL: plugins on its attention, guidance after its CFG, a sampler of its own."""
