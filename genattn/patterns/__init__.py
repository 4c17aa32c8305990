"""Which tokens may look at which: one pattern per file."""
