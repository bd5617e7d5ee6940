"""Calls rehearsed on tensors without values take what they take for true."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from penstock.engine.attach.foreign import modules_of
from penstock.engine.attach.foreign_plan import stored_rehearsal
from penstock.engine.attach.keeping import Counted, Seen
from penstock.engine.attach.rehearsal import TRUE_BYTES, Rehearsed, Visit, rehearse
from penstock.engine.store.durable import FileOps
from penstock.engine.store.sealed import seal_json
from penstock.errors import UsageError
from tests.engine.attach.tiny_ltx2 import ltx2, made
from tests.engine.attach.zoo import NAMES, make
from tests.meter import StorageMeter, allocated_peak
from tests.versions import TRANSFORMERS_4

NEW = pytest.mark.skipif(TRANSFORMERS_4, reason="LTX-2 is newer")


def _metered(networks: dict[str, nn.Module], call: Any) -> int:
    held = [t for each in networks.values() for t in (*each.parameters(), *each.buffers())]
    with torch.no_grad(), StorageMeter(held) as meter:
        call()
    return meter.peak


@pytest.mark.parametrize("name", NAMES)
def test_a_forward_takes_what_was_said(name: str) -> None:
    """Never less, at most 5 % more; weights and random state are as they were."""
    case = make(name)
    networks = {"network": case.module}
    before = {name: (id(p), p.detach().clone()) for name, p in case.module.named_parameters()}
    state = torch.get_rng_state()
    found = rehearse(networks, case.call)
    assert torch.equal(torch.get_rng_state(), state)
    for key, p in case.module.named_parameters():
        assert id(p) == before[key][0] and torch.equal(p, before[key][1])
    real = _metered(networks, case.call)
    assert real <= found.peak_bytes <= 1.05 * real
    assert found.peak_of("network") == found.peak_bytes and found.peak_of("another") == 0


@NEW
def test_a_whole_pipeline_takes_what_was_said() -> None:
    pipe = ltx2()
    networks = modules_of(pipe)
    found = rehearse(networks, lambda: made(pipe))
    real = _metered(networks, lambda: made(pipe))
    assert real <= found.peak_bytes <= 1.05 * real
    working = [visit.component for visit in found.visits]
    assert working == ["text_encoder", "connectors", "transformer", "vae", "audio_vae", "vocoder"]
    assert all(0 < found.peak_of(name) <= found.peak_bytes for name in working)
    blocks = [name.split(".")[1] for name in found.uses["transformer"] if "_blocks." in name]
    assert list(dict.fromkeys(blocks)) == ["0", "1", "2", "3"]
    assert found.calls_of("transformer") == 6 and found.calls_of("vae") == 1


class _Masked(nn.Module):
    """What pipelines do with masks: choose by them, and decide by their values."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        kept = x[mask]
        if not bool(mask.all()):
            kept = torch.cat([kept, kept])
        out = self.layer(kept)
        whole = torch.zeros_like(x)
        whole[mask] = out[: int(mask.sum())]
        return whole


def test_masks_have_values() -> None:
    module = _Masked()
    x, mask = torch.randn(2, 1000, 8), torch.arange(2000).reshape(2, 1000) % 3 == 0
    found = rehearse({"m": module}, lambda: module(x, mask))
    real = _metered({"m": module}, lambda: module(x, mask))
    assert real <= found.peak_bytes <= 1.05 * real


def test_what_is_large_is_not_made() -> None:
    """100 GiB of a module that could never be loaded here."""
    with torch.device("meta"):
        module = nn.Sequential(nn.Linear(1 << 17, 1 << 17, bias=False))
    found = []

    def work() -> None:
        found.append(rehearse({"m": module}, lambda: module(torch.zeros(1 << 15, 1 << 17))))

    assert allocated_peak(work) <= TRUE_BYTES
    assert {each.peak_bytes for each in found} == {2 * (1 << 34)}
    assert module[0].weight.is_meta


def test_a_way_that_depends_on_what_is_computed() -> None:
    class Choosing(_Masked):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            out = self.layer(x)
            return out if float(out.sum()) > 0 else x

    module = Choosing()
    with pytest.raises(UsageError, match=r"(?s)cannot be measured.*--activations"):
        rehearse({"m": module}, lambda: module(torch.zeros(3, 8), torch.ones(3)))
    assert type(module.layer.weight) is nn.Parameter


def test_an_operator_on_functions() -> None:
    from torch.nn.attention.flex_attention import flex_attention

    class Flex(_Masked):
        def forward(self, x: Tensor) -> Tensor:
            heads = self.layer(x).reshape(1, 2, -1, 4)
            return flex_attention(heads, heads, heads)

    with pytest.raises(UsageError, match=r"(?s)cannot be measured.*flex_attention.*--activations"):
        rehearse({"m": (module := Flex())}, lambda: module(torch.zeros(4, 8)))


@pytest.mark.parametrize("content", [b"", b"{", b'{"visits": []}', b"[" * 100_000])
def test_a_damaged_note_of_a_rehearsal_is_no_note(content: bytes, tmp_path: Path) -> None:
    path, ops = tmp_path / "note.json", FileOps()
    assert stored_rehearsal(ops, path) is None
    value = {"visits": [["m", 7]], "uses": {"m": {"w": 2}}, "peak_bytes": 9, "tiled": ["m"]}
    calls = {"bars": [2], "networks": {"m": {"calls": 2}}, "timesteps": 3}
    path.write_bytes(seal_json(value | {"limit": 5, "flops": {}, "calls": calls}))
    found = Rehearsed((Visit("m", 7),), {"m": {"w": 2}}, 9, ("m",), {})
    assert stored_rehearsal(ops, path) == (found, Counted((2,), {"m": Seen(2)}, 3), 5)
    path.write_bytes(path.read_bytes().replace(b"9", b"8"))
    assert stored_rehearsal(ops, path) is None
    path.write_bytes(content)
    assert stored_rehearsal(ops, path) is None


class _Three(nn.Module):
    """A convolution, attention, and a list of linear layers of which the second is not run."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = nn.Conv2d(3, 8, 3, padding=1)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.seen(x).flatten(2).mT  # (1, 3, 16, 24) -> (1, 384, 8)
        for layer in self.layers:
            x = layer(x)
        return nn.functional.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None])


def test_operations_are_counted_by_kind() -> None:
    module = _Three()
    found = rehearse({"network": module}, lambda: module(torch.zeros(1, 3, 16, 24)))
    assert found.flops == {
        "network": {
            "convolution": 2 * 384 * 8 * 3 * 3 * 3,
            "product": 2 * 2 * 384 * 8 * 8,
            "attention": 2 * 384 * 384 * (8 + 8),
        }
    }
