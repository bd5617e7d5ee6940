"""A running job: its phases, its state, its events, its record."""
