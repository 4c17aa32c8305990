"""What a user may want to measure on their own machine."""
