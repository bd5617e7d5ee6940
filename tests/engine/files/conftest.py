"""A tiny model as folders and as single files."""

import pytest
import torch

from tests.engine import golden


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return golden.write_model(tmp_path_factory.mktemp("model") / "m")


@pytest.fixture(scope="module")
def single(model, tmp_path_factory):
    """One file a component under its author's names; the text encoder carries a tokenizer."""
    folder = tmp_path_factory.mktemp("single")
    paths = {}
    for part in golden.PARTS:
        tensors = golden.load(model, part)
        if part == "image_encoder":
            made = golden.Stored()
            made.file = {f"vision_model.{name}": tensor for name, tensor in tensors.items()}
        else:
            made = golden.make(tensors, golden.original_names(part, list(tensors)), "bf16")
        if part == "text_encoder":
            made.file["spiece_model"] = torch.arange(5, dtype=torch.uint8)
        paths[part] = made.save(folder / f"{part}.safetensors")
    return paths
