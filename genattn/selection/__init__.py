"""Choosing tiles by content: pure functions of queries and keys, one exchangeable part per file."""
