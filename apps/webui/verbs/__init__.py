"""What the tabs do: work with limits, progress and cancel; no page in it."""
