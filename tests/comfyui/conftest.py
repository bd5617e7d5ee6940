"""The nodes in a ComfyUI that is none."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from types import ModuleType

import pytest

from tests.comfyui import fake

NODES = "penstock.comfy.nodes"


@pytest.fixture(scope="module")
def comfyui(tmp_path_factory: pytest.TempPathFactory) -> Iterator[fake.ComfyUI]:
    """What the nodes find in the place of ComfyUI."""
    made = fake.comfyui(tmp_path_factory.mktemp("comfyui"))
    with pytest.MonkeyPatch.context() as patch:
        for name, module in made.modules().items():
            patch.setitem(sys.modules, name, module)
        yield made


@pytest.fixture(scope="module")
def nodes(comfyui: fake.ComfyUI) -> Iterator[ModuleType]:
    """The module of the nodes; its worker ends with the tests."""
    module = importlib.import_module(NODES)
    yield module
    module.WORKER.rest()
    del sys.modules[NODES]
