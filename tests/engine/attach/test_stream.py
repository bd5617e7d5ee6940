"""`penstock.stream`: other people's networks, whose blocks come and go, compute the same bits."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import penstock
from penstock.engine.attach import guard as attach_guard
from penstock.engine.attach import stream as attach_stream
from penstock.engine.attach.away import AwayWeight
from penstock.engine.store.durable import FileOps
from penstock.errors import CheckpointError, OverBudget, StorageError, UsageError
from penstock.formats.formats import get_format
from penstock.profiles.hardware import Hardware
from penstock.profiles.rates import Rates
from tests.engine.attach.zoo import NAMES, Walk, make
from tests.meter import StorageMeter

ROOM = "1MiB"


def _state(module: nn.Module) -> list[tuple[str, int, Tensor, bool]]:
    return [(n, id(p), p.detach().clone(), p.requires_grad) for n, p in module.named_parameters()]


def _same(module: nn.Module, before: list[tuple[str, int, Tensor, bool]]) -> bool:
    now = dict(module.named_parameters())
    return len(now) == len(before) and all(
        id(now[n]) == key and torch.equal(now[n], values) and now[n].requires_grad == grad
        for n, key, values, grad in before
    )


@torch.no_grad()
def _walked(module: Walk) -> Tensor:
    return module(torch.linspace(-1, 1, 32).reshape(2, 16))


def _least(module: nn.Module, blocks: Any, ram: Any = ROOM) -> int:
    """The least VRAM that is enough, by the error for too little."""
    with pytest.raises(OverBudget) as refused:
        penstock.stream(module, blocks, vram=1, ram=ram)
    return refused.value.need_bytes


@pytest.mark.parametrize("name", NAMES)
def test_bit_equal_to_the_resident_module_in_a_fraction_of_its_memory(name: str) -> None:
    case = make(name)
    module, before = case.module, _state(case.module)
    classes = [type(each) for each in module.modules()]
    with torch.no_grad():
        wanted = case.call()
    limit = _least(module, case.blocks)
    with penstock.stream(module, case.blocks, vram=limit, ram=ROOM) as streamed:
        with torch.no_grad():
            assert torch.equal(case.call(), wanted)
            assert torch.equal(case.call(), wanted)
        report = streamed.report
        assert report.peak_vram_bytes <= limit < sum(p.nbytes for *_, p, _ in before) / 2
        assert report.device_resident == 0 and report.passes == 2 and report.skipped == 0
        # Every block was copied for each pass; what was read ahead for a third may be in it too.
        assert 2 * report.streamed_bytes <= report.copied_bytes <= 3 * report.streamed_bytes
    assert _same(module, before)
    assert [type(each) for each in module.modules()] == classes
    with torch.no_grad():
        assert torch.equal(case.call(), wanted)


def test_torch_allocates_no_more_than_the_report_says() -> None:
    case = make("bert")
    with torch.no_grad(), StorageMeter(case.module.parameters()) as resident:
        case.call()
    limit = _least(case.module, case.blocks)
    outside = [*case.module.parameters(), *case.module.buffers()]
    with (
        torch.no_grad(),
        StorageMeter(outside) as meter,
        penstock.stream(case.module, case.blocks, vram=limit, ram=ROOM) as streamed,
    ):
        held = streamed.report.peak_vram_bytes
        meter.peak = meter.live
        case.call()
        assert meter.peak <= held + streamed.report.peak_ram_bytes + resident.peak
        kept = [p for p in case.module.parameters() if type(p) is nn.Parameter]
        whole = sum(p.nbytes for p in case.module.parameters())
        assert sum(p.nbytes for p in kept) < whole / 2


@pytest.mark.parametrize(
    ("order", "skipped"),
    [
        (lambda blocks: blocks, 0),
        (lambda blocks: (block for _, block in enumerate(blocks)), 0),
        (lambda blocks: (blocks[i] for i in range(len(blocks))), 0),
        (lambda blocks: blocks[:], 0),
        (lambda blocks: (blocks[1:5][k] for k in (0, 1, 2, -1)), 2),
        (lambda blocks: (block for block, _ in zip(blocks, range(3), strict=False)), 3),
        (lambda blocks: reversed(blocks), 25),
        (lambda blocks: (blocks[i] for i in (3, -1, 3, 3, 0, 5)), 11),
        (lambda blocks: (b for block in blocks[::2] for b in (block, block)), 3),
    ],
    ids=["plain", "enumerate", "index", "slice", "part", "zip", "reversed", "wild", "twice"],
)
def test_blocks_in_any_order(order: Any, skipped: int) -> None:
    module = Walk(order)
    wanted = _walked(module)
    with penstock.stream(module, "blocks", vram=ROOM, ram=ROOM) as streamed:
        for _ in range(3):
            assert torch.equal(_walked(module), wanted)
        assert streamed.report.skipped <= 3 * skipped + 6
        assert (streamed.report.skipped > 0) == (skipped > 0)
        assert len(module.blocks) == 6 and module.blocks._modules["2"] in module.blocks


def test_disk_ram_and_vram_give_the_same_bits() -> None:
    module = Walk()
    wanted = _walked(module)
    seen = set()
    least = _least(module, "blocks")
    for vram in (least, least + 12_288, ROOM):
        for ram in (8192, 20_000, ROOM):
            with penstock.stream(module, "blocks", vram=vram, ram=ram) as streamed:
                assert torch.equal(_walked(module), wanted)
                report = streamed.report
                assert report.peak_ram_bytes <= report.ram_limit_bytes
                assert report.peak_vram_bytes <= report.vram_limit_bytes
                seen.add((report.device_resident > 0, report.host_resident > 0,
                          report.from_disk > 0))  # fmt: skip
    assert {(False, False, True), (True, False, False)} <= seen
    assert any(host for _, host, _ in seen)


class _Stop(Exception):
    pass


def test_an_exception_in_the_middle_of_a_pass_changes_nothing() -> None:
    module = Walk()
    wanted, fail_at = _walked(module), [99]

    def order(blocks: Any) -> Any:
        for index, block in enumerate(blocks):
            if index == fail_at[0]:
                raise _Stop
            yield block

    module.order = order
    before = _state(module)
    with penstock.stream(module, "blocks", vram=_least(module, "blocks"), ram=ROOM):
        for fail_at[0] in (0, 1, 3, 5):
            with pytest.raises(_Stop):
                _walked(module)
        fail_at[0] = 99
        assert torch.equal(_walked(module), wanted)
    assert _same(module, before)


def test_a_block_that_was_kept_comes_when_it_is_used() -> None:
    module = Walk(order=list)
    wanted = _walked(module)
    with penstock.stream(module, "blocks", vram=ROOM, ram=ROOM):
        assert torch.equal(_walked(module), wanted)


def test_a_weight_that_was_kept_is_refused() -> None:
    module = Walk()
    with (
        penstock.stream(module, "blocks", vram=ROOM, ram=ROOM),
        torch.no_grad(),
        pytest.raises(UsageError, match=r"0\.0\.weight is not on the device"),
    ):
        torch.nn.functional.linear(torch.zeros(1, 16), next(module.parameters()))


def test_gradients_are_refused() -> None:
    module = Walk()
    with penstock.stream(module, "blocks", vram=ROOM, ram=ROOM):
        with pytest.raises(UsageError, match="cannot be trained"):
            module(torch.zeros(1, 16))
        with torch.inference_mode():
            module(torch.zeros(1, 16))
    module(torch.zeros(1, 16)).sum().backward()
    assert all(p.grad is not None for p in module.parameters())


@pytest.mark.parametrize("use", [lambda m: m.state_dict(), lambda m: m.double(), lambda m: m.half(),
                                 lambda m: m.blocks.append(nn.Identity()),
                                 lambda m: m.blocks.__setitem__(0, nn.Identity())])  # fmt: skip
def test_what_would_lose_the_weights_is_refused(use: Any) -> None:
    module = Walk()
    before = _state(module)
    with (
        penstock.stream(module, "blocks", vram=ROOM, ram=ROOM),
        torch.no_grad(),
        pytest.raises(UsageError, match="close the stream|Close the stream"),
    ):
        use(module)
    assert _same(module, before)


def test_what_only_asks_is_answered() -> None:
    module = Walk()
    count = sum(p.numel() for p in module.parameters())
    with penstock.stream(module, "blocks", vram=ROOM, ram=ROOM):
        assert sum(p.numel() for p in module.parameters()) == count
        assert {(p.dtype, p.device.type) for p in module.parameters()} == {(torch.float32, "cpu")}
        assert "6 blocks" in repr(module) and "AwayWeight" in repr(next(module.parameters()))
        module.eval()
        assert not module.blocks._modules["3"].training


def test_tied_weights_stay_tied() -> None:
    module = Walk()
    module.head = nn.Linear(24, 16)
    module.blocks[0][2].weight = module.head.weight  # used outside too: stays
    module.blocks[5][0].weight = module.blocks[0][0].weight  # in two blocks
    module.blocks[1].register_parameter("again", module.blocks[1][0].weight)  # twice in one
    wanted, before = _walked(module), _state(module)
    limit = _least(module, "blocks")
    with penstock.stream(module, "blocks", vram=limit, ram=ROOM):
        assert type(module.blocks._modules["0"][2].weight) is nn.Parameter
        assert torch.equal(_walked(module), wanted)
        assert torch.equal(_walked(module), wanted)
        with torch.no_grad():
            lent = module.blocks[1]
            assert lent.again.data_ptr() == lent[0].weight.data_ptr()
    assert _same(module, before)
    assert module.blocks[0][2].weight is module.head.weight
    assert module.blocks[5][0].weight is module.blocks[0][0].weight


class _Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.inner(x) + self.calls


def test_buffers_keep_what_is_written_to_them() -> None:
    module = nn.Module()
    module.layers = nn.ModuleList(_Counting() for _ in range(4))
    with penstock.stream(module, "layers", vram=ROOM, ram=ROOM), torch.no_grad():
        for _ in range(3):
            for layer in module.layers:
                layer(torch.zeros(4))
    assert [int(layer.calls) for layer in module.layers] == [3, 3, 3, 3]


def test_a_list_that_two_modules_hold_is_streamed_in_both() -> None:
    module = Walk()
    module.twin = nn.Module()
    module.twin.layers = module.blocks
    wanted = _walked(module)
    with penstock.stream(module, "blocks", vram=ROOM, ram=ROOM), torch.no_grad():
        x = torch.linspace(-1, 1, 32).reshape(2, 16) + module.offset
        for block in module.twin.layers:
            x = x + block(x)
        assert torch.equal(x, wanted)
    assert module.twin.layers is module.blocks


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("block", "Did you mean blocks='blocks'"),
        ("", "not a list of blocks"),
        ("blocks.0", "found Sequential"),
        ("offset", "found nothing of that name"),
    ],
)
def test_no_such_list(path: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        penstock.stream(Walk(), path, vram=ROOM, ram=ROOM)


def test_the_need_in_the_refusal_is_exact() -> None:
    module = Walk()
    before = _state(module)
    least = _least(module, "blocks")
    with pytest.raises(OverBudget, match=f"vram={least}"):
        penstock.stream(module, "blocks", vram=least - 1, ram=ROOM)
    with pytest.raises(OverBudget) as refused:
        penstock.stream(module, "blocks", vram=least, ram=1)
    assert refused.value.resource == "RAM"
    penstock.stream(module, "blocks", vram=least, ram=refused.value.need_bytes).close()
    more = f"{least + 1000}"
    with pytest.raises(OverBudget, match="activations"):
        penstock.stream(module, "blocks", vram=more, ram=ROOM, activations=100_000)
    assert _same(module, before)


def test_what_decoding_makes_is_in_the_budget() -> None:
    with pytest.raises(OverBudget) as refused:
        penstock.stream(_Wide(), "blocks", vram=1, ram=ROOM, format="gguf-q8_0")
    fmt = get_format("gguf-q8_0")
    assert (
        dict(refused.value.consumers)["dequantisation"] == fmt.workspace_bytes((32, 64), "cpu") > 0
    )


def test_what_a_module_holds_of_a_gpu_is_the_budgets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not so with a budget that is given; and what lies on another device is no concern of it."""
    module, there = Walk(), torch.device("cuda", 1)
    weight = module.blocks[0][0].weight
    module.blocks[0][0]._parameters["weight"] = AwayWeight(weight, there, "weight")
    card = Hardware("cuda", "a card", 1 << 20, 1 << 20, Rates(1e12, 1e10, 1e9), index=1)
    assert attach_stream.held_bytes(module, card) == weight.nbytes
    assert attach_stream.held_bytes(module, replace(card, index=0)) == 0
    seen: list[int] = []

    def opened(patient: object, quantised: object, hardware: Hardware, *more: object) -> None:
        seen.append(hardware.vram_bytes)
        raise InterruptedError

    monkeypatch.setattr(attach_stream, "_Opening", opened)
    monkeypatch.setattr(attach_stream, "Patient", lambda *_: None)
    monkeypatch.setattr(attach_stream, "Held", lambda *_: None)
    monkeypatch.setattr(attach_stream, "probe", lambda device: card)
    for vram in (None, 4096):
        with pytest.raises(InterruptedError):
            penstock.stream(module, "blocks", vram=vram, device="cuda")
    assert seen == [card.vram_bytes + weight.nbytes, 4096]


class _Wide(nn.Module):
    """One block with a matrix that every format can store."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(64, 32))])


def _complex_numbers() -> nn.Parameter:
    return nn.Parameter(torch.zeros(3, dtype=torch.complex128), requires_grad=False)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda m: m.blocks[2].to("meta"), "cannot be streamed"),
        (lambda m: m.blocks.append(nn.LSTM(4, 4)), "second list"),
        (lambda m: m.blocks.append(nn.LazyLinear(4)), "UninitializedParameter"),
        (lambda m: m.blocks[1].register_parameter("odd", _complex_numbers()), "complex128"),
    ],
)
def test_weights_that_cannot_be_streamed(spoil: Any, message: str) -> None:
    module = Walk()
    spoil(module)
    with pytest.raises(UsageError, match=message):
        penstock.stream(module, "blocks", vram=ROOM, ram=ROOM)


def test_streaming_twice_and_closing_twice() -> None:
    module = Walk()
    first = penstock.stream(module, "blocks", vram=ROOM, ram=ROOM)
    with pytest.raises(UsageError, match="already"):
        penstock.stream(module, "blocks", vram=ROOM, ram=ROOM)
    first.close()
    first.close()
    penstock.stream(module, "blocks", vram=ROOM, ram=ROOM).close()


def test_two_threads_at_once_are_refused() -> None:
    module, errors = Walk(), []

    def other() -> None:
        try:
            _walked(module)
        except UsageError as error:
            errors.append(str(error))

    def order(blocks: Any) -> Any:
        for index, block in enumerate(blocks):
            if index == 2:
                module.order = iter
                thread = threading.Thread(target=other)
                thread.start()
                thread.join()
                module.order = order
            yield block

    wanted = _walked(module)
    module.order = order
    with penstock.stream(module, "blocks", vram=ROOM, ram=ROOM):
        assert torch.equal(_walked(module), wanted)
        module.order = iter
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert len(errors) == 1 and "one thread at a time" in errors[0]


def test_nothing_is_left_behind(cache: Path) -> None:
    module, threads = Walk(), threading.active_count()
    with penstock.stream(module, "blocks", vram=ROOM, ram=ROOM) as streamed:
        _walked(module)
        (folder,) = cache.iterdir()
        on_disk = sum(path.stat().st_size for path in folder.iterdir())
        assert on_disk == streamed.report.disk_bytes
    assert list(cache.iterdir()) == [] and threading.active_count() == threads


def test_a_module_that_nobody_has_any_more_ends_its_threads(cache: Path) -> None:
    threads = threading.active_count()
    module = Walk()
    penstock.stream(module, "blocks", vram=ROOM, ram=ROOM)  # the handle is not kept
    gc.collect()
    _walked(module)
    assert threading.active_count() > threads
    del module
    gc.collect()
    assert threading.active_count() == threads and list(cache.iterdir()) == []


def test_what_a_killed_process_left_is_removed(cache: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    child.wait()
    for name in (f"live.{child.pid}.abc", f"live.{os.getpid()}.other", "live.x", "mine-0"):
        (cache / name).mkdir(parents=True)
    penstock.stream(Walk(), "blocks", vram=ROOM, ram=ROOM).close()
    assert sorted(p.name for p in cache.iterdir()) == ["live." + f"{os.getpid()}.other", "live.x",
                                                       "mine-0"]  # fmt: skip


def test_a_full_disk_leaves_the_module_as_it_was(
    monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    module = Walk()
    before = _state(module)
    with monkeypatch.context() as patch:
        patch.setattr(FileOps, "free_bytes", lambda self, folder: 10)
        with pytest.raises(StorageError, match="no space"):
            penstock.stream(module, "blocks", vram=ROOM, ram=ROOM)
    assert _same(module, before) and list(cache.iterdir()) == []


def test_a_damaged_pack_is_found_out(cache: Path) -> None:
    module = Walk()
    streamed = penstock.stream(module, "blocks", vram=ROOM, ram=ROOM)
    (pack,) = cache.glob("*/plain.safetensors")
    status = pack.stat()
    content = bytearray(pack.read_bytes())
    content[8192] ^= 1
    with pack.open("r+b") as file:
        file.write(content)
    os.utime(pack, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(CheckpointError, match=r"weights of block \d are not those"):
        streamed.close()
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize("closing", ["pass", "del stream", "stream.close()"])
def test_a_process_that_ends_in_the_middle_of_a_stream_ends(closing: str, cache: Path) -> None:
    code = (
        "import torch, penstock\nfrom tests.engine.attach.zoo import Walk\nmodule = Walk()\n"
        "stream = penstock.stream(module, 'blocks', vram='1MiB', ram='1MiB')\n"
        f"with torch.no_grad(): module(torch.zeros(1, 16))\n{closing}\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize(("format", "keep", "least"), [("int8", (), 0.999), ("fp8", (), 0.99),
                                                       ("nf4", (), 0.9),
                                                       ("bf16", (), 0.9999)])  # fmt: skip
def test_quantised_storage(format: str, keep: tuple[str, ...], least: float) -> None:
    case = make("bert")
    before, classes = _state(case.module), [type(each) for each in case.module.modules()]
    with torch.no_grad():
        wanted = case.call().flatten()
    with (
        penstock.stream(
            case.module, case.blocks, vram=ROOM, ram=ROOM, format=format, keep=keep
        ) as streamed,
        torch.no_grad(),
    ):
        found = case.call().flatten()
        report = streamed.report
    assert torch.nn.functional.cosine_similarity(wanted, found, dim=0) >= least
    assert not torch.equal(wanted, found)
    assert report.format == format and report.streamed_bytes < 0.62 * report.weight_bytes
    assert _same(case.module, before)
    assert [type(each) for each in case.module.modules()] == classes


def test_layers_that_are_kept_stay_plain() -> None:
    case = make("t5")
    with penstock.stream(
        case.module, "encoder.block", vram=ROOM, ram=ROOM, format="fp8", keep=["wo"]
    ):
        block: Any = case.module.encoder.block._modules["1"]
        assert type(block.layer[-1].DenseReluDense.wo) is nn.Linear
        assert type(block.layer[0].SelfAttention.q).__name__ == "QuantLinear"
    with pytest.raises(UsageError, match="nothing in the blocks"):
        penstock.stream(case.module, "encoder.block", vram=ROOM, ram=ROOM, format="fp8",
                        keep=["q", "k", "v", "o", "wi", "wo"])  # fmt: skip
    with pytest.raises(UsageError, match="unknown format"):
        penstock.stream(case.module, "encoder.block", vram=ROOM, ram=ROOM, format="int7")


class _Asking(nn.Module):
    """Casts what it computes with to what its layers say of themselves, as diffusers' and
    transformers' blocks do."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(64, 96), nn.Linear(96, 64)

    def forward(self, x: Tensor) -> Tensor:
        from diffusers.models.modeling_utils import get_parameter_dtype

        inner = self.inner(x.to(get_parameter_dtype(self.inner)) * 1.5)
        return self.outer((inner + 1.0).to(self.outer.weight.dtype)) + x


@pytest.mark.parametrize("format", ["int8", "fp8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_quantised_layer_answers_with_its_compute_dtype(format: str, dtype: torch.dtype) -> None:
    module = nn.Module()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        module.layers = nn.ModuleList(_Asking() for _ in range(3)).to(dtype)
    x = torch.linspace(-1, 1, 128, dtype=dtype).reshape(2, 64)

    @torch.no_grad()
    def walked() -> Tensor:
        out = x
        for layer in module.layers:
            out = layer(out)
        return out

    wanted = walked()
    with penstock.stream(module, "layers", vram=ROOM, ram=ROOM, format=format):
        found = walked()
        assert found.dtype == dtype
        assert module.layers[0].inner.weight.shape == (96, 64)
    assert (found - wanted).abs().max() < 0.1 * wanted.abs().max()
    assert torch.equal(walked(), wanted)


def test_t5_in_fp8_needs_no_layer_kept() -> None:
    case = make("t5")  # asks `wo` for its dtype, and casts to it
    with torch.no_grad():
        wanted = case.call().flatten()
    with (
        penstock.stream(case.module, case.blocks, vram=ROOM, ram=ROOM, format="fp8"),
        torch.no_grad(),
    ):
        found = case.call().flatten()
    assert torch.nn.functional.cosine_similarity(wanted, found, dim=0) > 0.99


def test_a_move_to_the_cpu_gives_the_memory_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, as a pipeline's own; a stream refuses it, and so does any cast."""
    module, left = Walk(), list[str]()
    gpu, kind = torch.device("cuda", 0), torch.float32
    for parameter in module.parameters():
        away = AwayWeight(parameter, gpu, "weight")
        owner = next(m for m in module.modules() for p in m._parameters.values() if p is parameter)
        leaf = next(n for n, p in owner._parameters.items() if p is parameter)
        owner._parameters[leaf] = away
    found = [kind, torch.device("cpu")]
    monkeypatch.setattr(attach_guard, "tried", lambda *_: tuple(found))
    with ExitStack() as stack:
        attach_guard.guard(module, "attach", stack, lambda: left.append("left"))
        assert module.to("cpu") is module and left == ["left"]
        found[0] = torch.float16
        with pytest.raises(UsageError, match="cannot be moved or cast"):
            module.to("cpu", torch.float16)
    with ExitStack() as stack:
        attach_guard.guard(module, "stream", stack)
        found[0] = kind
        with pytest.raises(UsageError, match="cannot be moved or cast"):
            module.to("cpu")


def test_looking_at_a_block_and_hooking_it_is_not_training() -> None:
    module = Walk()
    with penstock.stream(module, "blocks", vram=ROOM, ram=ROOM) as streamed:
        for block in module.blocks:
            block.register_forward_hook(lambda *_: None)
            assert block[0].weight.shape[1] == 16
        assert list(reversed(module.blocks[1:3]))[0] is module.blocks[2]
        assert streamed.report.passes == 0


def test_what_returns_after_the_first_block_reads_no_more() -> None:
    """A step cache of the user's: its skipped steps compute one block, or none."""
    stop = [99]

    def order(blocks: Any) -> Any:
        return (block for index, block in enumerate(blocks) if index < stop[0])

    module = Walk(order)
    with penstock.stream(module, "blocks", vram=_least(module, "blocks"), ram=8192) as streamed:
        report = streamed.report
        assert report.from_disk == report.blocks
        for stop[0] in (99, 1, 1, 1, 99, 1, 1, 1, 1, 99):
            _walked(module)
        report = streamed.report
        assert report.passes <= 4  # what is read ahead of a fourth may be in it
        assert report.read_bytes <= 3 * report.streamed_bytes + 2 * 8192


@pytest.mark.parametrize("tail", [(), (5,)], ids=["front alone", "front and back"])
def test_a_cache_that_decides_after_two_blocks_reads_what_it_computes(tail: Any) -> None:
    """After the first call that leaves some out nothing is read ahead of the decision."""
    whole, short = (*range(6),), (0, 1, *tail)
    calls = [whole, short, short, short, whole, short, short, whole, whole, short]
    at: list[Any] = [whole]
    module = Walk(lambda blocks: (blocks[index] for index in at[0]))
    wanted = {}
    for at[0] in (whole, short):
        wanted[at[0]] = _walked(module)
    with penstock.stream(module, "blocks", vram=_least(module, "blocks"), ram=8192) as streamed:
        for at[0] in calls:
            assert torch.equal(_walked(module), wanted[at[0]])
        report = streamed.report
    assert report.from_disk == report.blocks
    sizes = [sum(p.nbytes for p in each.parameters()) for each in module.blocks]
    computed = sum(sizes[index] for call in calls for index in call)
    in_vain = sum(sizes[2:4])  # once, before the decision was known of
    ahead = sum(sizes[:2])  # of a next call
    assert computed <= report.read_bytes <= computed + in_vain + ahead


def _zipped(module: Any) -> Any:
    return (b for pair in zip(module.blocks, module.others, strict=True) for b in pair)


def _between(module: Any) -> Any:
    for index, block in enumerate(module.blocks):
        yield block
        if index % 2 == 0:
            yield module.others[index // 2]


@pytest.mark.parametrize("way", [_zipped, _between], ids=["zipped", "between"])
def test_interleaved_lists_are_read_once_a_call(way: Any) -> None:
    module: Any = Walk(lambda _: way(module))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(6)
        module.others = nn.ModuleList(nn.Linear(16, 16) for _ in range(6 if way is _zipped else 3))
    wanted, lists, calls = _walked(module), ["blocks", "others"], 6
    limit = _least(module, lists)
    with penstock.stream(module, lists, vram=limit, ram=8192) as streamed:
        for _ in range(calls):
            assert torch.equal(_walked(module), wanted)
        report = streamed.report
    assert report.from_disk == report.blocks
    assert report.read_bytes <= calls * report.streamed_bytes + 2 * 8192  # two read ahead
    assert report.skipped == 0 and report.passes <= calls + 1


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda m: m.to(torch.bfloat16), "cannot be moved or cast"),
        (lambda m: m.half(), "cannot be moved or cast"),
        (lambda m: m.to("meta"), "cannot be moved or cast"),
        (lambda m: m.state_dict(), "state_dict"),
    ],
)
def test_what_is_refused_is_refused_before_anything_moves(use: Any, message: str) -> None:
    """The layer before the blocks is reached first."""

    class Headed(Walk):
        def __init__(self) -> None:
            super().__init__()
            blocks = self._modules.pop("blocks")
            self.head = nn.Linear(16, 16)
            self.blocks = blocks

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(self.head(x))

    module = Headed()
    wanted, before = _walked(module), _state(module)
    with penstock.stream(module, "blocks", vram=ROOM, ram=ROOM):
        with pytest.raises(UsageError, match=message):
            use(module)
        assert module.to(torch.float32) is module and module.cpu() is module
        assert torch.equal(_walked(module), wanted)
    assert _same(module, before)
    assert torch.equal(_walked(module), wanted)


def test_sequential_offload_is_refused_before_anything_moves() -> None:
    from accelerate import cpu_offload

    module = Walk()
    module.head = nn.Linear(4, 4)
    before = _state(module)
    with penstock.stream(module, "blocks", vram=ROOM, ram=ROOM):
        with pytest.raises(UsageError, match="state_dict"):
            cpu_offload(module, torch.device("cpu"))
        assert not any(hasattr(each, "_hf_hook") for each in module.modules())
    assert _same(module, before)


def _hooked(module: nn.Module) -> None:
    from accelerate.hooks import ModelHook, add_hook_to_module

    add_hook_to_module(module.blocks[2], ModelHook())


def _compiled(module: nn.Module) -> None:
    module.blocks[1].compile(backend="eager")


@pytest.mark.parametrize(
    ("spoil", "message"), [(_hooked, "blocks.2 is under a hook of accelerate"),
                           (_compiled, "blocks.1 was compiled")]
)  # fmt: skip
def test_whom_others_move_is_refused(spoil: Any, message: str) -> None:
    module = Walk()
    spoil(module)
    with pytest.raises(UsageError, match=message):
        penstock.stream(module, "blocks", vram=ROOM, ram=ROOM)


def test_beside_mmgp_nothing_is_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mmgp", sys)
    with pytest.raises(UsageError, match="mmgp was imported"):
        penstock.stream(Walk(), "blocks", vram=ROOM, ram=ROOM)


def test_what_is_written_to_a_lent_weight_is_not_lost_in_silence() -> None:
    module = Walk()
    with penstock.stream(module, "blocks", vram=ROOM, ram=ROOM), torch.no_grad():
        module.blocks[0][0].weight.mul_(2)
        with pytest.raises(UsageError, match=r"0\.0\.weight was written to"):
            _walked(module)
