"""One torch thread: the tensors here are tiny, and sums then do not depend on the machine."""

from __future__ import annotations

import os

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _own_data_directory(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Jobs of tests are not kept among the user's."""
    os.environ["PENSTOCK_DATA_DIR"] = str(tmp_path_factory.mktemp("data"))


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)
