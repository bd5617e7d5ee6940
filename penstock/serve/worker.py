"""A worker's process: ``python -m penstock.serve.worker``. JSON lines come in and go out.

The first line says what the worker is (models, options); then each is ``{"run": order}`` or
``{"cancel": id}``. It answers ``{"event": ...}`` lines and, for each run, ``{"state": ...}``.

Its server's death is the end of its input: it ends at once then, in whatever it is. What it was
doing is in the job's journal, whose lock the system drops with the process, so that no two work on
one job.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, TextIO

from penstock.profiles.options import Options
from penstock.serve.order import Order, Tell

_OOM_SCORE = "500"
"""Where memory runs out, the system ends a worker, whose job goes on, before anything else."""


class Line:
    """The way out: one JSON object a line, from any thread.

    Args:
        out: a text file; whoever else writes to standard output writes to standard error.
    """

    def __init__(self, out: TextIO) -> None:
        self._out, self._guard = out, threading.Lock()

    def send(self, message: Mapping[str, Any]) -> None:
        """Write one. Nobody there to read it: the process ends."""
        with self._guard:
            try:
                self._out.write(json.dumps(message) + "\n")
                self._out.flush()
            except OSError:
                os._exit(1)


def own_output() -> TextIO:
    """Keep standard output for the answers alone: from now on, prints go to standard error."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return out


def be_first_to_go() -> None:
    """Let the system end this process rather than the server, where it knows such things."""
    try:
        Path("/proc/self/oom_score_adj").write_text(_OOM_SCORE, encoding="ascii")
    except OSError:
        return


class Hands(Protocol):
    """What does the orders, such as `penstock.serve.doer.Doer`."""

    def run(self, order: Any, tell: Tell) -> dict[str, Any]:
        """Do one; returns how it ended."""

    def cancel(self, name: str) -> None:
        """Stop the order of that id, which may be yet to come."""


class Station:
    """Takes orders from standard input, one after the other.

    Args:
        line: where answers go.
    """

    def __init__(self, line: Line) -> None:
        self._line = line
        self._orders: queue.Queue[Mapping[str, Any]] = queue.Queue()
        self._guard = threading.Lock()
        self._hands: Hands | None = None
        self._cancelled: list[str] = []

    def listen(self) -> None:
        """Take what comes in, on a thread of its own; at its end the process ends."""
        threading.Thread(target=self._listen, name="penstock-orders", daemon=True).start()

    def _listen(self) -> None:
        for text in sys.stdin:
            message = json.loads(text)
            if "cancel" in message:
                self._cancel(message["cancel"])
            else:
                self._orders.put(message["run"])
        os._exit(0)

    def _cancel(self, name: str) -> None:
        with self._guard:
            if self._hands is None:
                self._cancelled.append(name)
            else:
                self._hands.cancel(name)

    def work(self, hands: Hands, read: Callable[[Mapping[str, Any]], object]) -> None:
        """Do orders as they come.

        Args:
            hands: do them.
            read: an order from its plain values.
        """
        with self._guard:
            self._hands = hands
            for name in self._cancelled:
                hands.cancel(name)
        while True:
            order = read(self._orders.get())
            self._line.send(hands.run(order, self._line.send))


def main() -> None:
    """Work until standard input ends."""
    line = Line(own_output())
    be_first_to_go()
    config = json.loads(sys.stdin.readline())
    station = Station(line)
    station.listen()
    from penstock.serve.runner import Runner  # torch: somebody listens already

    cache = config.get("cache")
    options = Options.from_json(config["options"])
    runner = Runner(config["models"], options, None if cache is None else Path(cache))
    station.work(runner, Order.from_json)


if __name__ == "__main__":
    main()
