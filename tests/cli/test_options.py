"""The options of a run as flags: each of them on every command that plans, from one table."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner, Result

from penstock.cli.main import app
from penstock.cli.options import FLAGS
from penstock.engine.bench.result import load
from penstock.engine.families.wan.tiny import write_tiny_model
from penstock.profiles.options import Options

CARD = ("plan", "--synthetic", "wan2.1-i2v-14b", "--card", "RTX 4090 24GB", "--json")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    return write_tiny_model(folder, image_to_video=False, vae={"base_dim": 8})


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CONFIG", "CACHE", "DATA_DIR"):
        monkeypatch.setenv(f"PENSTOCK_{name}", str(tmp_path / name))


def call(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def told(*words: object) -> dict[str, Any]:
    done = call(*words)
    assert done.exit_code == 0, done.output + done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_the_table_has_every_option() -> None:
    assert list(FLAGS) == [each.name for each in fields(Options)]


def test_every_command_that_plans_takes_every_option() -> None:
    commands: Mapping[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    named = {"disk": "--disk-use", "step_cache": "--cache"}
    flags = {named.get(n, f"--{n.replace('_', '-')}") for n in FLAGS}
    for name in ("generate", "plan", "bench", "demo"):
        taken = {flag for each in commands[name].params for flag in each.opts}
        assert flags <= taken, name
    resumed = {flag for each in commands["resume"].params for flag in each.opts}
    assert flags & resumed == {"--vram", "--ram", "--device", "--profile"}


def test_flags_reach_the_plan() -> None:
    flags = ("--branches", 1, "--chunk-tokens", 2048, "--tiles", "2x3", "--cross-kv", "ram",
             "--disk-use", "never", "--format", "nf4", "--pinned-share", "0.25",
             "--cache", "plan:20")  # fmt: skip
    plan = told(*CARD, *flags, "--disk", "hdd", "--ram", "64GiB")
    denoise, decode = (
        next(each for each in plan["phases"] if each["name"] == name)
        for name in ("denoise", "decode")
    )
    assert (denoise["branches"], denoise["chunk_tokens"]) == (1, 2048)
    assert not denoise["cross_kv_on_device"]
    assert denoise["forwards"] == [20, 20]
    assert decode["tiles"] == [2, 3]
    sources = {each["name"]: each["source"] for each in plan["origins"]}
    for name in ("branches", "chunk_tokens", "tiles", "cross_kv", "disk", "format", "pinned"):
        assert sources[name] == "flag"
    assert sources["ram"].startswith("free on") and sources["rates"].endswith("hdd")
    given = {name: word for name, word in plan["options"].items() if word is not None}
    assert given == {
        "device": "cuda", "format": "nf4", "branches": "1", "chunk_tokens": "2048",
        "tiles": "2x3", "cross_kv": "ram", "disk": "never", "pinned_share": "0.25",
        "step_cache": "plan:20",
    }  # fmt: skip


@pytest.mark.parametrize("command", ["generate", "plan", "bench", "demo", "resume"])
def test_an_illegal_value_is_told_in_one_line(command: str, tmp_path: Path) -> None:
    needed = {"generate": ("--prompt", "x", "-o", tmp_path / "x.mp4"), "demo": ("-o", tmp_path)}
    done = call(command, *needed.get(command, ()), "--device", "tpu")
    assert done.exit_code == 2
    assert done.stderr == "error: unknown device: expected auto, cuda or cpu, found 'tpu'\n"


def test_a_traceback_of_an_illegal_value_where_it_is_wanted() -> None:
    done = call(*CARD, "--tiles", "2", "--debug")
    assert type(done.exception).__name__ == "ProfileError"


ROOMY, TIGHT = {"vram": "200MiB", "ram": "200MiB"}, {"vram": "9MiB", "ram": "72MiB"}
WAYS = (
    {},
    {"profile": "12gb"},
    {"format": "int8", "compute": "fast"},
    {"branches": "1", "chunk-tokens": "4", "tiles": "2x2", "cross-kv": "ram"},
    {
        "pinned-share": "0.5",
        "disk-use": "never",
        "distilled": None,
        "max-area": "48x32",
        "size": None,
    },
)


CASES = [*((ROOMY, way) for way in WAYS), (TIGHT, WAYS[0]), (TIGHT, WAYS[3])]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_is_planned_is_what_is_run(
    case: tuple[dict[str, str], dict[str, str | None]], model: Path, tmp_path: Path
) -> None:
    """By the plan that a job prints, the one that it keeps, and the options of its report."""
    budgets, way = case
    named = {"size": "48x32", "frames": "5", "steps": "1", "device": "cpu"} | budgets | way
    if way.get("size", "") is None:
        del named["size"]
    flags = [w for name, word in named.items() for w in (f"--{name}", word) if w is not None]
    words = ("--model", model, *flags, "--json")
    planned = told("plan", *words)
    del planned["alternatives"]  # what else could be asked for is no part of the plan
    job = ("--prompt", "a cat", "-o", tmp_path / "x.mp4", "--job", tmp_path / "job")
    made = told("generate", *words, *job)
    assert made["plan"] == planned
    assert made["report"]["options"] == planned["options"]
    assert {f"--{n}" for n in budgets} <= set(flags)
    assert {n: planned["options"][n] for n in budgets} == budgets


def test_a_benchmark_takes_them_and_is_not_held_against_another(tmp_path: Path) -> None:
    small = ("bench", "--synthetic", "tiny", "--blocks", 2, "--width", 32, "--height", 32,
             "--frames", 5, "--steps", 1, "--warmup", 0, "--device", "cpu", "--vram",
             "64MiB")  # fmt: skip
    kept = tmp_path / "kept.json"
    assert call(*small, "--branches", 1, "--save", kept).exit_code == 0
    recipe = load(kept).recipe
    assert (recipe.vram, recipe.profile, recipe.rules) == ("64MiB", "auto", {"branches": "1"})
    done = call(*small, "--cross-kv", "ram", "--compare", kept, "--json")
    assert done.exit_code == 2
    verdict = json.loads(done.stdout.splitlines()[-1])["verdict"]
    assert verdict["outcome"] == "RECIPE_MISMATCH"
    assert verdict["lines"] == ["rules: {'branches': '1'} then, {'cross_kv': 'ram'} now"]
