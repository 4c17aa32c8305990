"""The tiny world, its oracle, and the models trained on it."""
