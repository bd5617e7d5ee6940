"""The package's face: its names, what they promise, and that importing it does nothing."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import penstock
from penstock import errors

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent

WATCHED_IMPORT = """
import json, sys, threading
seen = []
def watch(event, arguments):
    if event == "open" and not str(arguments[0]).endswith((".py", ".pyc")):
        seen.append(f"open {arguments[0]}")
    if event.startswith(("socket.", "subprocess.", "ctypes.", "os.putenv", "os.fork", "_thread.")):
        seen.append(event)
sys.addaudithook(watch)
class Environment(dict):
    def __getitem__(self, name):
        seen.append(f"environment {name}")
        return super().__getitem__(name)
import os
os.environ._data = Environment(os.environ._data)
import penstock
names = dir(penstock), penstock.__version__
foreign = {"torch", "numpy", "diffusers", "transformers", "PIL", "penstock.engine"}
print(json.dumps({
    "seen": seen, "foreign": sorted(foreign & set(sys.modules)),
    "threads": threading.active_count(),
}))
"""


def test_the_surface_is_all() -> None:
    assert dir(penstock) == sorted(penstock.__all__)
    assert sorted(penstock.__all__) == penstock.__all__
    assert set(penstock._HOMES) | {"__version__"} == set(penstock.__all__)
    strange = [n for n in vars(penstock) if not n.startswith("_") and n not in penstock.__all__]
    modules = [n for n in strange if inspect.ismodule(vars(penstock)[n])]
    assert set(strange) - set(modules) <= {"annotations", "TYPE_CHECKING"}
    assert all(getattr(penstock, name) is not None for name in penstock.__all__)
    star: dict[str, Any] = {}
    exec("from penstock import *", star)  # noqa: S102 - our own words
    assert set(star) - {"__builtins__"} == set(penstock.__all__)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="nothing_like_this"):
        penstock.nothing_like_this  # noqa: B018


def test_importing_does_nothing() -> None:
    child = subprocess.run(
        [sys.executable, "-c", WATCHED_IMPORT], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert json.loads(child.stdout) == {"seen": [], "foreign": [], "threads": 1}


def _classes() -> list[type]:
    found = [getattr(penstock, name) for name in penstock.__all__ if name != "__version__"]
    return [each for each in found if inspect.isclass(each)]


def _callables() -> Iterator[tuple[str, Any]]:
    """Every public function and method, by name."""
    for cls in _classes():
        for name, member in vars(cls).items():
            function = getattr(member, "__func__", member)
            if not name.startswith("_") and inspect.isfunction(function):
                yield f"{cls.__name__}.{name}", function


def _members() -> Iterator[tuple[str, Any]]:
    yield from _callables()
    for cls in _classes():
        yield cls.__name__, cls
        for name, member in vars(cls).items():
            if not name.startswith("_") and isinstance(member, property):
                yield f"{cls.__name__}.{name}", member.fget


def test_every_public_name_is_documented() -> None:
    missing = [name for name, member in _members() if not (member.__doc__ or "").strip()]
    assert missing == []


def test_every_public_method_names_its_errors_and_its_arguments() -> None:
    for name, function in _callables():
        text = function.__doc__
        assert "Raises:" in text, name
        wanted = [p for p in inspect.signature(function).parameters if p not in ("self", "cls")]
        assert [p for p in wanted if p not in text] == [], name


def test_every_public_field_is_described() -> None:
    for cls in _classes():
        fields = getattr(cls, "__dataclass_fields__", {})
        assert [name for name in fields if name not in (cls.__doc__ or "")] == [], cls.__name__


def test_every_public_callable_is_typed() -> None:
    for name, function in _callables():
        hints = typing.get_type_hints(function, vars(sys.modules[function.__module__]))
        wanted = {*inspect.signature(function).parameters, "return"} - {"self", "cls"}
        assert wanted <= set(hints), name


def test_errors_cross_a_process_boundary() -> None:
    import pickle

    raised: list[errors.PenstockError] = [
        errors.OverBudget("VRAM", 2, 1, [("weights", 2)], "Ask for less."),
        errors.FingerprintMismatch([("versions.torch", "2.7", "2.8")]),
        errors.LedgerOverflow("too much", memory="RAM", expected="1", found="2"),
        errors.JobCancelled("the job was cancelled", remedy="Nothing was written."),
    ]
    for error in raised:
        copy = pickle.loads(pickle.dumps(error))  # noqa: S301 - our own bytes
        assert type(copy) is type(error)
        assert (str(copy), vars(copy)) == (str(error), vars(error))


CONSUMER = """
import asyncio
from pathlib import Path
from typing_extensions import assert_type
from torch import Tensor
import penstock

def steer(step: int, latents: Tensor) -> Tensor | None:
    return latents * 0.9 if step == 1 else None

def tell(event: penstock.Event) -> str:
    if isinstance(event, penstock.Progress):
        assert_type(event.step, int)
        assert_type(event.eta_s, float)
        assert_type(event.stall_s, float)
        assert_type(event.preview, penstock.Preview | None)
        return f"{event.phase} {event.step}/{event.total} {event.vram_bytes} {event.ram_bytes}"
    if isinstance(event, penstock.Notice | penstock.Replanned):
        return event.message
    if isinstance(event, penstock.PhaseEnded):
        return f"{event.phase} {event.report.seconds}"
    assert_type(event, penstock.PhaseStarted)
    return f"{event.phase} {event.total}"

async def follow(job: penstock.Job) -> list[str]:
    return [tell(event) async for event in job.events()]

def make(model: Path) -> Tensor:
    request = penstock.GenerationRequest(prompt="a cat", image=Path("cat.png"))
    with penstock.Engine.open(model, profile="12gb", vram="12GiB", ram=16 << 30) as engine:
        assert_type(engine.plan(request), penstock.Plan)
        job = engine.submit(request, "cat.mp4", on_step=steer, preview_every=5)
        for event in job.events():
            print(tell(event))
        asyncio.run(follow(job))
        try:
            result = job.result(timeout_s=3600)
        except penstock.OverBudget as error:
            raise SystemExit(error.need_bytes) from error
        assert_type(result, penstock.JobResult)
        assert_type(result.report, penstock.RunReport)
        engine.unload()
        return result.video
"""
WRONG = """
import penstock
penstock.GenerationRequest(prompt=3)
penstock.nothing_like_this
"""


def _mypy(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    (folder / "consumer.py").write_text(code)
    command = [
        sys.executable,
        "-m",
        "mypy",
        "--strict",
        "--follow-imports=silent",
        "--no-incremental",
    ]
    paths = {"MYPYPATH": str(ROOT), "PATH": ""}
    return subprocess.run(
        [*command, "--config-file=", "--ignore-missing-imports", "consumer.py"],
        cwd=folder, capture_output=True, text=True, env=paths,
    )  # fmt: skip


@pytest.mark.slow
def test_a_consumer_passes_mypy_strict_and_a_wrong_one_does_not(tmp_path: Path) -> None:
    found = _mypy(CONSUMER + WRONG, tmp_path)
    lines = [line for line in found.stdout.splitlines() if "error:" in line]
    assert len(lines) == 2, found.stdout
    assert 'incompatible type "int"; expected "str"' in lines[0]
    assert '"nothing_like_this"' in lines[1]


def test_the_marker_of_types_is_shipped() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert "py.typed" in settings["tool"]["setuptools"]["package-data"]["penstock"]
    assert (ROOT / "penstock" / "py.typed").is_file()
