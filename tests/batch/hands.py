"""Workers in this process, which die when a test says so."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from penstock.batch.run import Batch, Summary, make
from penstock.profiles.options import Options
from penstock.serve.child import Died
from penstock.serve.order import UNSEEN, Order, Tell
from penstock.serve.runner import Runner


class LocalWorker:
    """A Runner on a thread.

    Args:
        name: for people.
        places, options: as of the Runner.
        dies: id of a job and the step after which the worker is gone; once.
        unseen: it says that it does not see the job's folder.
    """

    def __init__(
        self,
        name: str,
        places: Mapping[str, str],
        options: Options,
        dies: tuple[str, int] | None = None,
        unseen: bool = False,
    ) -> None:
        self.name, self._runner = name, Runner(places, options)
        self._dies, self._unseen = dies, unseen
        self.ran: list[str] = []

    async def run(self, order: Order, tell: Tell) -> Mapping[str, Any]:
        self.ran.append(order.id)
        dying = self._dies is not None and self._dies[0] == order.id
        if self._unseen:
            tell({"event": "notice", "message": "far away", UNSEEN: True})

        def hear(message: Mapping[str, Any]) -> None:
            if not dying:
                tell(message)
            elif message.get("unit") == "step" and message["step"] == self._dies[1]:
                self._runner.cancel(order.id)

        outcome = await asyncio.to_thread(self._runner.run, order, hear)
        if dying:
            self._dies = None
            raise Died("was ended by signal 9")
        return outcome

    async def cancel(self, name: str) -> None:
        self._runner.cancel(name)

    async def rest(self) -> None:
        await asyncio.to_thread(self._runner.close)


class Hands:
    """In the place of a Crowd: as many workers as there are of ``how``.

    Args:
        how: what each is told besides.
    """

    def __init__(self, *how: Mapping[str, Any]) -> None:
        self._how = how or ({},)
        self.workers_made: list[LocalWorker] = []

    def shared_out(self, options: Options) -> Options:
        return options

    @contextmanager
    def workers(
        self, places: Mapping[str, str], options: Options, cache: Path | None = None
    ) -> Iterator[Sequence[LocalWorker]]:
        self.workers_made = [
            LocalWorker(f"hand {place}", places, options, **how)
            for place, how in enumerate(self._how)
        ]
        yield self.workers_made

    @property
    def ran(self) -> list[str]:
        return [name for worker in self.workers_made for name in worker.ran]


def make_list(
    requests: Path, output: Path, model: Path, hands: Hands, **more: Any
) -> tuple[Summary, list[Any]]:
    """Make a list by ``hands``; what was told comes with the counts."""
    told: list[Any] = []
    options = Options(device="cpu", vram="200MiB", ram="200MiB")
    batch = Batch(requests, output, str(model), options=options, crowd=hands, **more)  # type: ignore[arg-type]
    return make(batch, told.append, lambda todo, names: None, lambda stop: None), told
