"""Names of attention heads, and files that hold sets of them."""
