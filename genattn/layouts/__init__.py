"""Where the tokens of each model family stand: one small function per family, collected in `genattn.layouts.families`."""
