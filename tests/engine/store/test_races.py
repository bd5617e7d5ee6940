"""Processes on one job folder and on one cache: nothing is lost, and nobody is disturbed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from penstock.engine.files.locate import locate
from penstock.engine.packs.plan import plan_component
from tests.engine import golden
from tests.faults.races import one_cache, one_folder, removed_and_begun

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def test_races_for_one_folder(tmp_path: Path) -> None:
    assert one_folder(tmp_path, races=20) == (20, 0)


def test_races_of_removal_and_beginning(tmp_path: Path) -> None:
    assert removed_and_begun(tmp_path, races=20) == (20, 0)


def test_races_for_one_pack(tmp_path: Path) -> None:
    model = golden.write_model(tmp_path / "model", image_to_video=False)
    plan = plan_component(locate(model).streamed, "int8")
    assert one_cache(plan, tmp_path / "caches", races=5) == (5, 0)
