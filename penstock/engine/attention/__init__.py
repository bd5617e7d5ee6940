"""What self-attention runs on."""
