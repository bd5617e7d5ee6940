"""Any file of weights: found, recognised by its keys and header, described, read."""
