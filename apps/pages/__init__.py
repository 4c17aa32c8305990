"""What makes this repository's pages: tables, figures, evidence. Not in the wheel."""
