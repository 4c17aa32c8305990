"""One clip longer than its model was trained for, by plugins on the stock pipeline."""
