"""A model to try the examples on: random weights, the true architecture, a few MB.

    python examples/tiny.py FOLDER

The other examples call `model_and_request`: with ``--model`` they take yours instead.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import penstock
from penstock.engine.families.wan.tiny import write_tiny_model


@contextmanager
def model_and_request(prompt: str) -> Iterator[tuple[Path, penstock.GenerationRequest]]:
    """The model named on the command line with a full request, or the tiny one with a tiny one."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, help="a Wan2.1 text-to-video model")
    model = parser.parse_args().model
    if model is not None:
        with penstock.Engine.open(model) as engine:
            yield model, engine.request(prompt, size="832x480")
        return
    with tempfile.TemporaryDirectory() as folder:
        model = write_tiny_model(Path(folder), image_to_video=False, vae={"base_dim": 8})
        yield model, penstock.GenerationRequest(prompt, width=64, height=48, frames=5, steps=4)


if __name__ == "__main__":
    with model_and_request("a cat yawns") as (model, request):
        print(f"{model}: {request}")
