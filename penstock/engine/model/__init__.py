"""A model as layouts, manifest and skeletons."""
