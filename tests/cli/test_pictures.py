"""Previews as pictures: what is sent decodes to the preview, rich's redraw stays whole, and where a
terminal is not certain to show pictures nothing of theirs is written."""

from __future__ import annotations

import base64
import io
import re

import pytest
from PIL import Image
from rich.console import Console

from penstock.cli import pictures
from penstock.cli.live import LiveView
from penstock.cli.pictures import ITERM2, KITTY, Painter, cells, protocol
from penstock.engine.run.events import PhaseStarted
from penstock.engine.run.preview import Preview
from tests.cli.test_live import PLAN, step, terminal

_KITTY = re.compile(r"\x1b_G([^;\x1b]*);?([^\x1b]*)\x1b\\")
_ITERM2 = re.compile(r"\x1b\]1337;File=([^:]*):([^\x07]*)\x07")


def noise(width: int = 160, height: int = 90, seed: int = 1) -> Preview:
    """A picture that does not become small as a file: several chunks of kitty's."""
    values, state = bytearray(), seed
    for _ in range(3 * width * height):
        state = (1103515245 * state + 12345) % (1 << 31)
        values.append(state >> 16 & 255)
    return Preview(width, height, bytes(values))


PREVIEW, OTHER = noise(), noise(seed=2)


def keys(text: str) -> dict[str, str]:
    return dict(each.split("=", 1) for each in re.split("[,;]", text))


def decoded(file: bytes) -> Preview:
    """The pixels of a picture file."""
    with Image.open(io.BytesIO(file)) as found:
        return Preview(found.width, found.height, found.convert("RGB").tobytes())


def written(renderable: object, console: Console) -> str:
    console.print(renderable, end="")
    return text_of(console)


def text_of(console: Console) -> str:
    """What it was told since the last time."""
    file = console.file
    file.flush()
    assert isinstance(file, io.TextIOWrapper) and isinstance(file.buffer, io.BytesIO)
    found = file.buffer.getvalue().decode()
    file.buffer.seek(0)
    file.buffer.truncate()
    return found


def test_kitty_is_sent_the_picture_once_and_then_told_where() -> None:
    painter, console = Painter(KITTY), terminal()
    sent = _KITTY.findall(written(painter.draw(PREVIEW, 72, 20), console))
    assert len(sent) > 5 and all(len(payload) <= 4096 for _, payload in sent)
    first = keys(sent[0][0])
    assert first.items() >= {"a": "T", "f": "100", "p": "1", "C": "1", "q": "2"}.items()
    assert (first["c"], first["r"]) == tuple(map(str, cells(PREVIEW, 72, 20)))
    assert [keys(told)["m"] for told, _ in sent] == ["1"] * (len(sent) - 1) + ["0"]
    assert decoded(base64.b64decode("".join(payload for _, payload in sent))) == PREVIEW
    ((again, nothing),) = _KITTY.findall(written(painter.draw(PREVIEW, 72, 10), console))
    assert keys(again)["a"] == "p" and keys(again)["i"] == first["i"] and nothing == ""
    other = _KITTY.findall(written(painter.draw(OTHER, 72, 20), console))
    assert keys(other[0][0])["a"] == "T" and keys(other[0][0])["i"] == first["i"]
    assert decoded(base64.b64decode("".join(payload for _, payload in other))) == OTHER
    gone = painter.clear()
    assert gone is not None
    ((cleared, _),) = _KITTY.findall(written(gone, console))
    assert keys(cleared).items() >= {"a": "d", "d": "I", "i": first["i"]}.items()
    assert painter.clear() is None


def test_iterm2_is_sent_the_picture_every_time() -> None:
    painter, console = Painter(ITERM2), terminal()
    for preview in (PREVIEW, PREVIEW, OTHER):
        ((told, payload),) = _ITERM2.findall(written(painter.draw(preview, 72, 20), console))
        file = base64.b64decode(payload)
        assert decoded(file) == preview
        assert keys(told)["size"] == str(len(file)) and keys(told)["inline"] == "1"
        assert (int(keys(told)["width"]), int(keys(told)["height"])) == cells(preview, 72, 20)
    assert painter.clear() is None  # erased lines erase it


@pytest.mark.parametrize(("width", "rows"), [(72, 20), (20, 20), (72, 6), (1, 1)])
def test_a_picture_keeps_its_aspect_in_the_cells_there_are(width: int, rows: int) -> None:
    for preview in (Preview(160, 90, b""), Preview(60, 104, b""), Preview(8, 8, b"")):
        columns, lines = cells(preview, width, rows)
        assert 1 <= columns <= width and 1 <= lines <= rows
        if min(columns, lines) > 5:
            assert columns / (2 * lines) == pytest.approx(preview.width / preview.height, rel=0.1)


@pytest.mark.parametrize("by", [KITTY, ITERM2])
def test_the_rows_of_a_picture_are_there_before_it_is_drawn(by: str) -> None:
    lines = cells(PREVIEW, 72, 20)[1]
    before, moved, after = re.split(
        r"\x1b7|\x1b8", written(Painter(by).draw(PREVIEW, 72, 20), terminal()), maxsplit=2
    )
    assert before == "\n" * (lines - 1) + f"\r\x1b[{lines - 1}A" and after == f"\x1b[{lines - 1}B"
    assert "\n" not in moved


@pytest.mark.parametrize(
    ("variables", "by"), [({"TERM": "xterm-kitty"}, KITTY), ({"TERM_PROGRAM": "WezTerm"}, ITERM2)]
)
def test_the_live_view_redraws_around_it(
    variables: dict[str, str], by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """rich goes up by as many lines as it has drawn, whatever the picture's sequences say."""
    for name in pictures._BETWEEN + pictures._OTHERS:
        monkeypatch.delenv(name, raising=False)
    for name, value in {"TERM": "xterm-256color", **variables}.items():
        monkeypatch.setenv(name, value)
    console = terminal(80, 40)
    view = LiveView(console, PLAN)
    view.show(PhaseStarted("denoise", 40, "step"))
    view.show(step(1, PREVIEW))
    texts = len(view.lines(80, 40))
    rows = cells(PREVIEW, 72, 40 - texts - 1)[1]
    with view:
        view._live.refresh()
        text_of(console)
        view._live.refresh()
        drawn = text_of(console)
        height = texts + rows
        erased, _, rest = drawn.rpartition("\x1b[1A\x1b[2K")
        assert erased.count("\x1b[1A") == height - 2
        assert rest.count("\n") == height - 1
        assert len((_KITTY if by == KITTY else _ITERM2).findall(rest)) == 1
    left = text_of(console)
    assert ("a=d" in left) is (by == KITTY)
    assert not _ITERM2.search(left) and "\N{UPPER HALF BLOCK}" not in left


def test_without_a_protocol_there_are_half_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    console = terminal(80, 40)
    view = LiveView(console, PLAN)
    view.show(PhaseStarted("denoise", 40, "step"))
    view.show(step(1, PREVIEW))
    with view:
        view._live.refresh()
        drawn = text_of(console)
    assert "\N{UPPER HALF BLOCK}" in drawn
    assert not _KITTY.search(drawn) and not _ITERM2.search(drawn)


@pytest.mark.parametrize(
    ("variables", "by"),
    [
        ({"TERM": "xterm-kitty", "KITTY_WINDOW_ID": "1"}, KITTY),
        ({"TERM": "xterm-256color", "KITTY_WINDOW_ID": "1"}, KITTY),
        ({"TERM": "xterm-ghostty", "TERM_PROGRAM": "ghostty"}, KITTY),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "iTerm.app"}, ITERM2),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "WezTerm"}, ITERM2),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "vscode", "KITTY_WINDOW_ID": "1"}, None),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "Apple_Terminal"}, None),
        ({"TERM": "xterm-256color", "VTE_VERSION": "7006", "KITTY_WINDOW_ID": "1"}, None),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "tmux", "KITTY_WINDOW_ID": "1"}, None),
        ({"TERM": "tmux-256color", "KITTY_WINDOW_ID": "1"}, None),
        ({"TERM": "xterm-kitty", "TMUX": "/tmp/tmux-1/default,1,0"}, None),
        ({"TERM": "screen.xterm-256color", "TERM_PROGRAM": "iTerm.app"}, None),
        ({"TERM": "xterm-kitty", "ZELLIJ": "0"}, None),
        ({"TERM": "xterm-kitty", "SSH_CONNECTION": "10.0.0.1 1 10.0.0.2 22"}, None),
        ({"TERM": "xterm-256color", "WT_SESSION": "x"}, None),
        ({"TERM": "xterm-256color"}, None),
        ({"TERM": "dumb", "KITTY_WINDOW_ID": "1"}, None),
        ({}, None),
    ],
)
def test_which_terminals_are_believed(variables: dict[str, str], by: str | None) -> None:
    assert protocol(variables, "linux") == by
    assert protocol(variables, "win32") is None
