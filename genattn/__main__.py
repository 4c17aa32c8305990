"""`python -m genattn <command>`: hands over to the command line."""

from importlib import import_module

if __name__ == "__main__":
    # by name, so that the package's own folder imports nothing of what stands above it
    import_module("genattn.apps.cli").main()
