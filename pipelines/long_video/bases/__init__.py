"""The model families that can serve a queue, one file each."""
