"""What a download lacks, where its index is hostile."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from penstock.engine.files.incomplete import check_whole
from penstock.errors import CheckpointError

INDEX = {"vae": ["diffusers", "AutoencoderKLWan"]}


@pytest.mark.parametrize("content", ["pipe", "deep", "another", "whole"])
def test_an_index_of_shards_is_opened_as_a_config_is(content: str, tmp_path: Path) -> None:
    """The others say so when they are opened for their weights."""
    (tmp_path / "vae").mkdir()
    path = tmp_path / "vae" / "x.safetensors.index.json"
    if content == "pipe":
        if os.name == "nt":
            pytest.skip("POSIX pipes")
        os.mkfifo(path)
    else:
        texts = {"deep": "[" * 100_000, "another": '{"weight_map": [1]}',
                 "whole": '{"weight_map": {"a": "x.safetensors"}}'}  # fmt: skip
        path.write_text(texts[content])
    if content == "whole":
        with pytest.raises(CheckpointError, match=r"vae/x\.safetensors"):
            check_whole(tmp_path / "model_index.json", INDEX, ["vae"])
    else:
        check_whole(tmp_path / "model_index.json", INDEX, ["vae"])
