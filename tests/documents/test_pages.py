"""What the documents link to and name is there, and they are as short as they promise."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from documents import cli
from penstock import errors

ROOT = Path(__file__).parent.parent.parent
README = ROOT / "README.md"
PAGES = sorted((ROOT / "docs").glob("*.md"))
DOCUMENTS = [README, ROOT / "ARCHITECTURE.md", ROOT / "CONTRIBUTING.md", *PAGES]

_FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_CODE = re.compile(r"`([\w./-]+)`")
_HEADING = re.compile(r"^#+ (.+?)(?: \{ #(\S+) \})?$", re.MULTILINE)


def prose(page: Path) -> str:
    return _FENCE.sub("", page.read_text(encoding="utf-8"))


def anchors(page: Path) -> set[str]:
    """As Python-Markdown's table of contents, and GitHub, make them."""
    found = set()
    for heading, given in _HEADING.findall(prose(page)):
        plain = re.sub(r"[^\w\s-]", "", heading).strip().lower()
        found.add(given or re.sub(r"[-\s]+", "-", plain))
    return found


def links() -> Iterator[tuple[Path, str]]:
    for page in DOCUMENTS:
        for target in _LINK.findall(prose(page)):
            if not re.match(r"https?://", target):
                yield page, target


def broken(page: Path, target: str) -> str | None:
    name, _, anchor = target.partition("#")
    there = page if not name else (page.parent / name)
    if not there.exists():
        return f"{page.name}: {target} is not there"
    if anchor and anchor not in anchors(there):
        return f"{page.name}: {name or page.name} has no heading #{anchor}"
    return None


def test_every_link_leads_somewhere() -> None:
    found = list(links())
    assert len(found) > 100
    assert [told for page, target in found if (told := broken(page, target))] == []


def test_a_broken_link_is_noticed() -> None:
    assert broken(README, "docs/nothing.md") == "README.md: docs/nothing.md is not there"
    assert broken(README, "docs/plans.md#nothing") is not None
    assert broken(README, "docs/plans.md#two-transformers") is None


def test_every_file_that_is_named_is_there() -> None:
    """Paths of the checkout in code marks: a page that names a file which has moved is wrong."""
    tops = {path.name for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith(".")}
    missing = [
        f"{page.name}: {name}"
        for page in DOCUMENTS
        for name in _CODE.findall(prose(page))
        if "/" in name and name.split("/")[0] in tops - {"out"} and "NAME" not in name
        if not (ROOT / name).exists()
    ]
    assert missing == []


def test_the_readme_is_short_and_begins_with_what_matters() -> None:
    lines = README.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 150
    screen = "\n".join(lines[:25])
    assert "make demo" in screen and "make test" in screen and ".gif)" in screen
    assert "## Will it run on my card?" in screen


def test_every_page_is_reachable_from_the_first() -> None:
    seen, todo = set(), {ROOT / "docs" / "index.md"}
    while todo:
        page = todo.pop()
        seen.add(page)
        named = {(page.parent / t.partition("#")[0]).resolve() for p, t in links() if p == page}
        todo |= {path for path in named if path.suffix == ".md" and path in PAGES} - seen
    assert sorted(seen) == PAGES


def test_the_page_of_commands_is_that_of_the_commands() -> None:
    assert cli.PAGE.read_text(encoding="utf-8") == cli.page(), "run python -m documents.cli"


@pytest.mark.parametrize("name", [n for n in vars(errors) if isinstance(vars(errors)[n], type)])
def test_every_error_has_a_heading_in_troubleshooting(name: str) -> None:
    kind = vars(errors)[name]
    if not issubclass(kind, errors.PenstockError):
        pytest.skip("no error of ours")
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    assert f"### {kind.code}\n\n`{name}`:" in page


def test_the_film_moves_and_is_small() -> None:
    from PIL import Image

    path = ROOT / "docs" / "demo.gif"
    assert path.stat().st_size < 1_500_000
    with Image.open(path) as film:
        assert getattr(film, "n_frames", 1) > 10
