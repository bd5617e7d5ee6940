"""Blocks are counted by their names, and no name makes more of them than there are tensors."""

from __future__ import annotations

import pytest

from penstock.engine.family.naming import Naming, ShapesOf
from penstock.errors import TensorMismatch


def count(*names: str) -> int:
    return ShapesOf("x", dict.fromkeys(names, (1,))).count("blocks.")


def test_blocks_are_counted_by_their_largest_number() -> None:
    assert count("blocks.0.a", "blocks.1.a", "blocks.1.b", "other.7.a") == 2
    assert count("other") == 0
    assert count("blocks.0.a", "blocks.2.a", "blocks.2.b") == 3  # what is missing is told later


@pytest.mark.parametrize("number", ["3", "10000", "999999"])
def test_a_large_number_is_refused(number: str) -> None:
    with pytest.raises(TensorMismatch, match="is incomplete"):
        count(f"blocks.{number}.a", "blocks.0.a")


@pytest.mark.parametrize("number", ["9" * 5000, "10000000", "²", "٣", "-1", "", "1e3"])
def test_what_is_no_number_counts_nothing(number: str) -> None:
    assert count(f"blocks.{number}.a", "blocks.0.a") == 1


def test_a_path_of_many_dots_is_renamed_by_its_beginning() -> None:
    naming = Naming("c", "a", (), "blocks.", "t.", {"x.y": "z"}, {"o": "p"})
    assert naming.rename("blocks.3.x.y.weight") == "t.3.z.weight"
    assert naming.rename("o" + ".q" * 500) == "p" + ".q" * 500
    assert naming.rename("a" + ".q" * 500) is None
