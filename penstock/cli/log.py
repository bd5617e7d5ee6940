"""What penstock decides, line by line, on stderr or in a file that is all a bug report needs.

The package only ever asks `logging` for loggers of its own names; handlers are made here, for the
command alone. Prompts are told at "debug" and nowhere else.
"""

from __future__ import annotations

import logging
import os
import platform
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from enum import Enum
from pathlib import Path

from penstock.engine.machine.programs import output
from penstock.engine.software import versions
from penstock.errors import OutputError
from penstock.folders import cache_folder, config_folder, data_folder
from penstock.regular import check_regular
from penstock.units import format_bytes

log = logging.getLogger(__name__)

_PACKAGE = "penstock"
_PRIVATE = ("--prompt", "--negative")
_TOLD = ("PENSTOCK_", "CUDA_", "PYTORCH_", "XDG_", "OMP_NUM_THREADS", "HF_HOME", "HF_HUB_CACHE")
"""Beginnings of variables that change what penstock does; others are nobody's business."""


_IMPORTED = (
    "bitsandbytes.backends.cpu.ops", "diffusers.quantizers.torchao.torchao_quantizer",
    "torch.utils._pytree", "torchao",
)  # fmt: skip
"""Loggers of libraries that warn while they are imported: of kernels that they would like to have
and penstock does not call, and of each other."""


class Level(str, Enum):
    """How much is told; each tells what comes after it too."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


class _Lines(logging.Formatter):
    """One record begins one line; what goes on below it is indented."""

    def format(self, record: logging.LogRecord) -> str:
        return super().format(record).replace("\n", "\n    ")


@contextmanager
def logged(level: Level | None, file: Path | None) -> Iterator[None]:
    """Tell of everything inside: nothing where neither is given, and nothing of what libraries
    warn of while they are imported, but at "debug".

    Args:
        level: None: "debug".
        file: is appended to, after a head with versions, command and machine; None: stderr.

    Raises:
        OutputError: the file cannot be written.
    """
    with _imports_told_at_debug():
        if level is None and file is None:
            yield
        else:
            with _told(level or Level.DEBUG, file):
                yield


@contextmanager
def _imports_told_at_debug() -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in _IMPORTED]
    for each in loggers:
        each.addFilter(_is_error)
    try:
        yield
    finally:
        for each in loggers:
            each.removeFilter(_is_error)


def _is_error(record: logging.LogRecord) -> bool:
    """Return whether a library's own handlers are to show it; else it is told here."""
    if record.levelno >= logging.ERROR:
        return True
    log.debug("%s: %s", record.name, record.getMessage())
    return False


@contextmanager
def _told(level: Level, file: Path | None) -> Iterator[None]:
    handler = logging.StreamHandler() if file is None else _opened(file)
    handler.setFormatter(_Lines("%(asctime)s %(levelname)s %(threadName)s %(name)s: %(message)s"))
    package = logging.getLogger(_PACKAGE)
    before = package.level
    package.addHandler(handler)
    package.setLevel(level.name)
    try:
        if file is not None:
            for line in head(sys.argv, whole=level is Level.DEBUG):
                handler.handle(log.makeRecord(log.name, logging.INFO, __file__, 0, line, (), None))
        yield
    finally:
        package.setLevel(before)
        package.removeHandler(handler)
        handler.close()


def _opened(file: Path) -> logging.Handler:
    try:
        with suppress(FileNotFoundError):
            check_regular(file)
        return logging.FileHandler(file, encoding="utf-8")
    except OSError as error:
        raise OutputError(
            "the log cannot be written",
            expected="a file in a folder that can be written",
            found=f"{file}: {error.strerror}",
            remedy="Choose another --log-file",
        ) from error


def head(command: Sequence[str], *, whole: bool) -> Iterator[str]:
    """Yield the lines on the software, the command, the machine and its folders.

    Args:
        whole: prompts as they are; else their lengths alone.
    """
    yield ", ".join(f"{name} {found}" for name, found in versions().items())
    yield f"command: {shlex.join(command if whole else _without_prompts(command))}"
    yield f"machine: {platform.platform()}, {platform.machine()}, {_memory()}"
    fields = "name,driver_version,memory.total,memory.free"
    gpus = output("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader").splitlines()
    yield f"GPUs: {'; '.join(gpus) or 'none that nvidia-smi tells of'}"
    yield f"settings in {config_folder()}, jobs in {data_folder()}, packs in {cache_folder()}"
    told = sorted(item for item in os.environ.items() if item[0].startswith(_TOLD))
    yield f"environment: {' '.join(f'{name}={value}' for name, value in told) or 'as it comes'}"


def _memory() -> str:
    import psutil

    memory = psutil.virtual_memory()
    free, total = format_bytes(memory.available), format_bytes(memory.total)
    return f"{os.cpu_count()} cores, {free} of {total} free"


def _without_prompts(command: Sequence[str]) -> Iterator[str]:
    """Yield the words of a command, those that describe a video counted instead of shown."""
    option = ""
    for word in command:
        name, is_joined, value = word.partition("=")
        if option in _PRIVATE:
            yield f"<{len(word)} characters>"
        elif is_joined and name in _PRIVATE:
            yield f"{name}=<{len(value)} characters>"
        else:
            yield word
        option = word
