"""What `penstock --install-completion` installs: a script, and the answers that it asks for."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

CALL = "import sys; sys.argv = ['penstock']; from penstock.cli.main import main; main()"


def asked(**variables: str) -> str:
    """What the command answers to a shell."""
    done = subprocess.run(
        [sys.executable, "-c", CALL], env=os.environ | variables, capture_output=True, text=True
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done.stdout


@pytest.mark.parametrize("shell", ["bash", "powershell"])
def test_a_script_for_each_shell(shell: str) -> None:
    assert "_PENSTOCK_COMPLETE" in asked(_PENSTOCK_COMPLETE=f"source_{shell}")


def test_a_command_and_an_option_are_completed() -> None:
    found = asked(_PENSTOCK_COMPLETE="complete_bash", COMP_WORDS="penstock gen", COMP_CWORD="1")
    assert found.split() == ["generate"]
    line = {"COMP_WORDS": "penstock generate --cont", "COMP_CWORD": "2"}
    assert asked(_PENSTOCK_COMPLETE="complete_bash", **line).split() == ["--continue"]
