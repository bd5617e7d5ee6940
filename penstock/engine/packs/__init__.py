"""Packs: quantised, block-contiguous, checksummed safetensors; made, kept and read."""
