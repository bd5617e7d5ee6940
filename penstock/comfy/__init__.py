"""ComfyUI's nodes: `nodes` runs in ComfyUI's process, `worker` in one of its own."""
