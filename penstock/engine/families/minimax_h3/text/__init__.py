"""The text encoder of MiniMax-H3: the first layers of Qwen3-VL."""
