"""What the methods do on the tiny models: the studies behind the tables. Not in the wheel."""
