"""The `genattn` command."""

from genattn.apps.cli.root import main

__all__ = ["main"]
