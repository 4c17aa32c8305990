"""The latent queue, and what runs its windows."""
