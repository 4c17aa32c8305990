"""What a kernel eats: tiles, lists of key tiles, and the rules inside them."""
