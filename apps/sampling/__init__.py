"""One sampling run: loading, checking, running, comparing, writing."""
