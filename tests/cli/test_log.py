"""What is told of decisions: in a file that is all a bug report needs, on stderr, or not at all."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from penstock.cli.main import app
from penstock.engine.families.wan.tiny import write_tiny_model
from penstock.engine.run.fingerprint import check_fingerprint
from penstock.profiles.plan import PhasePlan
from tests.engine.run.test_resume import a_request, an_engine
from tests.faults.memory import Reservations

CARD = ("plan", "--synthetic", "wan2.1-i2v-14b", "--card", "RTX 3060 12GB", "--ram", "16GiB")
SECRET, OTHER = "a whale in the fog", "harbours at night"
HEAD = ("python 3", "command: ", "machine: ", "GPUs: ", "settings in ", "environment: ")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    return write_tiny_model(folder, image_to_video=False, vae={"base_dim": 8})


def call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def generate(model: Path, output: Path, *more: str) -> tuple[str | Path, ...]:
    request = ("--prompt", SECRET, "--negative", OTHER, "--size", "64x48", "--frames", "5")
    return ("generate", "--model", model, *request, "--steps", "2", "-o", output, *more)


def messages(text: str) -> list[str]:
    """Each record's own words; what goes on below it is left out."""
    start = re.compile(r"^\d{4}-\d\d-\d\d \S+ (DEBUG|INFO) \S+ penstock[\w.]*: (.*)$")
    lines = [line for line in text.splitlines() if not line.startswith("    ")]
    found = [start.match(line) for line in lines]
    assert all(found), "one record begins one line"
    return [match[2] for match in found if match]


def test_one_file_tells_what_was_decided(model: Path, tmp_path: Path) -> None:
    log = tmp_path / "run.log"
    done = call("--log-file", log, *generate(model, tmp_path / "a.mp4", "--format", "int8"))
    assert done.exit_code == 0, done.stderr
    text = log.read_text()
    told = messages(text)
    assert [line.startswith(start) for line, start in zip(told, HEAD, strict=False)] == [True] * 6
    for decision in (
        "asked for Options", "vram is ", "is a folder of diffusers", "keys of ",
        "is the transformer of",
        "wanted is int8", "as int8 would be", "chosen: denoise: VRAM", "prefetches in ",
        "makes {", "packs int8 into", "runs are there already", "begins at 0 of 2 steps",
        "open for 4 passes of Residency", "closed: StreamStats", "ended: PhaseReport",
    ):  # fmt: skip
        assert any(decision in line for line in told), decision
    assert SECRET in text and OTHER in text
    call(*CARD)
    assert log.read_text() == text, "the next command does not write there"
    assert logging.getLogger("penstock").handlers == []


def test_what_a_plan_refuses_has_its_reason(tmp_path: Path) -> None:
    log = tmp_path / "plan.log"
    assert call("--log-file", log, *CARD, "--vram", "6GiB").exit_code == 0
    told = messages(log.read_text())
    assert any("refused, no stream fits or is faster: DenoiseCase" in line for line in told)
    assert any("refused, does not fit: decode: " in line for line in told)
    assert call("--log-file", log, *CARD, "--vram", "50MiB").exit_code == 1
    text = log.read_text()
    assert "nothing fits Limits" in text and "no plan fits the VRAM budget" in text
    assert "    Traceback" in text
    assert text.count("command: ") == 2, "a file is never begun anew"


def test_prompts_are_told_at_debug_alone(model: Path, tmp_path: Path) -> None:
    log = tmp_path / "run.log"
    command = ("penstock.cli.main", "--log-level", "info", "--log-file", str(log))
    for more in ((), ("--vram", "1MiB")):
        words = map(str, generate(model, tmp_path / "a.mp4", "--force", *more))
        subprocess.run([sys.executable, "-m", *command, *words], check=False, capture_output=True)
    text = log.read_text()
    assert "makes {" in text and "no plan fits" in text
    assert f"--prompt '<{len(SECRET)} characters>'" in text
    assert SECRET not in text and OTHER not in text


def test_a_level_without_a_file_is_told_on_stderr() -> None:
    assert "chosen: denoise" in call("--log-level", "debug", *CARD).stderr
    assert "chosen: denoise" not in call("--log-level", "info", *CARD).stderr
    assert call(*CARD).stderr == ""
    assert call("--log-level", "loud", *CARD).exit_code == 2


def test_a_log_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    done = call("--log-file", tmp_path / "none" / "run.log", *CARD)
    assert done.exit_code == 2 and "the log cannot be written" in done.stderr
    assert done.stdout == ""


def test_nothing_is_put_into_words_that_nobody_reads(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    worded: list[str] = []
    words = PhasePlan.__str__
    monkeypatch.setattr(PhasePlan, "__str__", lambda self: worded.append(self.name) or words(self))
    assert call("--log-level", "info", *CARD).exit_code == 0 and worded == []
    assert call("--log-level", "debug", *CARD).exit_code == 0 and worded != []


def test_the_library_installs_no_handler() -> None:
    code = (
        "import logging, penstock.engine.engine\n"
        "assert logging.root.handlers == logging.getLogger('penstock').handlers == []\n"
        "assert logging.getLogger('penstock').level == logging.NOTSET"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_smaller_plan_is_told(model: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "penstock")
    with an_engine(model) as engine:
        plan = engine.plan(a_request(None))
        with Reservations(fail_at=12):
            engine.submit(a_request(None)).result()
    told = [record.getMessage() for record in caplog.records]
    assert plan.phases
    assert any(" ran out in " in line and "RAM" in line for line in told)
    assert any("identical: " in line for line in told)


def test_what_a_resume_compares_is_told(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "penstock")
    check_fingerprint({"a": {"b": 1}}, {"a": {"b": 2}}, allow_nonidentical=True)
    assert "a.b was 1 and is 2" in caplog.messages


IMPORTED = """
import logging
from penstock.cli.log import Level, logged
with logged(Level.DEBUG, None):
    import bitsandbytes, torchao, diffusers.quantizers.auto
    logging.getLogger("torchao").error("a real one")
logging.getLogger("torchao").warning("after it")
"""


def test_what_libraries_warn_of_on_import_is_told_at_debug_alone() -> None:
    done = subprocess.run(
        [sys.executable, "-c", IMPORTED], capture_output=True, text=True, check=True
    )
    ours = re.compile(
        r"\S+ \S+ DEBUG \S+ penstock\.cli\.log: (torchao|bitsandbytes|diffusers|torch)"
    )
    lines = done.stderr.splitlines()
    assert [line for line in lines if not ours.match(line)] == ["a real one", "after it"]
    assert len(lines) > 2
