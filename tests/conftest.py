"""One torch thread: the tensors here are tiny, and sums then do not depend on the machine."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import settings

# The gate tries the same cases each time; new ones are sought everywhere else.
settings.register_profile("gate", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("gate")


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)
