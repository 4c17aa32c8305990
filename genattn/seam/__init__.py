"""How a stock diffusers model is told: sites, plugins, the chain they form, and the way back."""
