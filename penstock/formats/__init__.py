"""WHAT A WEIGHT FORMAT IS: its bytes, its bounds, its name; torch-free."""
