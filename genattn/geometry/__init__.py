"""Token layouts, tiles and block plans: pure geometry, no model and no kernel."""
