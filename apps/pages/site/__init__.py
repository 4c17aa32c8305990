"""docs/ as a site: pages that a forge shows as they are, gathered, with a reference from the docstrings, and built."""
