"""What plans carry: what it costs, and how exact it is."""
