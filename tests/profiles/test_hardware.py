"""The probe: control groups, memory that others hold, nothing to spare; rates; cards."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from penstock.engine.family.protocol import builtin
from penstock.errors import OverBudget, ProfileError
from penstock.profiles import hardware as hw
from penstock.profiles.advice import plan_chosen
from penstock.profiles.cards import cards, described, disk_bytes_per_s, find_card
from penstock.profiles.manifest import VideoShape
from penstock.profiles.options import Options
from penstock.profiles.phases import Workload
from penstock.profiles.profile import choose, load
from penstock.profiles.rates import Rates, store_rates, stored_rates
from penstock.units import GIB, MIB

WORK = Workload(VideoShape(832, 480, 81), 40, True)


@pytest.fixture(autouse=True)
def no_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PENSTOCK_CONFIG", str(tmp_path / "config"))


def free_memory(monkeypatch: pytest.MonkeyPatch, nbytes: int) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=nbytes))


def group(folder: Path, limit: str, used: int, stat: str = "", version: int = 2) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    names = ("max", "current") if version == 2 else ("limit_in_bytes", "usage_in_bytes")
    (folder / f"memory.{names[0]}").write_text(limit + "\n")
    (folder / f"memory.{names[1]}").write_text(f"{used}\n")
    if stat:
        (folder / "memory.stat").write_text(stat)


class TestControlGroups:
    def test_none(self, tmp_path, monkeypatch) -> None:
        free_memory(monkeypatch, 8 * GIB)
        assert hw.available_ram_bytes(tmp_path) == 8 * GIB

    def test_the_tightest_of_a_chain_counts(self, tmp_path, monkeypatch) -> None:
        free_memory(monkeypatch, 8 * GIB)
        (tmp_path / "proc/self").mkdir(parents=True)
        (tmp_path / "proc/self/cgroup").write_text("0::/outer/inner\n")
        base = tmp_path / "sys/fs/cgroup"
        group(base, "max", 0)
        group(base / "outer", str(3 * GIB), GIB)
        group(base / "outer/inner", str(6 * GIB), GIB)
        assert hw.available_ram_bytes(tmp_path) == 2 * GIB

    def test_cache_that_can_go_counts_as_free(self, tmp_path, monkeypatch) -> None:
        free_memory(monkeypatch, 8 * GIB)
        base = tmp_path / "sys/fs/cgroup"
        group(base, str(4 * GIB), 3 * GIB, f"anon 5\ninactive_file {2 * GIB}\n")
        assert hw.available_ram_bytes(tmp_path) == 3 * GIB

    def test_version_1(self, tmp_path, monkeypatch) -> None:
        free_memory(monkeypatch, 8 * GIB)
        (tmp_path / "proc/self").mkdir(parents=True)
        lines = "4:cpu,cpuacct:/other\n7:memory:/job\n"
        (tmp_path / "proc/self/cgroup").write_text(lines)
        base = tmp_path / "sys/fs/cgroup/memory"
        group(base, str(1 << 63), 5, version=1)
        group(base / "job", str(2 * GIB), GIB, f"total_inactive_file {MIB}\n", version=1)
        group(tmp_path / "sys/fs/cgroup/other", "5", 5)
        assert hw.available_ram_bytes(tmp_path) == GIB + MIB

    def test_a_group_that_is_over_its_limit_has_nothing(self, tmp_path, monkeypatch) -> None:
        free_memory(monkeypatch, 8 * GIB)
        group(tmp_path / "sys/fs/cgroup", str(GIB), 2 * GIB, "inactive_file many\n")
        assert hw.available_ram_bytes(tmp_path) == 0


class TestAuto:
    def plan(self, machine: hw.Hardware):
        chosen = choose(load("auto"), Options(), machine)
        return plan_chosen(lambda stored: builtin("wan2.1-i2v-14b", stored), WORK, chosen)

    def test_another_process_holds_memory(self, monkeypatch) -> None:
        free_memory(monkeypatch, 40 * GIB)
        monkeypatch.setattr(hw, "_cgroup_free", lambda root: iter(()))
        alone = hw.probe("cpu")
        free_memory(monkeypatch, 12 * GIB)
        beside = hw.probe("cpu")
        assert alone.ram_bytes + alone.vram_bytes == 38 * GIB
        assert beside.ram_bytes + beside.vram_bytes == 10 * GIB
        found = self.plan(beside)
        assert found.peak_vram_bytes <= beside.vram_bytes
        assert found.peak_ram_bytes <= beside.ram_bytes
        # "auto" spares the disk: with more memory it may spend a little on filling it.
        filling_s = alone.ram_bytes / alone.rates.read_bytes_per_s
        assert self.plan(alone).seconds <= found.seconds + filling_s
        assert self.plan(alone)["denoise"].read_bytes < found["denoise"].read_bytes

    def test_nothing_to_spare(self, monkeypatch) -> None:
        free_memory(monkeypatch, hw.CPU_RESERVE_BYTES - 1)
        machine = hw.probe("cpu")
        assert machine.vram_bytes == machine.ram_bytes == 0
        with pytest.raises(OverBudget, match="no plan fits the RAM budget") as refused:
            self.plan(machine)
        assert "no profile and no shorter or smaller video" in str(refused.value)

    def test_a_gpu_that_others_use_too(self, monkeypatch) -> None:
        free_memory(monkeypatch, 40 * GIB)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (6 * GIB, 24 * GIB))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card")
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
        machine = hw.probe("cuda")
        assert (machine.device, machine.place) == ("cuda", "cuda:1")
        assert machine.vram_bytes == 6 * GIB - hw.CUDA_RESERVE_BYTES
        assert machine.rates_source == "assumed"
        assert self.plan(machine).peak_vram_bytes <= machine.vram_bytes

    @pytest.mark.parametrize(
        ("device", "version", "fused"),
        [
            ("cuda", "2.9.0+cu128", True), ("cuda", "2.13.0", True), ("cuda", "3.0", True),
            ("cuda", "2.8.1", False), ("cuda", "of one's own", False), ("cpu", "2.13.0", False),
        ],
    )  # fmt: skip
    def test_norms_are_one_kernel_on_cuda_since_torch_2_9(
        self, monkeypatch, device: str, version: str, fused: bool
    ) -> None:
        monkeypatch.setattr(hw.metadata, "version", lambda name: version)
        assert hw.has_fused_norms(device) == fused

    def test_a_torch_that_is_not_a_package_is_taken_for_an_old_one(self, monkeypatch) -> None:
        def absent(name: str) -> str:
            raise hw.metadata.PackageNotFoundError(name)

        monkeypatch.setattr(hw.metadata, "version", absent)
        assert not hw.has_fused_norms("cuda")

    def test_measured_rates_win(self, monkeypatch) -> None:
        free_memory(monkeypatch, 40 * GIB)
        rates = Rates(5e9, 4e9, 3e9, eight_bit_flops=None, conv_flops=1e9)
        store_rates("CPU", rates)
        machine = hw.probe("cpu")
        assert machine.rates == rates
        assert machine.rates_source == "measured by penstock doctor"


class TestStoredRates:
    def test_there_and_back(self, tmp_path) -> None:
        rates, other = Rates(1.0, 2.0, 3.0, attention_flops=4.5), Rates(5.0, 6.0, 7.0)
        assert stored_rates("a", tmp_path) is None
        path = store_rates("a", rates, tmp_path)
        assert store_rates("b", other, tmp_path) == path
        assert (stored_rates("a", tmp_path), stored_rates("b", tmp_path)) == (rates, other)

    @pytest.mark.parametrize("text", ["{", "[]", '{"a": {"flops": 1}}', '{"a": {"speed": 1}}'])
    def test_a_damaged_file_is_named(self, tmp_path, text) -> None:
        (tmp_path / "rates.json").write_text(text)
        with pytest.raises(ProfileError, match=r"rates\.json cannot be used"):
            stored_rates("a", tmp_path)

    def test_rates_are_positive(self) -> None:
        with pytest.raises(ProfileError, match="read_bytes_per_s"):
            Rates(1.0, 1.0, 0.0)


class TestCards:
    def test_each_is_found_by_its_own_name(self) -> None:
        for card in cards():
            assert find_card(card.name) == card
            assert f"{card.memory_bytes // GIB}GB" in card.name

    @pytest.mark.parametrize(
        ("said", "meant"),
        [
            ("3060", "RTX 3060 12GB"),
            ("rtx-4070", "RTX 4070 12GB"),
            ("RTX 4070 Ti", "RTX 4070 Ti 12GB"),
            ("4090 24 GB", "RTX 4090 24GB"),
            ("4070 super", "RTX 4070 Super 12GB"),
            ("RTX 4070 Ti Super", "RTX 4070 Ti Super 16GB"),
            ("4060 Ti 8GB", "RTX 4060 Ti 8GB"),
        ],
    )
    def test_as_people_say_it(self, said, meant) -> None:
        assert find_card(said).name == meant

    def test_unknown_or_several(self) -> None:
        with pytest.raises(ProfileError, match="unknown card"):
            find_card("Voodoo 2")
        with pytest.raises(ProfileError, match="several cards") as refused:
            find_card("3050")
        assert "RTX 3050 8GB" in str(refused.value) and "4090" not in str(refused.value)

    def test_disks(self) -> None:
        assert disk_bytes_per_s("nvme3") == pytest.approx(3.2e9)
        assert disk_bytes_per_s("3.5GB/s") == 3.5e9
        assert disk_bytes_per_s("500 MB/s") == 5e8
        with pytest.raises(ProfileError, match="unknown disk"):
            disk_bytes_per_s("floppy")

    def test_a_described_machine_keeps_its_reserves(self) -> None:
        machine = described("GTX 1650", "16GiB", "sata")
        assert machine.vram_bytes == 4 * GIB - hw.CUDA_RESERVE_BYTES
        assert machine.ram_bytes == 16 * GIB - hw.SYSTEM_BYTES - hw.INTERPRETER_BYTES
        assert machine.rates.eight_bit_flops is machine.rates.int8_attention_flops is None
        assert described("4090", "1GiB", None).ram_bytes == 0
        assert described("4090", None, None).rates.copy_bytes_per_s == pytest.approx(
            2.5e10, rel=0.02
        )

    def test_only_cards_with_fp8_units_have_a_rate_of_it(self) -> None:
        have = {card.name for card in cards() if card.fp8_flops is not None}
        assert have == {card.name for card in cards() if card.name[:6] in ("RTX 40", "RTX 50")}
        for name in have:
            card = find_card(name)
            # With 32-bit sums, between those of bf16 and of int8 (data sheets of Ada, Blackwell).
            assert card.fp8_flops / card.flops == pytest.approx(2, rel=0.01)
            assert card.eight_bit_flops / card.fp8_flops == pytest.approx(2, rel=0.01)

    @pytest.mark.parametrize(
        ("name", "bf16", "int8", "milliseconds_a_block"),
        [
            ("3060", 25.5, 102, 16),
            ("3090", 71.2, 285, 16),
            ("4080", 97.5, 390, 16),
            ("5090", 209.5, 838, 8),
        ],
    )
    def test_peaks_are_those_of_the_floors(self, name, bf16, int8, milliseconds_a_block) -> None:
        card = find_card(name)
        assert (card.flops / 1e12, card.eight_bit_flops / 1e12) == (bf16, int8)
        assert 404e6 / card.link_bytes_per_s * 1e3 == pytest.approx(milliseconds_a_block, rel=0.05)


def test_stored_rates_are_plain_json(tmp_path) -> None:
    path = store_rates("a", Rates(1.0, 2.0, 3.0), tmp_path)
    assert json.loads(path.read_text())["a"]["flops"] == 1.0


def test_the_overhead_of_a_chunk_is_that_of_its_size() -> None:
    rates = Rates(1e12, 1e9, 1e9, overhead_s=5e-3, tiny_overhead_s=1e-3)
    assert [rates.chunk_overhead_s(tokens) for tokens in (1, 2, 32, 4096)] == [
        1e-3, 1e-3, 5e-3, 5e-3,
    ]  # fmt: skip
    assert rates.chunk_overhead_s(8) == pytest.approx(3e-3)
    assert replace(rates, tiny_overhead_s=None).chunk_overhead_s(2) == 5e-3


def test_few_tokens_pay_for_the_keys_they_read() -> None:
    rates = Rates(1e12, 1e9, 1e9, overhead_s=5e-3, tiny_overhead_s=1e-3, tiny_key_s=1e-6)
    assert rates.chunk_overhead_s(2, attended=2000) == pytest.approx(3e-3)
    assert rates.chunk_overhead_s(8, attended=2000) == pytest.approx(4e-3)
    assert rates.chunk_overhead_s(32, attended=2000) == 5e-3
    assert replace(rates, tiny_key_s=None).chunk_overhead_s(2, attended=2000) == 1e-3


def test_rates_stored_before_there_were_these_terms_are_read(tmp_path) -> None:
    path = store_rates("a", Rates(1.0, 2.0, 3.0, conv_element_s=1e-9), tmp_path)
    kept = json.loads(path.read_text())
    new = ("conv_pixel_s", "conv_call_s", "tiny_key_s", "int8_attention_flops")
    for name in new:
        del kept["a"][name]
    path.write_text(json.dumps(kept))
    found = stored_rates("a", tmp_path)
    assert found == Rates(1.0, 2.0, 3.0, conv_element_s=1e-9)
    assert [getattr(found, name) for name in new] == [None] * 4
