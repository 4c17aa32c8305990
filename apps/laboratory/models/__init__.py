"""What holds for the model configurations of diffusers' own tests. Not in the wheel."""
