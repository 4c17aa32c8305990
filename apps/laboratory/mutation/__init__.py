"""Whether the tests notice small mistakes. Not in the wheel."""
