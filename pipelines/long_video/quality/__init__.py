"""How a long video holds up: drift, and measures that need no learned model."""
