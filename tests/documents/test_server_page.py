"""What README.md and docs/server.md show of a server, run against one: the same command, and the
same client, but for the port and a smaller video."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest

from penstock.engine.media.video import read_frames
from tests.documents import stage as staged
from tests.documents.blocks import ROOT, blocks
from tests.serve.running import Running

pytest.importorskip("openai")

README, PAGE = ROOT / "README.md", ROOT / "docs" / "server.md"

SMALLER = {"832x480": "32x32", '"num_inference_steps": 30': '"num_inference_steps": 2'}


def shown(page: Path, language: str) -> list[str]:
    return [b.text for b in blocks(page) if b.note == "run by" and b.language == language]


def serve_words(page: Path) -> list[str]:
    """The flags of `penstock serve` there."""
    (found,) = (
        words[2:]
        for block in blocks(page)
        if block.note == "run by"
        for words in block.commands()
        if words[:2] == ["penstock", "serve"]
    )
    return found


def test_both_pages_start_it_in_the_same_way() -> None:
    assert serve_words(README) == serve_words(PAGE)


def test_the_client_of_the_page_makes_a_video(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    staged.small_model(tmp_path / "Wan2.1-I2V-14B-720P-Diffusers")
    (tmp_path / "cat.png").symlink_to(staged.demo_picture())
    monkeypatch.chdir(tmp_path)
    server = Running(tmp_path / "served", asked=serve_words(PAGE))
    (code,) = shown(PAGE, "python")
    for large, small in SMALLER.items():
        code = code.replace(large, small)
    assert "http://127.0.0.1:8730" in code and "32x32" in code
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            exec(compile(code.replace("http://127.0.0.1:8730", server.url), "page", "exec"), {})  # noqa: S102
        assert len(list(read_frames(tmp_path / "cat.mp4"))) > 5
    finally:
        server.close()
