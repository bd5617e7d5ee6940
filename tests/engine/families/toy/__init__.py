"""A family that the package does not know: all there is of it lies in this folder."""
