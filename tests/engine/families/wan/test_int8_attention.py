"""Jobs whose self-attention is in 8 bits: asked for, tried, planned, told; and refused without."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity
from typer.testing import CliRunner

from penstock.cli.main import app
from penstock.engine import software
from penstock.engine.run.jobs import find_unfinished, opening_of
from penstock.engine.run.report import JobResult
from penstock.engine.run.stored import request_values
from penstock.engine.store.journal import read_record
from penstock.errors import FingerprintMismatch, ProfileError
from penstock.profiles.options import Options
from penstock.profiles.plan import Plan
from tests import fake_kitchen
from tests.engine.running import REQUEST, an_engine, stop_after_a_step

NOT_HERE = "int8 attention: not here, torch's own attends"


@pytest.fixture(scope="module")
def expected(t2v_folder: Path) -> Tensor:
    return result_of(t2v_folder).latents


def result_of(folder: Path, **options: Any) -> JobResult:
    with an_engine(folder, **options) as engine:
        return engine.submit(REQUEST).result()


def test_a_job_runs_on_it_and_says_so(
    t2v_folder: Path, expected: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_kitchen.install(monkeypatch)
    with an_engine(t2v_folder, attention="int8") as engine:
        plan = engine.plan(REQUEST)
        found = engine.submit(REQUEST).result()
    assert plan.attention == found.report.attention == "int8"
    assert found.report.to_json()["attention"] == "int8"
    (told,) = (notice for notice in found.report.notices if "attention" in notice)
    assert told.startswith("int8 attention: it works here (cosine 0.99")
    assert not torch.equal(found.latents, expected)
    assert cosine_similarity(found.latents.flatten(), expected.flatten(), dim=0) > 0.999
    origin = next(origin for origin in plan.origins if origin.name == "attention")
    assert (origin.value, origin.source) == ("int8", "flag")


def test_overrides_ask_for_it_too(t2v_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_kitchen.install(monkeypatch)
    with an_engine(t2v_folder, options=Options(attention="int8")) as engine:
        assert engine.plan(REQUEST).attention == "int8"


def absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "comfy_kitchen", None)


def no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_kitchen.install(monkeypatch, available=False)


def raises(monkeypatch: pytest.MonkeyPatch) -> None:
    def kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        raise RuntimeError("CUDA error: no kernel image")

    fake_kitchen.install(monkeypatch, kernel)


def not_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_kitchen.install(monkeypatch, lambda q, k, v: torch.full_like(q, torch.inf))


def wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_kitchen.install(monkeypatch, lambda q, k, v: fake_kitchen.quantising(q, -k, v))


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        (absent, "the extra 'fast' of penstock installs comfy-kitchen"),
        (no_device, "it needs a CUDA device"),
        (raises, "CUDA error: no kernel image"),
        (not_finite, "the result is not finite"),
        (wrong, "at least 0.99 wanted"),
    ],
)
def test_where_it_does_not_work_that_is_told_and_torch_attends(
    state: Callable[[pytest.MonkeyPatch], None],
    reason: str,
    t2v_folder: Path,
    expected: Tensor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    state(monkeypatch)
    with an_engine(t2v_folder, attention="int8") as engine:
        plan = engine.plan(REQUEST)
        found = engine.submit(REQUEST).result()
    assert torch.equal(found.latents, expected)
    assert plan.attention == found.report.attention == "sdpa"
    assert any(told.startswith(NOT_HERE) and reason in told for told in found.report.notices)
    origin = next(origin for origin in plan.origins if origin.name == "attention")
    assert origin.value == "sdpa" and origin.source.startswith("int8 by flag, not here: ")
    assert reason in origin.source


def test_nothing_is_tried_or_said_unless_asked(
    t2v_folder: Path, expected: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    raises(monkeypatch)
    found = result_of(t2v_folder)
    assert found.report.attention == "sdpa" and torch.equal(found.latents, expected)
    assert not any("attention" in told for told in found.report.notices)


def test_an_unknown_one_is_refused(t2v_folder: Path) -> None:
    with pytest.raises(ProfileError, match="illegal attention: expected sdpa or int8"):
        an_engine(t2v_folder, attention="fp4")


@pytest.mark.parametrize(("first", "then"), [("sdpa", "int8"), ("int8", "sdpa")])
def test_a_job_is_not_resumed_with_another_attention(
    first: str, then: str, tmp_path: Path, t2v_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_kitchen.install(monkeypatch)
    with an_engine(t2v_folder, attention=first) as engine:
        stop_after_a_step(engine, REQUEST, tmp_path / "job")
    with an_engine(t2v_folder, attention=then) as engine:
        with pytest.raises(FingerprintMismatch, match=r"numerics\.attention"):
            engine.resume(tmp_path / "job")
        found = engine.resume(tmp_path / "job", allow_nonidentical=True)
        assert found.plan.attention == then == found.result().report.attention


def test_a_job_is_resumed_with_its_own(
    tmp_path: Path, t2v_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_kitchen.install(monkeypatch)
    whole = result_of(t2v_folder, attention="int8")
    with an_engine(t2v_folder, attention="int8") as engine:
        stop_after_a_step(engine, REQUEST, tmp_path / "job")
        values = request_values(REQUEST, engine.model.opening, engine.plan(REQUEST))
    assert opening_of(tmp_path / "job").options.attention == "int8"
    assert find_unfinished(values, tmp_path / "job") is not None
    assert find_unfinished(values | {"attention": "sdpa"}, tmp_path / "job") is None
    with an_engine(t2v_folder, attention="int8") as engine:
        found = engine.resume(tmp_path / "job").result()
    assert torch.equal(found.latents, whole.latents)


def test_the_library_s_version_determines_a_result(
    tmp_path: Path, t2v_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_kitchen.install(monkeypatch)
    kitchen = {"comfy-kitchen": "absent"}
    version_of = software.package_version
    monkeypatch.setattr(
        software, "package_version", lambda package: kitchen.get(package) or version_of(package)
    )
    with an_engine(t2v_folder, attention="int8") as engine:
        stop_after_a_step(engine, REQUEST, tmp_path / "job")
        numerics = read_record(tmp_path / "job").fingerprint["numerics"]
        assert numerics["attention"] == "int8, comfy-kitchen absent"
        kitchen["comfy-kitchen"] = "9"
        with pytest.raises(FingerprintMismatch, match=r"numerics\.attention"):
            engine.resume(tmp_path / "job")


def test_jobs_and_plans_stored_before_have_torchs_own(
    tmp_path: Path, t2v_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with an_engine(t2v_folder) as engine:
        stop_after_a_step(engine, REQUEST, tmp_path / "job")
        plan = engine.plan(REQUEST, saved=True)
        asked = request_values(REQUEST, engine.model.opening, plan)
    assert read_record(tmp_path / "job").fingerprint["numerics"]["attention"] == "sdpa"
    stored = plan.to_json()
    del stored["attention"]
    assert Plan.from_json(stored) == plan
    found = find_unfinished(asked, tmp_path / "job")
    assert found is not None and found.record is not None
    found.record.request.pop("attention")
    monkeypatch.setattr("penstock.engine.run.jobs.describe", lambda folder: found)
    assert find_unfinished(asked, tmp_path / "job") is not None
    assert find_unfinished(asked | {"attention": "int8"}, tmp_path / "job") is None


def call(*words: object) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words])


def test_the_command_line_asks_for_it(
    tmp_path: Path, t2v_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_kitchen.install(monkeypatch)
    monkeypatch.setenv("PENSTOCK_DATA_DIR", str(tmp_path / "data"))
    here = ("--model", t2v_folder, "--device", "cpu", "--size", "48x32", "--frames", "5",
            "--vram", "200MiB", "--ram", "200MiB", "--attention", "int8", "--json")  # fmt: skip
    planned = call("plan", *here)
    assert json.loads(planned.stdout)["attention"] == "int8", planned.stderr
    words = ("--prompt", "a cat", "--steps", 1, "--job", tmp_path / "job", "-o", tmp_path / "x.mp4")
    made = call("generate", *here, *words)
    assert made.exit_code == 0, made.stderr
    found = json.loads(made.stdout.splitlines()[-1])
    assert found["plan"]["attention"] == found["report"]["attention"] == "int8"
    assert "self-attention in 8 bits, by comfy-kitchen" in made.stderr
    assert "int8 attention: it works here" in made.stderr


def test_a_plan_on_this_machine_tells_why_not(
    t2v_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    absent(monkeypatch)
    ceilings = ("--vram", "24GiB", "--ram", "64GiB", "--device", "cpu", "--attention", "int8")
    for model in (("--model", t2v_folder), ("--synthetic", "wan2.1-i2v-14b")):
        found = call("plan", *model, *ceilings, "--json")
        plan = Plan.from_json(json.loads(found.stdout))
        assert plan.attention == "sdpa"
        origin = next(origin for origin in plan.origins if origin.name == "attention")
        assert "the extra 'fast' of penstock" in origin.source
