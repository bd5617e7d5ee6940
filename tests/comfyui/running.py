"""A real ComfyUI, headless on the CPU, from a checkout: ``PENSTOCK_COMFYUI`` names its folder.

It runs in the Python that runs this; what that lacks of ComfyUI's requirements is the caller's
business. The pack is linked into its custom_nodes, as a user does.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import psutil
import yaml

import penstock
from penstock.engine.request.demo import MINI, demo_picture
from tests.engine import golden

CHECKOUT = os.environ.get("PENSTOCK_COMFYUI")
ALONE = os.environ.get("PENSTOCK_COMFYUI_PATH", "")
"""A folder that ComfyUI's process alone finds modules in, and none that it starts: such as
stand-ins for what it only imports."""
START = """
import runpy, sys
sys.path.append(sys.argv.pop(1))
runpy.run_path("main.py", None, "__main__")
"""
REPOSITORY = Path(penstock.__file__).parents[1]
READY = "To see the GUI go to"
PREVIEW = 1
"""The kind of a binary message that holds a picture."""

_FOLDERS = {
    "transformer": "diffusion_models",
    "vae": "vae",
    "text_encoder": "text_encoders",
    "image_encoder": "clip_vision",
}
MINI_FILE = "mini/model.safetensors"
TINY_FILE = "tiny.safetensors"


def lay_out(models: Path, extra: Path) -> None:
    """The model in the box under ComfyUI's folders, a file a part with its config beside it; and a
    tiny text-to-video model, as its makers name its tensors, in folders of ``extra``."""
    for part, folder in _FOLDERS.items():
        place = models / folder / MINI_FILE
        place.parent.mkdir(parents=True)
        shutil.copy(MINI / part / "config.json", place.parent)
        shutil.copy(next((MINI / part).glob("*.safetensors")), place)
    whole = golden.write_model(extra / "whole", image_to_video=False)
    for part in ("transformer", "text_encoder", "vae"):
        tensors = golden.load(whole, part)
        (extra / _FOLDERS[part]).mkdir()
        made = golden.make(tensors, golden.original_names(part, list(tensors)), "bf16")
        made.save(extra / _FOLDERS[part] / TINY_FILE)


class Comfy:
    """A ComfyUI that listens.

    Args:
        folder: its own: models, input, output, temp, and penstock's jobs.

    Attributes:
        log: lines that it has printed.
        events: what its websocket has said, in order: JSON messages, and pictures as
            ``{"type": "preview", "data": bytes}``, each with when it was heard.
    """

    def __init__(self, folder: Path) -> None:
        assert CHECKOUT is not None
        self.folder, self.extra = folder, folder / "extra"
        for name in ("custom_nodes", "input", "output", "user", "models"):
            (folder / name).mkdir(parents=True)
        self.extra.mkdir()
        lay_out(folder / "models", self.extra)
        shutil.copy(demo_picture(), folder / "input" / "demo.png")
        (folder / "custom_nodes" / "penstock").symlink_to(REPOSITORY / "comfyui")
        places = {name: name for name in _FOLDERS.values()}
        config = folder / "extra.yaml"
        config.write_text(yaml.safe_dump({"more": {"base_path": str(self.extra), **places}}))
        self.jobs = folder / "data" / "jobs"
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        command = [
            sys.executable, "-c", START, ALONE, "--cpu", "--listen", "127.0.0.1",
            "--port", str(self.port), "--disable-api-nodes", "--base-directory", str(folder),
            "--database-url", "sqlite:///:memory:",
            "--extra-model-paths-config", str(config),
        ]  # fmt: skip
        environ = os.environ | {
            "PENSTOCK_DATA_DIR": str(folder / "data"),
            "PENSTOCK_CONFIG": str(folder / "config"),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(REPOSITORY),
        }
        self.process = subprocess.Popen(
            command, cwd=CHECKOUT, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, errors="replace",
        )  # fmt: skip
        self.log: list[str] = []
        self.events: list[dict[str, Any]] = []
        self._heard = threading.Condition()
        threading.Thread(target=self._read, daemon=True).start()
        self._until(lambda: any(READY in line for line in self.log))
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=None)
        connected = threading.Event()
        threading.Thread(target=lambda: asyncio.run(self._listen(connected)), daemon=True).start()
        connected.wait()
        self.info = self.client.get("/object_info").json()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self._heard:
                self.log.append(line.rstrip("\n"))
                self._heard.notify_all()
        with self._heard:
            self.log.append(READY)  # or what waits for it would wait for ever
            self._heard.notify_all()

    async def _listen(self, connected: threading.Event) -> None:
        import aiohttp

        url = f"ws://127.0.0.1:{self.port}/ws?clientId=tests"
        async with (
            aiohttp.ClientSession() as session,
            session.ws_connect(url, max_msg_size=0) as ws,
        ):
            connected.set()
            async for message in ws:
                if message.type is aiohttp.WSMsgType.BINARY:
                    kind, _ = struct.unpack(">II", message.data[:8])
                    if kind == PREVIEW:
                        self._hear({"type": "preview", "data": message.data[8:]})
                elif message.type is aiohttp.WSMsgType.TEXT:
                    self._hear(json.loads(message.data))

    def _hear(self, event: dict[str, Any]) -> None:
        with self._heard:
            self.events.append(event | {"heard_s": time.perf_counter()})
            self._heard.notify_all()

    def _until(self, found: Callable[[], Any]) -> Any:
        with self._heard:
            self._heard.wait_for(lambda: found() or self.process.poll() is not None)
            answer = found()
        assert answer, "\n".join(self.log[-50:])
        return answer

    def queue(self, prompt: dict[str, Any]) -> str:
        """Queue a prompt; returns its id."""
        answer = self.client.post("/prompt", json={"prompt": prompt, "client_id": "tests"})
        told = answer.json()
        assert answer.status_code == 200 and not told["node_errors"], told
        return str(told["prompt_id"])

    def ended(self, prompt_id: str) -> dict[str, Any]:
        """The history of a prompt, once it has ended."""
        ends = ("execution_success", "execution_error", "execution_interrupted")
        self.wait(lambda e: e["type"] in ends and e["data"]["prompt_id"] == prompt_id)
        while True:  # it is noted just after that
            found = self.client.get(f"/history/{prompt_id}").json()
            if found:
                return dict(found[prompt_id])

    def run(self, prompt: dict[str, Any]) -> dict[str, Any]:
        """Queue a prompt and wait for its good end."""
        ended = self.ended(self.queue(prompt))
        assert ended["status"]["status_str"] == "success", ended["status"]
        return ended

    def wait(self, wanted: Callable[[dict[str, Any]], bool], after: int = 0) -> int:
        """The place of the first event from ``after`` on that is wanted, once there is one, plus
        one."""
        return int(
            self._until(
                lambda: next(
                    (i + 1 for i, e in enumerate(self.events) if i >= after and wanted(e)), 0
                )
            )
        )

    def output(self, ended: dict[str, Any], node: str) -> list[Path]:
        """The files that a node has saved."""
        found = ended["outputs"][node]["images"]
        return [self.folder / each["type"] / each["subfolder"] / each["filename"] for each in found]

    def workers(self) -> list[psutil.Process]:
        """penstock's processes under it."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        return [each for each in children if "penstock.comfy.worker" in each.cmdline()]

    def kill(self) -> None:
        """End it as nothing can prevent."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def close(self) -> None:
        """End it as users do."""
        self.process.terminate()
        self.process.wait()
        self.client.close()
