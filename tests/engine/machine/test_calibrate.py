"""Calibration: rates found in the seconds of several operations, on a clock of the test's own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch

from penstock.engine.families.wan.cost.vae import VaeWork
from penstock.engine.families.wan.samples import SAMPLES
from penstock.engine.machine import calibrate, doctor
from penstock.engine.machine.calibrate import Effort
from penstock.engine.machine.doctor import Finding
from penstock.engine.machine.samples import Samples
from penstock.profiles.rates import Rates
from penstock.quant.compute import Operands
from tests import fake_kitchen

CPU = torch.device("cpu")


class Clock:
    """Seconds that operations take, as they say."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def spend(self, seconds: float) -> None:
        self.now += seconds

    @property
    def effort(self) -> Effort:
        return Effort(tokens=1024, copy_bytes=1, read_bytes=1, seconds=0.0, clock=self)


def test_the_vaes_rates_are_those_of_its_blocks() -> None:
    true = Rates(
        1.0, 1.0, 1.0,
        conv_flops=1e11, conv_element_s=8e-9, conv_pixel_s=2e-7, conv_call_s=3e-4,
    )  # fmt: skip
    clock, real = Clock(), SAMPLES.residual

    def block(width: int, side: int, *where: object) -> tuple[VaeWork, object]:
        work, _ = real(width, side, *where)
        return work, partial(clock.spend, work.seconds(true))

    samples = Samples(SAMPLES.forward, block)
    found = calibrate._vae(samples, CPU, torch.float32, clock.effort)
    assert found == {name: pytest.approx(getattr(true, name), rel=1e-3) for name in found}
    assert len(found) == 4


def test_a_product_in_8_bits_is_timed_as_a_linear_does_it() -> None:
    clock, asked = Clock(), []

    def path(operands: Operands, x: torch.Tensor) -> None:
        asked.append((operands, x.shape, x.dtype))
        clock.spend(2 * x.shape[0] * operands.shape[0] * operands.shape[1] / 3e9)

    operands = calibrate._stored("int8", 48, CPU)
    found = calibrate._product(path, operands, CPU, torch.bfloat16, clock.effort)
    assert found == pytest.approx(3e9)
    assert all(each == (operands, (1024, 1024), torch.bfloat16) for each in asked)
    assert operands.shape == (48, 1024) and operands.tensors["weight"].dtype == torch.int8
    assert calibrate._eight_bit("int8", CPU, torch.bfloat16, clock.effort) is None


def test_decoding_is_timed_on_a_weight_as_it_is_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, moved = Clock(), []

    def dequantise(fmt: object, tensors: object, shape: tuple[int, int], *where: object) -> None:
        moved.append(shape)
        clock.spend(shape[0] * shape[1] * 3 / 1e9)  # a byte read, two written

    monkeypatch.setattr(calibrate, "dequantise", dequantise)
    effort = replace(clock.effort, copy_bytes=8 * 1024 * 10)
    assert calibrate._decode(CPU, torch.bfloat16, effort) == pytest.approx(1e9)
    assert set(moved) == {(10, 1024)}


def test_few_tokens_pay_for_what_they_attend_to(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        clock.spend(1e-4 + k.numel() * (2e-9 + 4 * q.shape[1] / 1e11))

    class Forward:
        width, tokens, attended = 512, 256, 256 + 512

        def __call__(self, chunk: int) -> None:
            chunks = -(-self.tokens // chunk)
            clock.spend(self.tokens * 1e-4 + (chunks - 1) * (1e-3 + 2e-9 * 512 * (256 + 512)))

    monkeypatch.setattr(calibrate, "attention", attend)
    samples = Samples(lambda *_: Forward(), SAMPLES.residual)
    found = calibrate._tiny(samples, CPU, torch.float32, clock.effort, attention_flops=1e11)
    assert found["tiny_key_s"] == pytest.approx(2e-9)
    assert found["tiny_overhead_s"] == pytest.approx(1e-3)


def test_angles_are_fp32_as_in_a_model_that_is_run() -> None:
    work = SAMPLES.forward(CPU, torch.bfloat16, 64)
    assert work.rope.cos.dtype == work.rope.sin.dtype == torch.float32


def test_what_a_card_does_not_multiply_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    stored, card = calibrate._stored, torch.device("cuda")
    monkeypatch.setattr(calibrate, "_stored", lambda name, rows, device: stored(name, 32, CPU))
    monkeypatch.setattr(calibrate, "_product", lambda path, *rest: path.path)
    for works, found in ((frozenset({"int8"}), "int8"), (frozenset(), None)):
        monkeypatch.setattr(calibrate, "probe", lambda device: {})
        monkeypatch.setattr(calibrate, "working", lambda reports, works=works: works)
        assert calibrate._eight_bit("int8", card, torch.bfloat16, Clock().effort) == found


def test_no_seconds_are_negative() -> None:
    """More units and fewer seconds: the second kind of work cannot be what takes them."""
    found = calibrate._fitted([[1.0, 0.0], [1.0, 5.0]], [2.0, 1.5])
    assert found[1] == 0.0 and 1.5 <= found[0] <= 2.0


def test_operations_take_turns() -> None:
    clock, order = Clock(), []

    def work(name: str, seconds: float) -> None:
        order.append(name)
        clock.spend(seconds)

    works = [partial(work, "a", 1.0), partial(work, "b", 3.0)]
    assert calibrate._in_turns(works, CPU, clock.effort) == [1.0, 3.0]
    assert "".join(order) == "ab" * (len(order) // 2)


def spending(clock: Clock, seconds: list[float]) -> Callable[[], None]:
    """An operation that takes these, and then the last one again and again."""
    left = iter(seconds)
    return lambda: clock.spend(next(left, seconds[-1]))


def test_the_best_seconds_count_once_they_are_steady() -> None:
    """Two repetitions warm up; then a busy machine takes ten times as long, but now and then."""
    clock = Clock()
    effort = replace(clock.effort, seconds=3.0)
    busy = [1.0, 1.0, 10.0, 1.0, 10.0, 10.0, 10.0, 1.0, 10.0, 10.0]
    assert calibrate._in_turns([spending(clock, busy)], CPU, effort) == [10.0]
    assert effort.spreads == [1.0]  # time was up: 3 s were wanted, 24 were granted

    clock = Clock()
    effort = replace(clock.effort, seconds=8.0, spreads=[])
    assert calibrate._in_turns([spending(clock, busy)], CPU, effort) == [1.0]
    assert effort.spreads == [10.0]


def test_a_quiet_machine_is_not_measured_longer_than_wanted() -> None:
    clock = Clock()
    effort = replace(clock.effort, seconds=5.0)
    assert calibrate._in_turns([spending(clock, [1.0])], CPU, effort) == [1.0]
    assert (clock.now, effort.spreads) == (7.0, [1.0])


def test_the_best_of_several_reads_counts(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    rates = iter([1e9, 4e9, 2e9])
    monkeypatch.setattr(calibrate, "read_rate", lambda *asked: next(rates))
    effort = Clock().effort
    assert calibrate._read(tmp_path, replace(effort, read_bytes=8 << 20)) == 4e9
    assert effort.spreads == [2.0]


@pytest.mark.parametrize(
    ("load", "spreads", "busy"), [(0.1, [1.0, 1.1], False), (0.9, [1.0], True), (0.1, [1, 3], True)]
)
def test_the_doctor_warns_of_a_busy_machine(load: float, spreads: list[float], busy: bool) -> None:
    found = doctor.steadiness(load, spreads)
    assert (found.remedy is not None) == busy
    assert f"{max(spreads):.2f}" in found.found


def test_every_rate_of_a_cpu_is_measured(tmp_path) -> None:
    quick = Effort(tokens=64, copy_bytes=1 << 20, read_bytes=8 << 20, seconds=0.001)
    found = calibrate.calibrate(CPU, tmp_path, quick)
    absent = {name for name, value in vars(found).items() if value is None}
    eight = {"eight_bit_flops", "fp8_flops", "int8_attention_flops"}
    assert absent == eight | {"sol_attention_flops", "nvfp4_flops", "mxfp8_flops"}


def test_attention_in_8_bits_is_timed_where_it_works(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()

    def kernel(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        heads, tokens, width = q.shape[1:]
        clock.spend(4 * tokens * k.shape[2] * heads * width / 7e9)
        return fake_kitchen.quantising(q, k, v)

    effort = replace(clock.effort, tokens=64)
    fake_kitchen.install(monkeypatch, kernel)
    assert calibrate._other_attention("int8", CPU, torch.float32, effort) == pytest.approx(7e9)
    fake_kitchen.install(monkeypatch, kernel, available=False)
    assert calibrate._other_attention("int8", CPU, torch.float32, effort) is None


def test_the_doctor_tells_of_products_that_were_measured() -> None:
    measured = Rates(1.0, 1.0, 1.0, fp8_flops=2e14, nvfp4_flops=9e14)
    assert list(doctor._other_products(measured)) == [
        Finding("products (fp8)", "works, 200 TFLOP/s"),
        Finding("products (nvfp4)", "works, 900 TFLOP/s"),
    ]


def test_the_doctor_tells_of_attention_in_8_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = Rates(1.0, 1.0, 1.0, int8_attention_flops=3e14)
    first, sparse = doctor._other_attention(CPU, measured)
    assert first.found == "works, 300 TFLOP/s"
    assert sparse == Finding("attention (sol)", "no: it needs a CUDA device", sparse.remedy)
    fake_kitchen.install(monkeypatch, available=False)
    told, _ = doctor._other_attention(CPU, Rates(1.0, 1.0, 1.0))
    assert told.found == "no: it needs a CUDA device" and "--attention sdpa" in str(told.remedy)
