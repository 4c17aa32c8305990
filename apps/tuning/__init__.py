"""Settings found by measurement on one's own model: `genattn tune` and `genattn plan --auto`."""
