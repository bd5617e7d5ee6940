"""Model families, each a folder behind one protocol."""
