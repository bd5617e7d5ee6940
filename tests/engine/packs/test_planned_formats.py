"""A built-in model in every format, planned without files: the bytes are those of its pack."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from penstock.blocks import PAGE_BYTES
from penstock.cli.main import app
from penstock.engine.families.wan.builtin import wan21_i2v_14b
from penstock.engine.families.wan.spec import TransformerSpec
from penstock.engine.families.wan.structure import is_cross_kv, transformer_shapes
from penstock.engine.families.wan.synthetic import _WAN_14B
from penstock.engine.files.keys import ComponentSource, recognise
from penstock.engine.files.source import RawFile
from penstock.engine.packs.plan import plan_component
from penstock.formats.formats import FORMATS, spec_bytes, writable
from penstock.formats.gguf import PREFIX, Gguf
from penstock.offload.checkpoint import TensorEntry
from penstock.quant.policy import default_policy
from penstock.units import align_up

CONFIG: dict[str, Any] = dict(_WAN_14B) | {"num_layers": 40}
SHAPES = transformer_shapes(CONFIG)


@cache
def true_model(name: str = "bf16") -> ComponentSource:
    """The transformer's headers, its block matrices in a format: there is no such file."""
    fmt, chosen, end = FORMATS[name], set(default_policy(SHAPES)), 0
    entries: dict[str, TensorEntry] = {}
    for parameter, shape in SHAPES.items():
        specs = {"weight": ("BF16", shape)}
        if parameter in chosen:
            specs = fmt.storage((shape[0], shape[1]), "BF16")
        for suffix, spec in specs.items():
            tag, dims, nbytes = *spec, spec_bytes(spec)
            if isinstance(fmt, Gguf) and parameter in chosen:
                tag, dims = PREFIX + fmt.ggml_type, shape
            full = parameter if suffix == "weight" else parameter.removesuffix("weight") + suffix
            entries[full] = TensorEntry(full, Path("none"), end, tag, dims, nbytes)
            end = align_up(end + nbytes, 64)
    return recognise(RawFile(Path("none"), "safetensors", entries, {}, {}), CONFIG)


def planned(name: str) -> TransformerSpec:
    return wan21_i2v_14b(name).transformer


@pytest.mark.parametrize("name", writable())
def test_the_planned_bytes_are_those_of_the_pack(name: str) -> None:
    runs = {run.name: run.nbytes for run in plan_component(true_model(), name).layout.runs}
    found = planned(name)
    assert found.weights.rest_bytes == align_up(runs["rest"], PAGE_BYTES)
    for index in range(40):
        assert found.weights.block_bytes[index] == align_up(runs[f"block {index}"], PAGE_BYTES)
        assert found.cross_block_bytes[index] == align_up(runs[f"cross {index}"], PAGE_BYTES)


@pytest.mark.parametrize("name", FORMATS)
def test_the_planned_bytes_are_those_of_the_files(name: str) -> None:
    source = true_model(name)
    assert (source.missing, source.unknown, source.misshaped) == ((), (), ())
    block = [(n, w) for n, w in source.weights.items() if n.startswith("blocks.0.")]
    cross = sum(w.nbytes for n, w in block if is_cross_kv(n.removeprefix("blocks.0.")))
    found = planned(name)
    padding = 64 * sum(len(w.tensors) for _, w in block) + PAGE_BYTES
    for stated, stored in (
        (found.weights.block_bytes[0], sum(w.nbytes for _, w in block) - cross),
        (found.cross_block_bytes[0], cross),
    ):
        assert stored <= stated <= stored + padding


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_planned(name: str) -> None:
    asked = ["plan", "--synthetic", "wan2.1-i2v-14b", "--format", name, "--json",
             "--card", "RTX 4090 24 GB", "--ram", "128GiB"]  # fmt: skip
    result = CliRunner().invoke(app, asked)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["weight_format"] == name
