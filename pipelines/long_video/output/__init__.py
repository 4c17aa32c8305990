"""Frames and checkpoints on their way to disk."""
