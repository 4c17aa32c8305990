"""Samplers in which every latent frame stands at its own noise level."""
