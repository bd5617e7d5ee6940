"""LoRA files: read, placed beside the weights they belong to, or merged."""
