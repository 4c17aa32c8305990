"""This repository's own measurements. Not in the wheel."""
