"""A process of the server's own, seen from the server: lines of JSON to it and from it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
from collections.abc import Mapping
from typing import Any

_LONGEST_LINE = 64 << 20
"""A preview of a large video, and plans of hundreds of phases, are well below it."""


class Died(Exception):  # noqa: N818 - an event of a process's life
    """The process has ended, or is not there any more; says how."""


class Child:
    """Made by `start`. Used on the loop that made it.

    Attributes:
        process: as asyncio has it.
    """

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process

    @classmethod
    async def start(
        cls, module: str, config: Mapping[str, Any], env: Mapping[str, str] | None = None
    ) -> Child:
        """Start ``python -m module``, and send it its first line.

        Args:
            module: by its full name.
            config: the line.
            env: variables that it has besides this process's own.

        Raises:
            OSError: the system starts no process.
        """
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            module,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            limit=_LONGEST_LINE,
            env={**os.environ, **(env or {}), "PYTHONUNBUFFERED": "1"},
            start_new_session=True,  # Ctrl-C at a terminal is the server's to handle
        )
        child = cls(process)
        await child.send(config)
        return child

    async def send(self, message: Mapping[str, Any]) -> None:
        """Write a line.

        Raises:
            Died: it does not read any more.
        """
        stdin = self.process.stdin
        assert stdin is not None
        try:
            stdin.write(json.dumps(message).encode() + b"\n")
            await stdin.drain()
        except (BrokenPipeError, ConnectionResetError) as error:
            raise Died(await self._how()) from error

    async def receive(self) -> dict[str, Any]:
        """Wait for a line.

        Raises:
            Died: there is none any more.
        """
        stdout = self.process.stdout
        assert stdout is not None
        line = await stdout.readline()
        if not line.endswith(b"\n"):
            raise Died(await self._how())
        message: dict[str, Any] = json.loads(line)
        return message

    async def _how(self) -> str:
        code = await self.process.wait()
        return f"was ended by signal {-code}" if code < 0 else f"ended with code {code}"

    async def stop(self) -> None:
        """End it, whatever it is doing."""
        if self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self.process.kill()
        await self.process.wait()
