"""What stacks with what: neighbours on the same model, each under each of our methods, in every order, against a reference."""
