"""The benchmarks that write gigabytes, on a tiny model: their roles agree, or it is seen."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import big_forward, peers
from benchmarks.big_forward import one_by_one, stream, summary, write

OPTIONS = argparse.Namespace(
    name="tiny", blocks=3, format="int8", vram="64MiB", ram="64MiB", folder=None, reuse=None
)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("big")
    roles = {"write": write, "stream": stream, "one_by_one": one_by_one}
    return {
        name: role(OPTIONS, folder) | {"peak_bytes": 1 << 30, "process_s": 1.0}
        for name, role in roles.items()
    }


def test_the_streamed_forward_is_that_of_the_blocks_one_by_one(
    found: dict[str, dict[str, Any]],
) -> None:
    report = summary(OPTIONS, found)
    assert report["identical"] and report["under_limit"]
    assert report["tokens"] == 512
    assert report["parameters"] == pytest.approx(report["file_bytes"], rel=0.3)
    denoise = report["stream"]["phases"]["denoise"]
    assert denoise["read_bytes"] > 0
    assert report["stream"]["planned_bytes"] >= report["stream"]["ledgers_bytes"]
    json.dumps(report)


def test_another_result_or_too_much_memory_is_seen(found: dict[str, dict[str, Any]]) -> None:
    other = found | {"one_by_one": found["one_by_one"] | {"latents_sha256": "other"}}
    assert not summary(OPTIONS, other)["identical"]
    large = found | {"stream": found["stream"] | {"peak_bytes": big_forward.LIMIT_BYTES}}
    assert not summary(OPTIONS, large)["under_limit"]


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> argparse.Namespace:
    folder = tmp_path_factory.mktemp("peers")
    made = argparse.Namespace(
        name="tiny", blocks=2, rounds=1, size="32x32x5", device="cpu", folder=str(folder),
        cases=None, case="write", save=None, limit_s=60,
    )  # fmt: skip
    peers.play(made)
    return made


def test_every_peer_on_the_cpu_gives_the_same_bits(options: argparse.Namespace) -> None:
    rows = {}
    for name in peers.wanted(options):
        options.case = name
        with torch.enable_grad():  # a peer turns gradients off for good, in a process of its own
            rows[name] = peers.play(options) | {"plain_s": 0.5}
    assert set(rows) == set(peers.PEERS) - set(peers.ON_CUDA) - set(peers.PACKAGES)
    assert len({row["output_sha256"] for row in rows.values()}) == 1
    ours = rows["penstock_disk"]
    assert ours["read_bytes"] == 2 * ours["pass_bytes"]
    assert rows["penstock_ram"]["read_bytes"] == ours["pass_bytes"]
    report = peers.summary(options, rows, 10**9)
    assert report["same_output"] and report["plain_gb_per_s"] == 2
    assert report["against_penstock_disk"]["mmap"]["step_s"] == pytest.approx(
        rows["mmap"]["step_s"] / ours["step_s"], abs=0.01
    )


def test_a_peer_that_fails_or_differs_is_told(options: argparse.Namespace) -> None:
    good = {"first_s": 1.0, "step_s": 1.0, "output_sha256": "a", "plain_s": 1.0}
    assert peers.same({"one": good, "two": {"failed": "x"}})
    assert not peers.same({"one": good, "two": good | {"output_sha256": "b"}})
    options.cases = "penstock_disk,unheard_of"
    with pytest.raises(SystemExit, match="unheard_of"):
        peers.wanted(options)
    options.cases = None


def _process(code: str) -> subprocess.Popen[str]:
    pipe, command = subprocess.PIPE, [sys.executable, "-c", code]
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True)


@pytest.mark.parametrize(
    ("code", "told"),
    [
        ("input(); print('noise'); print('{\"a\": 1}')", {"a": 1}),
        ("input(); exit('not today')", {"failed": "not today"}),
        ("input(); import time; time.sleep(1000)", {"failed": "longer than 3 s"}),
        ("import os; os._exit(1)", {"failed": "killed"}),
    ],
)
def test_what_a_peer_comes_to(code: str, told: Any) -> None:
    process = _process(f"print('noise'); print('ready', flush=True); {code}")
    peers.await_ready(process)
    limit_s = 3 if "longer" in str(told) else 1e6
    assert peers.outcome(process, limit_s) == told


def test_without_a_model_there_is_nothing_to_measure(
    options: argparse.Namespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers, "start", lambda *_: _process("input(); exit('ValueError: no')"))
    with pytest.raises(SystemExit, match="ValueError: no"):
        peers.measure(options, tmp_path)
