"""A job's options: kept in its plan, taken again when it is resumed, absent in older records."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from penstock.cli.main import app
from penstock.engine.engine import Engine
from penstock.engine.run.jobs import opening_of
from penstock.engine.store.journal import Journal, read_record
from penstock.errors import JournalError, UsageError
from penstock.profiles.options import Options
from penstock.units import MIB
from tests.engine.running import a_request, an_engine, stop_after_a_step

GIVEN: dict[str, Any] = {"profile": "12gb", "branches": "1", "cross_kv": "ram", "disk": "auto"}


@pytest.fixture
def stopped(tmp_path: Path, t2v_folder: Path) -> Path:
    """A job that was stopped after a step."""
    with an_engine(t2v_folder, **GIVEN) as engine:
        stop_after_a_step(engine, a_request(), tmp_path / "job")
    return tmp_path / "job"


def change(folder: Path, plan: dict[str, Any], **facts: Any) -> None:
    """Rewrite a job's record."""
    journal = Journal.open(folder)
    journal.mark("stopped", plan=plan, **facts)
    journal.close()


def test_options_by_name_and_in_one_value_open_the_same(t2v_folder: Path) -> None:
    named = an_engine(t2v_folder, **GIVEN)
    whole = Options(device="cpu", vram="200MiB", ram="200MiB", **GIVEN)
    with named, Engine.open(t2v_folder, options=whole) as engine:
        assert engine.plan(a_request()) == named.plan(a_request())
        assert engine.plan(a_request()).options == whole == engine.model.opening.options
    with pytest.raises(UsageError, match="given twice: vram"):
        Engine.open(t2v_folder, options=whole, vram="200MiB")
    with pytest.raises(UsageError, match="no such option"):
        Engine.open(t2v_folder, vrams="200MiB")


def test_a_job_has_its_options_when_it_is_opened_again(stopped: Path) -> None:
    decided = {"vram": 200 * MIB, "ram": 200 * MIB, "device": "cpu", "compute": "exact",
               "attention": "sdpa", "step_cache": "off"}  # fmt: skip
    opening = opening_of(stopped)
    kept = read_record(stopped).plan
    assert opening.options == Options(format=kept["weight_format"], **(decided | GIVEN))
    with Engine.reopen(opening) as engine:
        job = engine.resume(stopped)
        assert job.plan.options == opening.options == job.result().report.options
        assert (job.plan["denoise"].branches, job.plan["denoise"].cross_kv_on_device) == (1, False)


def test_what_is_given_replaces_the_jobs_own(stopped: Path) -> None:
    found = opening_of(stopped, Options(vram="300MiB", device="auto")).options
    assert (found.vram, found.ram, found.device) == ("300MiB", 200 * MIB, "auto")
    assert found.branches == "1" and found.profile == "12gb"
    other = opening_of(stopped, Options(profile="4gb", ram="1GiB")).options
    assert (other.vram, other.ram, other.profile) == (None, "1GiB", "4gb")


def test_a_profile_that_is_gone_can_be_replaced(
    tmp_path: Path, t2v_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = tmp_path / "mine.toml"
    mine.write_text('vram = "200MiB"')
    with an_engine(t2v_folder, vram=None, profile=str(mine)) as engine:
        stop_after_a_step(engine, a_request(), tmp_path / "job")
    mine.unlink()
    call = CliRunner().invoke(app, ["resume", str(tmp_path / "job")])
    assert call.exit_code == 2 and f"{mine} cannot be read" in call.stderr
    words = ["resume", str(tmp_path / "job"), "--profile", "auto", "--vram", "200MiB"]
    assert CliRunner().invoke(app, words).exit_code == 0


def test_a_job_from_before_options_is_resumed(stopped: Path, t2v_folder: Path) -> None:
    """Its record has budgets and device among its facts, no options in its plan, and another name
    for staging buffers."""
    plan = dict(read_record(stopped).plan)
    del plan["options"]
    for stream in filter(None, (phase["stream"] for phase in plan["phases"])):
        stream["host_slabs"] = stream.pop("staging_buffers")
    change(stopped, plan, vram_bytes=200 * MIB, ram_bytes=200 * MIB, device="cpu")
    opening = opening_of(stopped)
    assert opening.options == Options(
        vram=200 * MIB, ram=200 * MIB, device="cpu", format=plan["weight_format"],
        compute="exact", attention="sdpa", step_cache="off",
    )  # fmt: skip
    with Engine.reopen(opening) as engine:
        found = engine.resume(stopped).result()
    with an_engine(t2v_folder, **GIVEN) as engine:
        whole = engine.submit(a_request()).result()
    assert torch.equal(found.latents, whole.latents)
    assert read_record(stopped).plan["options"] == opening.options.to_json()


@pytest.mark.parametrize("options", [3, [], {"device": "tpu"}, {"tiles": 3}, {"tomorrow": 1}])
def test_a_record_with_other_options_is_refused(stopped: Path, options: Any) -> None:
    change(stopped, read_record(stopped).plan | {"options": options})
    with pytest.raises(JournalError, match="no options"):
        opening_of(stopped)
    with pytest.raises(JournalError, match="holds no plan"), Engine.reopen(_any(stopped)) as engine:
        engine.resume(stopped)


def _any(folder: Path) -> Any:
    """The model of a job, whatever its options."""
    from penstock.engine.model.opening import Opening

    return Opening.from_values(read_record(folder).request)
