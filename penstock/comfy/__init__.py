"""ComfyUI's nodes: `nodes` runs in ComfyUI's process, `worker` and `desk` in one of their own."""
