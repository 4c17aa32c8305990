"""Tensors that several processes share: who sends which part to whom, with gradients."""
