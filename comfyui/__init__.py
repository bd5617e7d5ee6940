"""penstock's nodes: a folder for ComfyUI's custom_nodes. This file alone does as well, under any
name, where penstock is installed: all else is in the package."""

import logging
import sys
from importlib.util import find_spec

# ComfyUI takes what has NODE_CLASS_MAPPINGS, even empty, for a pack of the first API: it then says
# nothing of its own, and looks for no `comfy_entrypoint`.
try:
    from comfy_api.latest import ComfyExtension, io  # noqa: F401 (whether they are there)
except ImportError:
    logging.warning(
        "penstock's nodes need a ComfyUI with V3 nodes (comfy_api.latest.io, since August 2025): "
        "update ComfyUI. Until then there are none of them."
    )
    NODE_CLASS_MAPPINGS = {}
else:
    if find_spec("penstock") is None:
        logging.warning(
            "penstock's nodes need penstock in ComfyUI's own Python: %s -m pip install penstock",
            sys.executable,
        )
        NODE_CLASS_MAPPINGS = {}
    else:
        from penstock.comfy.nodes import comfy_entrypoint

        __all__ = ["comfy_entrypoint"]
