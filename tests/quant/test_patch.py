"""What LoRAs of every kind do to a weight, against the libraries that write them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from penstock.engine.lora.file import LoraFile, open_lora
from penstock.engine.lora.layer import fit
from penstock.formats import rows
from penstock.formats.patch import Patch
from penstock.formats.patched import Patched
from penstock.formats.plain import Plain
from penstock.formats.scaled import Scaled8
from penstock.quant.arithmetic import dequantise, quantise
from penstock.quant.values.patch import apply
from tests.engine.lora import kinds
from tests.meter import StorageMeter

CLOSE = 1e-5
NAME = "blocks.0.attn1.to_q"
SHAPES = [(96, 96), (96, 40), (48, 96)]
MATRIX_KINDS = tuple(k for k in kinds.KINDS if k not in ("norms", "grown input"))


def _opened(made: kinds.Made, path: Path) -> tuple[LoraFile, dict[str, Tensor]]:
    return open_lora(made.write(path)), load_file(path)


def _patch(made: kinds.Made, path: Path, shape: tuple[int, int], strength: float
           ) -> tuple[Patch, dict[str, Tensor]]:  # fmt: skip
    file, stored = _opened(made, path)
    (layer,), wrong = fit(
        file.layers.values(), {f"{NAME}.weight": shape, f"{NAME}.bias": shape[:1]}
    )
    assert not wrong
    (change,) = layer.weights
    tensors = {role: stored[entry.name] for role, entry in change.entries.items()}
    return change.patch(0, strength, shape[0]), tensors


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", MATRIX_KINDS)
def test_a_weight_is_that_of_the_library(
    kind: str, shape: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At once, and in slices of few rows or columns."""
    shapes = {f"{NAME}.weight": shape, f"{NAME}.bias": shape[:1]}
    made = kinds.make(kind, shapes, [NAME])
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 0.2
    given = {f"{NAME}.weight": weight, f"{NAME}.bias": torch.zeros(shape[0])}
    for strength in (1.0, 0.6) if kind in kinds.AT_ANY_STRENGTH else (1.0,):
        expected = made.merge(given, strength)[f"{NAME}.weight"]
        assert (expected - weight).abs().max() > 0.05
        patch, tensors = _patch(made, tmp_path / "a.safetensors", shape, strength)
        for chunk in (1 << 18, 5 * shape[1]):
            monkeypatch.setattr(rows, "_CPU_CHUNK", chunk)
            found = weight.clone()
            apply(patch, found, tensors)
            assert (found - expected).abs().max() <= CLOSE


@pytest.mark.parametrize("kind", ["dora by outputs", "dora by inputs"])
def test_the_strength_of_a_dora_is_that_of_its_whole_change(kind: str, tmp_path: Path) -> None:
    """As ComfyUI has it: from the weight to the DoRA's, straight."""
    shape = (96, 40)
    shapes = {f"{NAME}.weight": shape, f"{NAME}.bias": shape[:1]}
    made = kinds.make(kind, shapes, [NAME])
    weight = torch.randn(shape) * 0.2
    whole = made.merge({f"{NAME}.weight": weight}, 1.0)[f"{NAME}.weight"]
    patch, tensors = _patch(made, tmp_path / "a.safetensors", shape, -0.4)
    found = weight.clone()
    apply(patch, found, tensors)
    assert (found - (weight - 0.4 * (whole - weight))).abs().max() <= CLOSE


@pytest.mark.parametrize("kind", MATRIX_KINDS)
def test_rows_alone_are_those_of_the_whole(kind: str, tmp_path: Path) -> None:
    shape = (96, 40)
    made = kinds.make(kind, {f"{NAME}.weight": shape, f"{NAME}.bias": shape[:1]}, [NAME])
    patch, tensors = _patch(made, tmp_path / "a.safetensors", shape, 1.0)
    assert patch.by_rows == (kind not in ("dora by inputs", "oft", "boft"))
    if not patch.by_rows:
        return
    whole = torch.randn(shape)
    part = whole[30:50].clone()
    apply(patch, whole, tensors)
    some = {r: t[30:50] if r in ("diff", "set") else t for r, t in tensors.items()}
    apply(patch, part, some, first=30)
    assert (part - whole[30:50]).abs().max() <= CLOSE  # products of other shapes round otherwise


@pytest.mark.parametrize("kind", MATRIX_KINDS)
@pytest.mark.parametrize("stored", ["bf16", "int8"])
def test_decoding_takes_no_more_than_is_said(kind: str, stored: str, tmp_path: Path) -> None:
    shape = (512, 768)
    made = kinds.make(kind, {f"{NAME}.weight": shape, f"{NAME}.bias": shape[:1]}, [NAME])
    patch, tensors = _patch(made, tmp_path / "a.safetensors", shape, 1.0)
    base = Plain("bf16", "BF16") if stored == "bf16" else Scaled8("int8", "I8", "int8")
    fmt = Patched(base, (patch, patch))
    weight = (torch.randn(shape) * 0.1).bfloat16()
    given = quantise(base, weight) | {patch.name(r): t for r, t in tensors.items()}
    assert given.keys() == fmt.storage(shape, "BF16").keys()
    out = torch.empty(shape, dtype=torch.bfloat16)
    with StorageMeter([out, *given.values()]) as meter:
        dequantise(fmt, given, shape, torch.bfloat16, out)
    assert meter.peak <= fmt.workspace_bytes(shape, "cpu") <= 5 * meter.peak + (1 << 16)
    decoded = dequantise(base, given, shape, torch.float32)
    expected = decoded.bfloat16().clone()
    for _ in range(2):
        apply(patch, expected, tensors)
    assert torch.equal(out, expected)
    assert torch.equal(dequantise(base, given, shape, torch.float32), decoded)


def test_an_older_order_of_gloras_factors_is_known(tmp_path: Path) -> None:
    """LyCORIS wrote b2 b1 + W a2 a1 once."""
    shape = (96, 40)
    shapes = {f"{NAME}.weight": shape, f"{NAME}.bias": shape[:1]}
    made = kinds.make("glora", shapes, [NAME])
    turned = {"a1": "a2", "a2": "a1", "b1": "b2", "b2": "b1"}
    old = kinds.Made(
        {
            name if ".alpha" in name else
            f"{name.split('.')[0]}.{turned[name.split('.')[1]]}.weight": t
            for name, t in made.tensors.items()
        },
        made.merge,
    )  # fmt: skip
    weight = torch.randn(shape)
    patch, tensors = _patch(old, tmp_path / "a.safetensors", shape, 1.0)
    found = weight.clone()
    apply(patch, found, tensors)
    expected = made.merge({f"{NAME}.weight": weight}, 1.0)[f"{NAME}.weight"]
    assert (found - expected).abs().max() <= CLOSE
