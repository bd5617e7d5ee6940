"""The nodes' worker as ComfyUI's process sees it: started on first use, ended with ComfyUI."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from penstock.comfy.order import NodeOrder

MODULE = "penstock.comfy.worker"
POLL_S = 0.1
"""Between two looks at whether the user has interrupted."""

_COMFYS_OWN = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
"""What ComfyUI sets for the allocator of its own process."""

_HOME = Path(__file__).parents[2]
"""Where this penstock lies: the worker shall be the same, and find no module of ComfyUI's first."""

Hear = Callable[[Mapping[str, Any]], None]
Message = Mapping[str, Any]


class WorkerDied(Exception):  # noqa: N818 - an event of a process's life
    """The worker's process has ended; says how."""


class Interrupted(Exception):  # noqa: N818 - what a user wants
    """The user has interrupted; what the job has done is kept."""


class Process:
    """At most one worker. All methods may be called on any thread; orders take turns.

    Args:
        command: starts it; it speaks as `penstock.comfy.worker`.
    """

    def __init__(self, command: tuple[str, ...] = (sys.executable, "-m", MODULE)) -> None:
        self._command = command
        self._turn = threading.Lock()
        self._child: _Child | None = None

    def do(self, order: NodeOrder, hear: Hear, interrupted: Callable[[], bool]) -> Message:
        """Have an order done.

        Args:
            order: what to do.
            hear: takes what the worker tells of it, on this thread.
            interrupted: whether the user wants it to end; asked again and again. The first yes
                stops the job at its next block, the second ends the worker.

        Returns:
            How it ended, as `penstock.serve.doer.Doer.run` says.

        Raises:
            WorkerDied: it could not be started, or ended in the midst of it.
            Interrupted: before its turn came.
        """
        with self._in_turn(interrupted):
            child = self._running()
            ended = False
            try:
                child.send({"run": order.to_json()})
                message = _until_the_end(child, order.id, hear, interrupted)
                ended = True
                return message
            finally:
                if not ended:  # whatever went wrong here, nobody waits for it any more
                    self._end()

    @property
    def pid(self) -> int | None:
        """Of the process; None: there is none."""
        child = self._child
        return None if child is None or not child.runs else child.pid

    def rest(self) -> None:
        """End the worker and all that it holds, unless it is doing an order."""
        if self._turn.acquire(blocking=False):
            try:
                self._end()
            finally:
                self._turn.release()

    @contextmanager
    def _in_turn(self, interrupted: Callable[[], bool]) -> Iterator[None]:
        while not self._turn.acquire(timeout=POLL_S):
            if interrupted():
                raise Interrupted
        try:
            yield
        finally:
            self._turn.release()

    def _running(self) -> _Child:
        if self._child is None or not self._child.runs:
            self._end()
            self._child = _Child(self._command)
        return self._child

    def _end(self) -> None:
        child, self._child = self._child, None
        if child is not None:
            child.stop()


def _until_the_end(
    child: _Child, name: str, hear: Hear, interrupted: Callable[[], bool]
) -> Message:
    stopping = False
    while True:
        message = child.receive(POLL_S)
        if message is not None and "state" in message:
            return message
        if message is not None:
            hear(message)
        if interrupted():
            if stopping:
                raise Interrupted
            stopping = True
            child.send({"cancel": name})


class _Child:
    """A process and its two pipes. Its input ends with this process, however that ends."""

    def __init__(self, command: tuple[str, ...]) -> None:
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                cwd=_HOME,
                env=environment(os.environ),
                start_new_session=True,  # Ctrl-C at ComfyUI's terminal is ComfyUI's
            )
        except OSError as error:
            raise WorkerDied(f"could not be started ({error.strerror})") from error
        assert self._process.stdin is not None and self._process.stdout is not None
        self._stdin: IO[bytes] = self._process.stdin
        self._heard: queue.Queue[Message | None] = queue.Queue()
        listening = threading.Thread(
            target=self._listen, args=(self._process.stdout,), name="penstock-worker", daemon=True
        )
        listening.start()

    def _listen(self, stdout: IO[bytes]) -> None:
        with stdout:
            for line in stdout:
                if line.endswith(b"\n"):
                    self._heard.put(json.loads(line))
        self._heard.put(None)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def runs(self) -> bool:
        return self._process.poll() is None

    def send(self, message: Message) -> None:
        try:
            self._stdin.write(json.dumps(message).encode() + b"\n")
            self._stdin.flush()
        except OSError as error:
            raise WorkerDied(self._how()) from error

    def receive(self, seconds: float) -> Message | None:
        """Return what it says next; None: nothing for so long."""
        try:
            message = self._heard.get(timeout=seconds)
        except queue.Empty:
            return None
        if message is None:
            raise WorkerDied(self._how())
        return message

    def _how(self) -> str:
        code = self._process.wait()
        return f"was ended by signal {-code}" if code < 0 else f"ended with code {code}"

    def stop(self) -> None:
        """End it, whatever it is doing: what it does is in the job's journal."""
        self._process.kill()
        self._process.wait()
        try:
            self._stdin.close()
        except OSError:  # what was not flushed any more
            return


def environment(of: Mapping[str, str]) -> dict[str, str]:
    """Return the worker's variables, where ComfyUI has ``of``: its allocator's are not the
    worker's."""
    kept = {name: value for name, value in of.items() if name not in _COMFYS_OWN}
    return kept | {"PYTHONUNBUFFERED": "1"}
