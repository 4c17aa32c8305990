"""Attention inside decoders: plugins for what turns latents into frames."""
