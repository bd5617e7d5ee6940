"""Tiny random models, made once a test run and never changed."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from penstock.engine.families.wan.tiny import write_tiny_model

SMALL_VAE = {"base_dim": 8}


@pytest.fixture(scope="session")
def i2v_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image-to-video model."""
    return write_tiny_model(tmp_path_factory.mktemp("i2v"), seed=1, vae=SMALL_VAE)


@pytest.fixture(scope="session")
def t2v_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text-to-video model."""
    folder = tmp_path_factory.mktemp("t2v")
    return write_tiny_model(folder, image_to_video=False, seed=2, vae=SMALL_VAE)


@pytest.fixture(scope="session")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A picture with structure in every direction."""
    path = tmp_path_factory.mktemp("picture") / "picture.png"
    image = Image.radial_gradient("L").resize((96, 80))
    Image.merge("RGB", (image, image.rotate(90), image.transpose(Image.Transpose.ROTATE_180))).save(
        path
    )
    return path
