"""The page in a real Chromium, from a picture that is dropped to a video that plays, with a server
that is killed in between. Skipped where there is no Chromium or no playwright."""

from __future__ import annotations

import base64
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from penstock.engine.request.demo import demo_picture
from tests.serve.running import Running

sync_api = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium"),
]
_FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update",
]  # fmt: skip
SCREENSHOTS = os.environ.get("PENSTOCK_SCREENSHOTS")
"""A folder: the page's pictures for the documentation are put there."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=CHROMIUM, args=_FLAGS)
        yield launched
        launched.close()


@pytest.fixture(scope="module")
def port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


FIRST, SECOND, THIRD = (
    "a green square moves to the right", "a red circle moves up", "a blue square moves down"
)  # fmt: skip
SECONDS = """(each) => new Promise((done) => {
  each.addEventListener("loadedmetadata", () => done(each.duration));
  each.load();
})"""


class Server:
    """One that can be killed, and started again at the same place.

    Args:
        folder, port: its own.
    """

    def __init__(self, folder: Path, port: int) -> None:
        self._folder, self._port = folder, port
        self.running = self._started()

    def _started(self) -> Running:
        return Running(self._folder, "--port", str(self._port))

    def restart(self) -> None:
        self.running.kill()
        self.running = self._started()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, port: int) -> Iterator[Server]:
    started = Server(tmp_path_factory.mktemp("serve"), port)
    yield started
    started.running.close()


@pytest.fixture
def page(browser: Any, server: Server) -> Iterator[Any]:
    """The page; it must ask no other host for anything, and have no error."""
    context = browser.new_context(viewport={"width": 1280, "height": 900}, color_scheme="light")
    opened = context.new_page()
    opened.set_default_timeout(0)
    asked: list[str] = []
    wrong: list[str] = []
    opened.on("request", lambda request: asked.append(request.url))
    opened.on("pageerror", lambda error: wrong.append(str(error)))
    opened.on(
        "console",
        lambda told: wrong.append(told.text) if "Content Security Policy" in told.text else None,
    )
    opened.goto(server.running.url)
    opened.wait_for_selector("#plan .badge")
    yield opened
    context.close()
    base = server.running.url
    assert [url for url in asked if not url.startswith((base, "blob:" + base, "data:"))] == []
    assert wrong == []


def snap(page: Any, name: str) -> None:
    if SCREENSHOTS is not None:
        page.wait_for_function(
            "[...document.querySelectorAll('video')].every((each) => each.readyState > 1)"
        )
        page.wait_for_timeout(1000)  # the player's own wheel has gone by then
        page.screenshot(path=str(Path(SCREENSHOTS) / f"{name}.png"))


def drop(page: Any, target: str, kind: str) -> None:
    """Drop or paste the demo's picture."""
    data = base64.b64encode(demo_picture().read_bytes()).decode()
    page.evaluate(
        """([target, kind, data]) => {
          const bytes = Uint8Array.from(atob(data), (each) => each.charCodeAt(0));
          const transfer = new DataTransfer();
          transfer.items.add(new File([bytes], `${kind}.png`, { type: "image/png" }));
          const event = kind === "paste"
            ? new ClipboardEvent("paste", { clipboardData: transfer, bubbles: true })
            : new DragEvent("drop", { dataTransfer: transfer, bubbles: true, cancelable: true });
          document.querySelector(target).dispatchEvent(event);
        }""",
        [target, kind, data],
    )
    page.wait_for_selector(f"#drop-title:text-is('{kind}.png')")


def job(page: Any, prompt: str) -> Any:
    return page.locator(".job", has=page.locator(f".title:text-is('{prompt}')"))


def film(page: Any, prompt: str) -> Any:
    return page.locator(".film", has=page.locator(f".title:text-is('{prompt}')")).first


def ask(page: Any, prompt: str, steps: int = 2) -> None:
    page.fill("#prompt", prompt)
    if page.locator("#more").get_attribute("open") is None:
        page.click("#more > summary")
    page.fill("#steps", str(steps))
    page.click("#generate")
    page.wait_for_selector(f".title:text-is('{prompt}')")


def press(card: Any, name: str) -> None:
    card.get_by_role("button", name=name, exact=True).click()


def badge(card: Any, text: str) -> None:
    card.locator(f".badge:text-is('{text}')").wait_for()


def waiting(page: Any) -> list[str]:
    return list(page.locator("#waiting .title").all_text_contents())


def test_the_plan_follows_what_is_typed(page: Any) -> None:
    page.wait_for_selector("#plan .badge.good")
    assert "of 0.25 GiB" in page.locator("#plan").inner_text()
    page.fill("#seconds", "1.1")
    page.wait_for_selector("#frames-told:text-is('9 frames at 8 a second')")
    page.fill("#seconds", "100")
    page.select_option("#size", "1280x720")
    page.wait_for_selector("#plan .badge.bad:text-is('does not fit')")
    assert page.locator("#generate").is_disabled()
    page.locator("#plan button").click()
    page.wait_for_selector("#plan .badge.good")
    assert page.locator("#generate").is_enabled()
    page.click("#more > summary")
    page.fill("#seed", "-5")
    page.wait_for_selector("#plan .badge.bad:text-is('not possible')")


def test_a_video_from_a_dropped_picture_to_playing_it(page: Any, server: Server) -> None:
    drop(page, "#drop", "drop")
    assert page.locator("#thumb").is_visible()
    page.click("#picture-clear")
    assert not page.locator("#thumb").is_visible()
    drop(page, "#prompt", "paste")
    page.select_option("#size", "")
    page.fill("#seconds", "2.13")
    ask(page, FIRST, steps=60)
    first = job(page, FIRST)
    badge(first, "making")
    ask(page, SECOND)
    ask(page, THIRD)
    first.locator("img.preview[src^='data:image/jpeg']").wait_for()
    snap(page, "page-queue")

    # Another order, by keyboard
    badge(job(page, THIRD), "no. 2")
    job(page, THIRD).focus()
    page.keyboard.press("Alt+ArrowUp")
    badge(job(page, THIRD), "next")
    assert waiting(page) == [THIRD, SECOND]
    press(job(page, SECOND), "Cancel")
    badge(job(page, SECOND), "cancelled")
    press(job(page, SECOND), "Remove")
    job(page, SECOND).wait_for(state="detached")

    # Stopped, and gone on with
    press(page, "Pause the queue")
    page.wait_for_selector("#hold:text-is('Go on with the queue')")
    press(first, "Cancel")
    badge(first, "cancelled")
    first.locator(".told", has_text="% is kept").wait_for()
    page.reload()
    badge(first, "cancelled")
    press(first, "Resume")
    press(page, "Go on with the queue")
    badge(first, "making")

    # The server dies; the page waits for the next one
    server.restart()
    page.wait_for_selector("#link[data-state='on']")
    played = film(page, FIRST)
    played.wait_for()
    film(page, THIRD).wait_for()
    player = played.locator("video")
    player.evaluate("async (each) => { await each.play(); }")
    page.wait_for_function("(each) => each.currentTime > 0.2", arg=player.element_handle())
    assert player.evaluate("(each) => [each.error, each.videoWidth]") == [None, 64]
    assert page.locator("#queue-empty").is_visible()


def test_settings_of_the_gallery_are_taken_again(page: Any) -> None:
    made = film(page, THIRD)
    made.wait_for()
    assert "steps 2" in made.locator(".facts").inner_text()
    press(made, "Use settings")
    page.wait_for_selector("#drop-title:text-is('start.png')")
    assert page.input_value("#prompt") == THIRD and page.input_value("#steps") == "2"
    assert "seed " + page.input_value("#seed") in made.locator(".facts").inner_text()
    page.wait_for_selector("#plan .verdict:has-text('· 2 steps')")
    snap(page, "page-gallery")
    press(made, "Use as start")
    page.wait_for_selector("#drop-title:text-is('last-frame.png')")
    press(made, "Continue")
    page.wait_for_selector(f"#source-text:text-is('Goes on from “{THIRD}”')")
    ask(page, "and on")
    longer = film(page, "and on")
    longer.wait_for()
    both = [film(page, name).locator("video").evaluate(SECONDS) for name in (THIRD, "and on")]
    assert both[1] > 1.9 * both[0], "both are in one file"
    press(longer, "Delete")
    longer.wait_for(state="detached")


def test_a_phone_in_the_dark(browser: Any, server: Server) -> None:
    context = browser.new_context(
        viewport={"width": 390, "height": 844}, color_scheme="dark", is_mobile=True, has_touch=True
    )
    page = context.new_page()
    page.set_default_timeout(0)
    page.goto(server.running.url)
    page.wait_for_selector("#plan .badge.good")
    page.wait_for_selector(".film")
    width = page.evaluate("document.documentElement.scrollWidth")
    assert width == 390, "nothing is wider than the screen"
    ground = "getComputedStyle(document.body).backgroundColor"
    dark = page.evaluate(ground)
    snap(page, "page-phone")
    page.click("#theme")
    assert page.evaluate(ground) != dark and page.locator("#theme").inner_text() == "Light"
    page.reload()
    page.wait_for_selector("#theme:text-is('Light')")
    context.close()


def test_the_form_is_reached_and_sent_by_keyboard(page: Any) -> None:
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("Enter")
    page.wait_for_function("document.activeElement.id === 'prompt'")
    drop(page, "#prompt", "paste")
    page.click("#more > summary")
    page.fill("#steps", "1")
    page.focus("#prompt")
    page.fill("#prompt", "by keyboard")
    page.keyboard.press("Control+Enter")
    film(page, "by keyboard").wait_for()
