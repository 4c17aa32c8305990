"""What a pattern costs and which settings suit a model, from geometry and published shapes."""
