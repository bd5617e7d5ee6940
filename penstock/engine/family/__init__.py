"""What a family of models is, and the families there are."""
