"""Every command and every snippet of the documents is run, or says why not and is counted."""

from __future__ import annotations

import json
import shutil
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn
from typer.testing import CliRunner

import penstock
from penstock.batch.lines import read_lines
from penstock.cli.main import app
from penstock.engine.machine.calibrate import Effort
from tests.documents import stage as staged
from tests.documents.blocks import PAGES, ROOT, RUN, SHOWN, Block, blocks, parsed

ALL = [block for page in PAGES for block in blocks(page)]
PAGES_WITH = [page for page in PAGES if any(b.language in RUN and not b.note for b in blocks(page))]

NOT_RUN = {
    "README.md": 2,
    "batch.md": 1,
    "caches.md": 1,
    "comfyui.md": 1,
    "files.md": 1,
    "install.md": 4,
}
"""How many blocks of a page nothing runs. One more needs its reason in the page, and its number
here."""

QUICK = Effort(tokens=64, copy_bytes=1 << 20, read_bytes=8 << 20, seconds=0.001)


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stage")
    staged.prepare(folder)
    return folder


@pytest.fixture(scope="module")
def done() -> set[tuple[str, ...]]:
    """Commands that have run: a page may repeat another's."""
    return set()


@pytest.mark.parametrize("page", PAGES_WITH, ids=lambda page: page.stem)
def test_what_a_page_shows_runs(
    page: Path, stage: Path, done: set[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(stage)
    monkeypatch.setattr(Effort, "on", classmethod(lambda cls, device: QUICK))
    names: dict[str, Any] = {}
    for block in blocks(page):
        if block.note or block.language not in RUN:
            continue
        if block.language == "python":
            run_python(block, names)
            continue
        for words in block.commands():
            if tuple(words) not in done:
                run_command(words, stage)
                done.add(tuple(words))


def run_command(words: list[str], stage: Path) -> None:
    """As typed, but for the program's name."""
    assert words[0] == "penstock", f"not run, and does not say so: {words}"
    if "-o" in words:
        remove(stage / words[words.index("-o") + 1])
    if "JOB" in words or words[1] == "jobs":
        staged.stopped_job(stage)
    found = CliRunner().invoke(app, words[1:])
    assert found.exit_code == 0, f"{' '.join(words)}\n{found.output}"


def remove(output: Path) -> None:
    """What another page has written."""
    if output.is_dir():
        shutil.rmtree(output)
    output.unlink(missing_ok=True)


def run_python(block: Block, names: dict[str, Any]) -> None:
    """With what it takes for given, and with what the page's blocks before it have made."""
    given = {name: make for name, make in GIVEN.items() if name in block.text}
    for name, make in given.items():
        names.setdefault(name, make())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(compile(block.text, str(block.page), "exec"), names)  # noqa: S102 - our own words


def small_pipeline() -> Any:
    """A pipeline whose call, left open, makes the smallest video."""
    from diffusers import WanImageToVideoPipeline

    class Small(WanImageToVideoPipeline):
        def __call__(self, *args: Any, **given: Any) -> Any:
            small = {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 2}
            return super().__call__(*args, **(small | given))

    pipe = Small.from_pretrained(Path("DIR"))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def small_module() -> nn.Module:
    """Something with `encoder.layers`."""
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = nn.Module()
    model.encoder = nn.TransformerEncoder(layer, 3)
    model.forward = model.encoder.forward  # type: ignore[method-assign]
    return model.eval()


GIVEN: dict[str, Callable[[], Any]] = {
    "pipe": small_pipeline,
    "picture": lambda: Image.open("cat.png").convert("RGB"),
    "model": small_module,
    "ids": lambda: torch.ones(1, 4, 16),
    "torch": lambda: torch,
    "penstock": lambda: penstock,
}
"""What a snippet may take for given, by the name that it uses."""


def test_blocks_say_what_they_are() -> None:
    for block in ALL:
        where = f"{block.page.name}: {block.text[:60]!r}"
        assert block.language in (*RUN, *SHOWN), f"a fence without a language, or another: {where}"
        if block.language in ("text", "powershell"):
            assert block.note, f"says neither that it is not run nor why: {where}"
        if block.note == "run by":
            assert (ROOT / block.why).is_file(), where


def test_what_is_not_run_is_counted() -> None:
    assert Counter(block.page.name for block in ALL if block.note == "not run") == NOT_RUN


def test_lines_of_a_list_are_requests(tmp_path: Path) -> None:
    (block,) = [b for b in ALL if b.language == "json" and b.page.name == "batch.md"]
    (tmp_path / "jobs.jsonl").write_text(block.text)
    good, bad = read_lines(tmp_path / "jobs.jsonl", "DIR")
    assert len(good) == len(block.text.splitlines()) and bad == []


def test_json_is_json() -> None:
    for block in ALL:
        if block.language == "json":
            for line in block.text.splitlines() if "}\n{" in block.text else [block.text]:
                json.loads(line)


def test_comments_and_notes_are_read() -> None:
    page = ROOT / "README.md"
    (noted,) = parsed("<!-- not run: WHY -->\n```bash\nmake x\n```\n", page)
    assert (noted.note, noted.why, noted.commands()) == ("not run", "WHY", [["make", "x"]])
    (plain,) = parsed("```bash\npenstock plan \\\n  --model X  # why\n```\n", page)
    assert plain.note == "" and plain.commands() == [["penstock", "plan", "--model", "X"]]
    with pytest.raises(AssertionError, match="does not say so"):
        run_command(["make", "x"], Path())
