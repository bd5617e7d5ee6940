"""HOW BYTES COMPUTE: the arithmetic of each format, in torch."""
