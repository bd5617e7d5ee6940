"""The GPU suite's logic, every case at tiny shapes on the CPU."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import gpu_cases, gpu_context, gpu_kernels, gpu_memory, gpu_suite, render
from benchmarks.gpu_cases import Delays
from benchmarks.gpu_context import Case, Context, scale
from benchmarks.gpu_memory import peak
from benchmarks.gpu_plans import step_bytes
from benchmarks.gpu_suite import Kept, Workers, cut_short, run_all, run_group, run_parts, slug
from benchmarks.gpu_worth import PARTS, WRITE_S, Part, chosen
from penstock.offload.schedule import Queue, Ref
from penstock.offload.tiers import CpuLink
from penstock.units import GIB
from tests import fake_kitchen

FOREVER = 1e12


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> Context:
    made = Context(scale(dry=True), tmp_path_factory.mktemp("suite"))
    for name, work in gpu_cases.write(made):
        if name != "machine":
            assert work()["bytes"] > 100_000
    gpu_context.written(made, "long", made.scale.blocks)
    return made


def _run(group: str, context: Context, path: Path) -> Mapping[str, Any]:
    run_group(group, gpu_suite.GROUPS[group](context), Kept(path), time.monotonic() + FOREVER)
    found: Mapping[str, Any] = json.loads(path.read_text())["groups"][group]
    return found


def test_every_placement_and_delay_gives_the_same_bits(context: Context, tmp_path: Path) -> None:
    found = _run("correctness", context, tmp_path / "kept.json")
    assert len(found) == 10
    assert all(row["identical"] for row in found.values()), found


def test_a_case_that_differs_is_seen(
    context: Context, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digests = iter("aaabaaaaaaa")  # the resident model's twice: once to compare with

    def wrong(*arguments: Any, **options: Any) -> Any:
        return SimpleNamespace(latents_sha256=next(digests), median_s=1.0)

    monkeypatch.setattr(gpu_cases, "placed", wrong)
    found = _run("correctness", context, tmp_path / "kept.json")
    assert [case for case, row in found.items() if not row["identical"]] == ["from disk"]


def test_peaks_are_held_against_plan_and_budget(context: Context, tmp_path: Path) -> None:
    found = _run("peaks", context, tmp_path / "kept.json")
    assert list(found) == ["writing", "large", "small"]
    assert found["writing"]["blocks"] == 4
    for row in (found["large"], found["small"]):
        assert row["within_budget"]
        assert row["planned_bytes"] >= row["ledger_bytes"] > 0
        assert row["guided"] and row["placement"]["n_blocks"] == 4


def test_what_a_card_lacks_is_found(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    honest, asked = gpu_memory.measure, []

    def short(engine: Any, *arguments: Any, **options: Any) -> Any:
        asked.append(engine.hardware.vram_bytes)
        if len(asked) < 3:
            raise torch.OutOfMemoryError("out of memory")
        return honest(engine, *arguments, **options)

    monkeypatch.setattr(gpu_memory, "measure", short)
    monkeypatch.setattr(gpu_memory, "HEADROOMS", (0, 1 << 20, 2 << 20))
    row = peak(context, gpu_memory.Ballast(context.device), 8 << 20)
    assert row["headroom_bytes"] == 2 << 20
    assert asked == [8 << 20, 7 << 20, 6 << 20]
    asked.clear()
    monkeypatch.setattr(gpu_memory, "HEADROOMS", (0,))
    with pytest.raises(RuntimeError, match="out of memory"):
        peak(context, gpu_memory.Ballast(context.device), 8 << 20)


def test_a_peak_above_the_budget_is_told(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = gpu_memory.measure

    def wasteful(*arguments: Any, **options: Any) -> Any:
        found = honest(*arguments, **options)
        for phase in found.phases:
            object.__setattr__(phase, "allocator_bytes", 1 << 40)
        return found

    monkeypatch.setattr(gpu_memory, "measure", wasteful)
    row = peak(context, gpu_memory.Ballast(context.device), 8 << 20)
    assert not row["within_budget"]


def test_speeds_are_related_to_the_resident_model(context: Context, tmp_path: Path) -> None:
    found = _run("speeds", context, tmp_path / "kept.json")
    assert len(found) == 3
    resident = found["32x48x5, resident"]
    assert resident["over_resident"] == 1
    disk = found["32x48x5, disk"]
    assert disk["over_resident"] == pytest.approx(disk["s_per_forward"] / resident["s_per_forward"])


def test_formats_run_on_every_path(context: Context, tmp_path: Path) -> None:
    found = _run("formats", context, tmp_path / "kept.json")
    assert found["bf16, exact"]["path"] == "dequant"
    assert found["int8, fast"]["path"] == "int8"
    for name in ("bf16", "fp8", "int8"):
        assert found[f"{name}, exact"]["relative_error"] < 0.05
    assert found["attention math"]["tflops"] > 0
    assert "failed" in found["attention cudnn_attention"]  # there is none on a CPU, and it says so


def test_attention_in_8_bits_is_held_against_torchs_own(
    context: Context, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases = dict(gpu_kernels.formats(context))
    monkeypatch.setattr(gpu_suite, "GROUPS", {"formats": lambda _: iter(
        [(name, cases[name]) for name in ("attention int8 (comfy-kitchen)",)]
    )})  # fmt: skip
    monkeypatch.setitem(sys.modules, "comfy_kitchen", None)
    found = _run("formats", context, tmp_path / "without.json")
    assert "comfy_kitchen" in found["attention int8 (comfy-kitchen)"]["failed"]
    fake_kitchen.install(monkeypatch)
    found = _run("formats", context, tmp_path / "with.json")
    row = found["attention int8 (comfy-kitchen)"]
    assert 0 < row["relative_error"] < 0.05 and row["ms"] > 0 and row["sdpa_ms"] > 0
    operations = 4 * context.scale.tokens * context.scale.context * context.scale.heads * 128
    assert row["tflops"] == pytest.approx(operations / row["ms"] / 1e9)


def test_tiles_change_nothing(context: Context, tmp_path: Path) -> None:
    found = _run("vae", context, tmp_path / "kept.json")
    assert list(found) == [
        f"{half}, {how}"
        for half in ("decode", "encode")
        for how in ("smallest card", "tiled 1x2", "whole")
    ]
    for half in ("decode", "encode"):
        assert found[f"{half}, tiled 1x2"]["tiles"] == [1, 2]
        assert found[f"{half}, whole"]["tiles"] == [1, 1]
        for row in found.values():
            assert row["planned_bytes"] >= row["ledger_bytes"] > 0
    assert found["decode, whole"]["largest_difference"] <= 1


@pytest.mark.faults  # a minute with the next: processes of their own
def test_peers_wait_for_their_turn(context: Context, tmp_path: Path) -> None:
    found = _run("peers", context, tmp_path / "kept.json")
    assert list(found) == ["writing", "penstock_ram", "resident"]
    for name in ("penstock_ram", "resident"):
        assert found[name]["step_s"] > 0 and found[name]["model"] == "tiny, 2 blocks, bf16"


def test_a_delay_is_put_before_what_its_queue_does() -> None:
    done: list[str] = []

    class Told(CpuLink):
        def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
            done.append("copy")

        def wait(self, queue: Queue, ref: Ref) -> None:
            done.append(f"wait {queue.name}")

    nothing = torch.zeros(1)
    for queue, expected in (
        (Queue.COPY, ["late COPY", "copy", "wait COMPUTE", "wait READ"]),
        (Queue.COMPUTE, ["copy", "wait COMPUTE", "late COMPUTE", "wait READ"]),
        (Queue.READ, ["copy", "wait COMPUTE", "wait READ", "late READ"]),
    ):
        done.clear()
        late = Delays(Told(), queue, lambda which, link: done.append(f"late {which.name}"))
        late.copy(nothing, nothing)
        late.wait(Queue.COMPUTE, Ref(Queue.COPY, 0))
        late.wait(Queue.READ, Ref(Queue.COPY, 0))
        assert done == expected
    late.drain()  # everything else is the link's own


# What is kept


def _group(monkeypatch: pytest.MonkeyPatch, *works: Any) -> None:
    def cases(context: Any) -> Iterator[Any]:
        yield from ((f"case {place}", work) for place, work in enumerate(works))

    monkeypatch.setattr(gpu_suite, "GROUPS", {"some": cases, "write": cases})


def _fails(error: BaseException) -> Any:
    def work() -> Any:
        raise error

    return work


def test_a_case_that_fails_is_kept_and_the_next_one_runs(
    context: Context, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _group(monkeypatch, lambda: {"a": 1}, _fails(RuntimeError("CUDA out of memory")), dict)
    found = _run("some", context, tmp_path / "kept.json")
    assert found["case 0"]["a"] == 1
    assert found["case 1"]["failed"] == "RuntimeError: CUDA out of memory"
    assert "failed" not in found["case 2"]
    assert cut_short(json.loads((tmp_path / "kept.json").read_text()))


def test_what_was_done_survives_an_end_in_the_middle(
    context: Context, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "kept.json"
    _group(monkeypatch, lambda: {"a": 1}, _fails(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        run_group("some", gpu_suite.GROUPS["some"](context), Kept(path), FOREVER)
    assert json.loads(path.read_text())["groups"]["some"]["case 0"]["a"] == 1
    assert list(tmp_path.iterdir()) == [path]


def test_a_run_goes_on_where_another_ended(
    context: Context, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, done = tmp_path / "gpu_suite_dry_run.json", []

    def told(place: int) -> Any:
        def work() -> dict[str, Any]:
            done.append(place)
            if len(done) == 1:
                raise RuntimeError("once")
            return {"place": place}

        return work

    _group(monkeypatch, told(0), told(1))
    monkeypatch.setattr(gpu_suite, "SHARES", {"some": 9.0, "write": 9.0})
    options = argparse.Namespace(
        dry_run=True, missing=True, groups="some", seconds=FOREVER, commit="first"
    )

    def here(group: str, share: float) -> str | None:
        if group == "some":
            run_group(group, gpu_suite.GROUPS[group](context), Kept(path), FOREVER)
        return None

    gpu_suite.run_all(options, Kept(path), here)
    assert not json.loads(path.read_text())["complete"]
    options.commit = "second"
    gpu_suite.run_all(options, Kept(path), here)
    kept = json.loads(path.read_text())
    assert done == [0, 1, 0]
    assert kept["complete"]
    assert [run["commit"] for run in kept["runs"]] == ["first", "second"]
    options.missing = False
    gpu_suite.run_all(options, Kept(path), here)
    assert done == [0, 1, 0, 0, 1]
    assert len(json.loads(path.read_text())["runs"]) == 1


def test_cases_after_the_deadline_are_named(
    context: Context, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "kept.json"
    _group(monkeypatch, _fails(AssertionError("ran")))
    run_group("some", gpu_suite.GROUPS["some"](context), Kept(path), time.monotonic() - 1)
    assert json.loads(path.read_text())["groups"]["some"]["case 0"] == {
        "skipped": "no time was left"
    }


def _told(context: Context) -> Iterator[Case]:
    yield "case", lambda: {"process": os.getpid()}


def _killed(context: Context) -> Iterator[Case]:
    yield from _told(context)
    yield "killed", lambda: os._exit(7)
    yield "after", dict


def _hanging(context: Context) -> Iterator[Case]:
    yield from _told(context)
    yield "hanging", lambda: time.sleep(1000) or {}
    yield "after", dict


def _breaking(context: Context) -> Iterator[Case]:
    def breaks() -> Mapping[str, Any]:
        gpu_context.finish = _fails(RuntimeError("an illegal memory access"))
        return {}

    yield from _told(context)
    yield "breaking", breaks


WORKING = {
    "write": _told, "correctness": _killed, "vae": _told, "peaks": _told, "speeds": _hanging,
    "formats": _breaking, "peers": _told,
}  # fmt: skip


@pytest.mark.faults
def test_a_group_that_ends_its_process_loses_only_its_own_cases(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "kept.json"
    monkeypatch.setattr(gpu_suite, "SHARES", dict.fromkeys(WORKING, FOREVER) | {"speeds": 8.0})
    poll = Connection.poll

    def until_it_hangs(pipe: Connection, share: float) -> bool:
        if share != 8.0:
            return poll(pipe, None)
        while "case" not in Kept(path).report["groups"].get("speeds", {}):
            time.sleep(0.01)
        return False

    monkeypatch.setattr(Connection, "poll", until_it_hangs)
    options = argparse.Namespace(
        dry_run=True, missing=False, groups=",".join(WORKING), seconds=FOREVER, commit="x",
        file=path, models=tmp_path,
    )  # fmt: skip
    with Workers(options, WORKING) as workers:
        run_all(options, Kept(path), workers.run)
    groups = json.loads(path.read_text())["groups"]
    assert groups["correctness"]["all"] == {"failed": "exit code 7"}
    assert groups["speeds"]["all"] == {"failed": "longer than 8 s"}
    assert groups["formats"]["all"] == {"failed": "exit code 1"}
    assert "failed" not in groups["formats"]["breaking"]
    assert groups["peers"].keys() == {"case"}
    assert all("after" not in cases for cases in groups.values())
    processes = [groups[name]["case"]["process"] for name in WORKING]
    assert [processes.index(each) for each in processes] == [0, 0, 2, 3, 3, 5, 6]
    assert os.getpid() not in processes


def test_a_group_for_which_no_time_is_left_is_named(tmp_path: Path) -> None:
    path = tmp_path / "kept.json"
    Kept(path).put("vae", "all", {"failed": "exit code 1"})
    options = argparse.Namespace(
        dry_run=True, missing=True, groups="vae,peers", seconds=100.0, commit="x"
    )
    asked: list[str] = []

    def run(group: str, share: float) -> None:
        asked.append(group)
        if group == "vae":
            options.seconds = 4.0

    run_all(options, Kept(path), run)
    groups = json.loads(path.read_text())["groups"]
    assert asked == ["write", "vae"]
    assert groups == {"vae": {}, "peers": {"all": {"skipped": "no time was left"}}}


def test_the_shares_fit_into_eight_minutes_in_order() -> None:
    assert list(gpu_suite.SHARES) == list(gpu_cases.GROUPS)
    assert gpu_suite.SECONDS < 480


WORTH = (
    Part("a", ("1", "2"), 40.0, 10.0),
    Part("b", ("1",), 200.0),
    Part("a", ("3",), 20.0),
    Part("c", ("1", "2"), 60.0),
)


@pytest.mark.parametrize(
    ("measured", "seconds", "expected"),
    [
        ((), 50, [("a", "12")]),
        ((), 49.9, [("a", "3")]),  # the first does not fit: a smaller one does
        ((), 1000, [("a", "12"), ("b", "1"), ("a", "3"), ("c", "12")]),
        ((("a", "2"),), 30, [("a", "1")]),  # half of the part, and what goes before
        ((("a", "1"), ("a", "2"), ("c", "2")), 60, [("a", "3"), ("c", "1")]),
        ((("a", "1"), ("a", "2"), ("a", "3"), ("b", "1")), 59, []),
    ],
)
def test_minutes_go_to_what_is_worth_most_and_not_measured(
    measured: tuple[tuple[str, str], ...], seconds: float, expected: list[tuple[str, str]]
) -> None:
    found = chosen(lambda group, case: (group, case) in measured, WRITE_S + seconds, WORTH)
    assert [(part.group, "".join(part.cases)) for part in found] == expected


def test_every_part_names_cases_that_there_are(tmp_path: Path) -> None:
    named = {(part.group, case) for part in PARTS for case in part.cases}
    assert len(named) == sum(len(part.cases) for part in PARTS)
    true = Context(replace(scale(dry=False), device="cpu"), tmp_path)
    for group in ("speeds", "vae", "correctness"):
        yielded = {case for case, _ in gpu_suite.GROUPS[group](true)}
        assert {case for each, case in named if each == group} == yielded
    assert {case for group, case in named if group == "peaks"} == set(true.scale.caps)
    assert {case for group, case in named if group == "peers"} == set(gpu_cases.CUDA_PEERS)


def test_minutes_run_cases_by_name_and_keep_what_is_there(
    context: Context, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, asked, done = tmp_path / "kept.json", [], []

    def case(name: str) -> Any:
        return lambda: done.append(name) or {"name": name}

    monkeypatch.setattr(gpu_suite, "GROUPS", {"some": lambda _: ((n, case(n)) for n in "xyz")})
    parts = (Part("some", ("z",), 10.0), Part("other", ("1",), 1e9), Part("some", ("x", "y"), 10.0))
    Kept(path).put("some", "y", {"name": "of an earlier run"})
    options = argparse.Namespace(dry_run=True, minutes=10.0, commit="second")

    def here(group: str, share: float, only: Sequence[str]) -> str | None:
        asked.append((group, tuple(only)))
        if group == "some":
            cases = gpu_suite.GROUPS[group](context)
            run_group(group, cases, Kept(path), time.monotonic() + FOREVER, only)
        return None if group != "some" or "x" in only else "longer than 5 s"

    run_parts(options, Kept(path), here, parts)
    assert asked == [("write", ()), ("some", ("z",)), ("some", ("x",))]
    assert done == ["z", "x"]
    kept = json.loads(path.read_text())
    assert kept["groups"]["some"]["y"]["name"] == "of an earlier run"
    assert set(kept["groups"]["some"]) == {"x", "y", "z"}  # what failed was tried no more
    assert [run["minutes"] for run in kept["runs"]] == [10.0]


def test_names_of_files() -> None:
    assert slug("NVIDIA H100 80GB HBM3") == "nvidia_h100_80gb_hbm3"


def test_it_runs_without_what_a_gpu_machine_may_lack() -> None:
    absent = ("av", "bitsandbytes", "optimum", "ftfy", "sentencepiece", "xxhash", "gguf", "pytest")
    code = f"""
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {absent!r}:
            raise ModuleNotFoundError(name, name=name)
sys.meta_path.insert(0, Absent())
import benchmarks.gpu_suite, benchmarks.peers, benchmarks.render, penstock.cli.main
print("imported")
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.stdout.strip() == "imported", run.stderr[-500:]


# Rendering


def _peers() -> dict[str, Any]:
    return {
        "model": "m", "size": "64x64x5", "file_bytes": 8.5e9, "disk_tier_over_plain": 1.25,
        "forward_over_plain": 1.1,
        "peers": {"penstock_disk": {"block_bytes": 6e8}},
        "against_penstock_disk": {"accelerate_disk": {"first_s": 2.0, "step_s": 3.0}},
    }  # fmt: skip


def test_tables_are_made_from_the_files_between_their_markers() -> None:
    text = "a\n<!-- measured:streaming -->\nstale\n<!-- /measured:streaming -->\nb\n"
    made = render.rendered(text, {"peers_cpu": _peers()})
    assert made.startswith("a\n<!-- measured:streaming -->\n| what | figure |")
    assert made.endswith("<!-- /measured:streaming -->\nb\n")
    assert (
        "stale" not in made
        and "| 1.25 while it reads, 1.10 over" in made
        and "first 2.00, later 3.00" in made
    )
    assert render.rendered(made, {"peers_cpu": _peers()}) == made
    assert "Nothing has been measured" in render.rendered(text, {})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- measured:nothing -->\n<!-- /measured:nothing -->", "no table"),
        ("<!-- measured:gpu -->\n", "not closed"),
    ],
)
def test_a_bad_marker_is_an_error(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        render.rendered(text, {})


def test_a_suite_becomes_tables_and_a_plot(tmp_path: Path) -> None:
    place = {
        "n_blocks": 40, "device_resident": 3, "host_resident": 37, "device_slots": 2,
        "disk_blocks": 0, "branches_a_visit": 2, "cross_kv_on_device": 1,
    }  # fmt: skip
    row = {
        "allocated_bytes": 7 << 30, "within_card": False, "s_per_forward": 12.5,
        "budget_bytes": 9 << 30, "placement": place, "chunk_tokens": 2048,
    }  # fmt: skip
    suite = {
        "complete": False,
        "groups": {
            "write": {"machine": {"gpu": "a card"}},
            "peaks": {"writing": {"s": 1}, "8 GiB": row, "4 GiB": {"failed": "no room. At all"}},
            "correctness": {"mixed": {"identical": False}, "late reads": {"skipped": "no time"}},
        },
    }
    made = render.gpu({"gpu_suite_a": suite})
    assert "**a card** (cut short" in made
    planned = step_bytes(row)
    told = f"{planned / GIB:.2f} GiB | 7.00 GiB | {100 * (planned / (7 * GIB) - 1):.1f} %"
    assert f"| 8 GiB | 3 / 37 / 0 | {told} | NO | 12.5 |" in made
    assert "| mixed | NO |" in made and "| 4 GiB |" not in made
    assert "- peaks, 4 GiB: no room\n- correctness, late reads: no time\n" in made
    assert render.plots({"gpu_suite_a": suite}, tmp_path) == [tmp_path / "gpu_suite_a.png"]


def test_the_lean_forward_on_a_card_becomes_a_table() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.lean_card", "--dry-run", "--blocks", "1"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    found = json.loads(run.stdout.splitlines()[-1])
    assert found["lean"]["1024"]["relative_difference"] == 0  # a chunk for all tokens
    found["lean"]["1024"] |= {"ratio": 1.5, "activation_bytes": GIB, "relative_difference": 2e-5}
    made = render.gpu({"lean_card_a": found})
    seconds = found["lean"]["1024"]["seconds"][-1]
    assert f"| 1,024 | {seconds:.3f} | 1.500 | 1.00 GiB | 2e-05 |" in made
    assert "| all | " in made and "| diffusers | " in made


def test_dry_runs_are_never_rendered(tmp_path: Path) -> None:
    (tmp_path / "gpu_suite_dry_run.json").write_text('{"dry_run": true}')
    (tmp_path / "peers.json").write_text("{}")
    assert list(render.read_results(tmp_path)) == ["peers"]
