"""The training loop that fine-tuning and the tiny models share."""
