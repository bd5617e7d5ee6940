"""How many patches Qwen3-VL sees of a picture. Free of torch: a plan counts them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

PROCESSOR: Mapping[str, Any] = MappingProxyType({
    "size": {"shortest_edge": 65536, "longest_edge": 16777216}, "patch_size": 16,
    "temporal_patch_size": 2, "merge_size": 2, "rescale_factor": 1 / 255, "resample": 3,
    "image_mean": (0.5, 0.5, 0.5), "image_std": (0.5, 0.5, 0.5),
})  # fmt: skip
"""How pictures are prepared where a model comes without its config. Source: Qwen3-VL's
``preprocessor_config.json``; its edges are numbers of pixels."""


def seen_size(height: int, width: int, processor: Mapping[str, Any] = PROCESSOR) -> tuple[int, int]:
    """Return the height and width that a picture is scaled to: whole tokens, and not too few pixels
    or too many. As transformers' ``smart_resize``."""
    config = {**PROCESSOR, **processor}
    side = config["patch_size"] * config["merge_size"]
    edges = {**PROCESSOR["size"], **config["size"]}
    least, most = edges["shortest_edge"], edges["longest_edge"]
    rows, columns = round(height / side) * side, round(width / side) * side
    if rows * columns > most:
        shrink = math.sqrt(height * width / most)
        return (
            max(side, math.floor(height / shrink / side) * side),
            max(side, math.floor(width / shrink / side) * side),
        )
    if rows * columns < least:
        grow = math.sqrt(least / (height * width))
        return math.ceil(height * grow / side) * side, math.ceil(width * grow / side) * side
    return rows, columns


def grid(height: int, width: int, processor: Mapping[str, Any] = PROCESSOR) -> tuple[int, int]:
    """Return the patches of a picture of that size, down and across."""
    patch = {**PROCESSOR, **processor}["patch_size"]
    rows, columns = seen_size(height, width, processor)
    return rows // patch, columns // patch


def tokens(height: int, width: int, processor: Mapping[str, Any] = PROCESSOR) -> int:
    """Return the tokens that stand for a picture of that size, its two marks and its name
    included."""
    merge = {**PROCESSOR, **processor}["merge_size"]
    down, across = grid(height, width, processor)
    return down * across // int(merge) ** 2 + 2 + LABEL_TOKENS


LABEL = "<Picture {}>: "
LABEL_TOKENS = 16
"""The most that the name of a picture takes: its bytes."""

MARKS = ("<|vision_start|>", "<|image_pad|>", "<|vision_end|>")
