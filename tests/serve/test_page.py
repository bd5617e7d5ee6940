"""The page's files, and where it leaves the server's key."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from penstock.serve.answers import answer_errors
from penstock.serve.guard import COOKIE, Guard
from penstock.serve.metrics import Metrics
from penstock.serve.page import STATIC, page_router
from penstock.serve.settings import ServeSettings


def client(**more: str) -> TestClient:
    settings = ServeSettings(models={"m": "m"}, **more)  # type: ignore[arg-type]
    app = FastAPI()
    answer_errors(app)
    app.include_router(page_router(settings))

    @app.get("/v1/videos")
    def videos() -> list[str]:
        return ["mine"]

    return TestClient(Guard(app, settings, Metrics()), base_url="http://127.0.0.1:8730")


@pytest.fixture(scope="module")
def page() -> Iterator[SimpleNamespace]:
    with client() as asking:
        yield SimpleNamespace(get=asking.get)


def test_everything_that_the_page_names_is_served(page: SimpleNamespace) -> None:
    index = page.get("/")
    assert index.status_code == 200 and index.headers["content-type"].startswith("text/html")
    named = set(re.findall(r'"page/([\w.]+)"', index.text))
    assert {"app.js", "style.css", "icon.svg", "theme.js"} <= named
    for path in STATIC.glob("*.js"):
        named |= set(re.findall(r'from "\./([\w.]+)"', path.read_text(encoding="utf-8")))
    for name in named:
        answer = page.get(f"/page/{name}")
        assert answer.status_code == 200, name
        assert answer.content == (STATIC / name).read_bytes()
    assert page.get("/page/app.js").headers["content-type"].startswith("text/javascript")


def test_nothing_of_another_host_is_asked_for_and_nothing_runs_inline(
    page: SimpleNamespace,
) -> None:
    for path in STATIC.iterdir():
        text = path.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
        assert "http://" not in text and "https://" not in text and "//cdn" not in text, path
        assert "innerHTML" not in text and "eval(" not in text, path
    index = page.get("/")
    assert not re.search(r"<script(?![^>]*src=)|style=|\son\w+=", index.text)
    policy = index.headers["content-security-policy"]
    assert "default-src 'self'" in policy and "unsafe" not in policy


@pytest.mark.parametrize("name", ["other.js", "..%2Fpage.py", "%2e%2e/page.py", ""])
def test_only_the_pages_own_files_are_served(page: SimpleNamespace, name: str) -> None:
    assert page.get(f"/page/{name}").status_code == 404


def test_the_key_is_left_in_a_cookie_that_scripts_cannot_read() -> None:
    with client(api_key="secret") as asking:
        assert asking.get("/").status_code == 200, "the page itself is no secret"
        assert asking.get("/page/app.js").status_code == 200
        assert asking.get("/v1/videos").status_code == 401
        wrong = asking.post("/page/key", json={"key": "guess"})
        assert wrong.status_code == 401 and COOKIE not in wrong.cookies
        right = asking.post("/page/key", json={"key": "secret"})
        told = right.headers["set-cookie"].lower()
        assert right.status_code == 200 and "httponly" in told and "samesite=strict" in told
        assert asking.get("/v1/videos").json() == ["mine"]


def test_a_server_without_a_key_takes_none() -> None:
    with client() as asking:
        assert asking.get("/v1/videos").status_code == 200
        assert asking.post("/page/key", json={"key": "x"}).status_code == 401


def test_the_files_are_in_the_package() -> None:
    project = Path(__file__).parents[2] / "pyproject.toml"
    (data,) = re.findall(r"^penstock = \[.*\]$", project.read_text(encoding="utf-8"), re.MULTILINE)
    assert '"serve/static/*"' in data
