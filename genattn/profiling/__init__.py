"""What a user's own model tells when it is measured."""
