"""A server as users start it: ``penstock serve`` in its own process, with the model in the box."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx

from penstock.engine.request.demo import MINI, demo_picture

SMALL: dict[str, str] = {
    "prompt": "a green square moves to the right",
    "size": "32x32",
    "num_frames": "5",
    "num_inference_steps": "2",
    "seed": "7",
}
"""The smallest video that the model can make, as a form has it."""


SMALL_SERVER = ("--model", f"mini={MINI}", "--vram", "256MiB", "--ram", "512MiB")


class Running:
    """A server that listens.

    Args:
        folder: its own.
        flags: further ones.
        asked: model and budgets, as flags, instead of the small model's.

    Attributes:
        url: where it listens.
    """

    def __init__(self, folder: Path, *flags: str, asked: Sequence[str] = SMALL_SERVER) -> None:
        command = [
            sys.executable, "-m", "penstock", "serve", *asked, "--port", "0",
            "--folder", str(folder), "--device", "cpu", *flags,
        ]  # fmt: skip
        environ = os.environ | {"OMP_NUM_THREADS": "1"}
        self.folder = folder
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environ)
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        found = re.search(r"http://\S+", line)
        assert found is not None, f"the server did not start: {line!r}"
        self.url = found[0]
        self.client = httpx.Client(base_url=self.url, timeout=None)

    def create(self, **more: Any) -> dict[str, Any]:
        """Ask for a video of `SMALL` with other fields."""
        picture = {"input_reference": ("a.png", demo_picture().read_bytes(), "image/png")}
        answer = self.client.post("/v1/videos", data={**SMALL, **more}, files=picture)
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    def get(self, name: str) -> dict[str, Any]:
        """A video as it is now."""
        answer = self.client.get(f"/v1/videos/{name}")
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    def ended(self, name: str) -> dict[str, Any]:
        """A video, once it has ended: the stream of its events ends then."""
        with self.client.stream("GET", f"/v1/videos/{name}/events") as answer:
            for _ in answer.iter_lines():
                pass
        return self.get(name)

    def kill(self) -> None:
        """End it as nothing can prevent."""
        self.process.send_signal(signal.SIGKILL)
        self._reap()

    def close(self) -> None:
        """End it as users do."""
        self.process.terminate()
        self._reap()

    def _reap(self) -> None:
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()
        self.client.close()
