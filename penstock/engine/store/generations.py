"""Two files that take turns: the newer one is replaced only by way of the older one."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from penstock.engine.store.durable import FileOps, read_whole, write_atomically
from penstock.engine.store.sealed import Document
from penstock.errors import JournalError

log = logging.getLogger(__name__)

Content = TypeVar("Content")


@dataclass(frozen=True)
class Generation(Generic[Content]):
    """A generation that was read back whole: its sequence number and what it holds."""

    sequence: int
    content: Content


class Generations(Generic[Content]):
    """The last two states of something.

    Args:
        ops: the file operations.
        paths: of the two files.
        parse: sequence number and content of a file; raises JournalError where it is damaged.
        tag: as `write_atomically` takes it.
    """

    def __init__(
        self,
        ops: FileOps,
        paths: tuple[Path, Path],
        parse: Callable[[bytes], Generation[Content]],
        tag: str = "",
    ) -> None:
        self._ops, self._paths, self._parse, self._tag = ops, paths, parse, tag
        self._newest: int | None = None
        self._sequence = 0
        self.problems: list[str] = []

    def load(self) -> Content | None:
        """Load the newest generation that is whole; None where neither file exists.

        What was damaged is added to ``problems``.

        Raises:
            JournalError: files are there, but none is whole; names both.
        """
        found = [self._load_one(path) for path in self._paths]
        bad = [str(one) for one in found if isinstance(one, JournalError)]
        self.problems += bad
        for problem in bad:
            log.info("damaged: %s", problem)
        whole = [(g.sequence, i, g) for i, g in enumerate(found) if isinstance(g, Generation)]
        if whole:
            self._sequence, self._newest, newest = max(whole, key=lambda item: item[:2])
            log.debug("%s is the newest, number %d", self._paths[self._newest], self._sequence)
            return newest.content
        if bad:
            raise self._lost(bad)
        return None

    def _lost(self, reasons: list[str]) -> JournalError:
        first, second = self._paths
        return JournalError(
            f"neither {first.name} nor {second.name} in {first.parent} is usable",
            expected="at least one whole file",
            found="; ".join(reasons),
            remedy="Remove the job (penstock jobs rm) and start it again.",
        )

    def _load_one(self, path: Path) -> Generation[Content] | JournalError | None:
        try:
            blob = read_whole(self._ops, path)
            return None if blob is None else self._parse(blob)
        except JournalError as error:
            return JournalError(f"{path.name}: {error}")

    def save(self, make: Callable[[int], Document]) -> None:
        """Write the next generation over the older one.

        Args:
            make: the document, given its sequence number.

        Raises:
            StorageError: it could not be written; the newest generation is intact.
        """
        # Always over the older one: while it is being replaced the newest stays whole, so that a
        # crash at any byte loses one generation at most.
        target = 0 if self._newest is None else 1 - self._newest
        write_atomically(self._ops, self._paths[target], make(self._sequence + 1), self._tag)
        # Only after the write returned: a failed save is tried again over the same file, not over
        # the good one.
        self._newest = target
        self._sequence += 1
