"""`python -m genattn <command>`: hands over to the command line."""

from genattn.apps.cli.root import main

if __name__ == "__main__":
    main()
