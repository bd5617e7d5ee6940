"""Tables of figures are rendered, or a test holds them; tables that list what the code knows list
all of it."""

from __future__ import annotations

import ast
import re
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from benchmarks import measured, published, render
from penstock.batch import lines
from penstock.batch.results import Result
from penstock.engine.model.grid import Grid
from penstock.engine.request.settings import Settings
from penstock.serve.settings import MIB, Limits
from tests.documents.tables import PageTable, tables

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
WRITTEN = {"cli.md"}
"""Pages that are written whole by a command, which `test_pages` holds."""

_NAME = re.compile(r"`([^`]+)`")


def held(name: str) -> PageTable:
    """The table of a page that names the test of this name as its own."""
    told = f"tests/documents/test_tables.py::{name}"
    (found,) = (t for page in PAGES for t in tables(page.read_text("utf-8")) if t.held_by == told)
    return found


def cells(table: PageTable, column: int) -> str:
    """A column of it, its rows joined."""
    return "\n".join(row.strip("|").split("|")[column] for row in table.rows)


def names(table: PageTable, *columns: int) -> set[str]:
    """What stands in code marks there, word by word."""
    marked = (_NAME.findall(cells(table, column)) for column in columns)
    return {word for each in marked for text in each for word in text.split()}


@pytest.mark.parametrize("page", [p for p in PAGES if p.name not in WRITTEN], ids=lambda p: p.name)
def test_tables_of_figures_are_rendered_or_held(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    typed = [
        f"{page.name}:{table.line}: {table.figures}"
        for table in tables(text)
        if table.figures and not table.rendered and not table.held_by
    ]
    assert typed == [], "render it (benchmarks/render.py), or name the test that holds it"


def test_the_test_that_a_table_names_is_there() -> None:
    claims = [t.held_by for page in PAGES for t in tables(page.read_text("utf-8")) if t.held_by]
    assert len(claims) >= 5
    for claim in claims:
        path, _, name = claim.partition("::")
        assert f"def {name}(" in (ROOT / path).read_text(encoding="utf-8"), claim


def test_a_table_typed_by_hand_is_noticed() -> None:
    page = "| a | b |\n|---|---|\n| Wan2.1 UMT5-XXL `8` [2](x.md#3) | {} |\n"
    (plain,) = tables(page.format("words of T2V-A14B"))
    assert plain.figures == ["2"]  # what a link says is seen, its address is not
    (figures,) = tables(page.format("1,234.5 MB"))
    assert "1,234.5" in figures.figures and not figures.rendered
    marked = f"<!-- measured:x -->\n{page.format('7')}<!-- /measured:x -->\n"
    (rendered,) = tables(marked)
    assert rendered.rendered and "7" in rendered.figures
    (claimed,) = tables(f"<!-- held by: tests/x.py::y -->\n{page.format('7')}")
    assert claimed.held_by == "tests/x.py::y" and claimed.line == 2
    assert list(tables(f"```text\n{page.format('7')}```\n")) == []


def test_a_test_that_says_no_more_what_a_table_tells_is_noticed() -> None:
    row = {"what": "w", "held": "h", "test": "tests/meter.py", "says": ["class StorageMeter"]}
    assert "| w | h | `tests/meter.py` |" in measured.held_by_tests({"held_by_tests": [row]})
    with pytest.raises(ValueError, match=r"tests/meter\.py does not say any more: 1e-99"):
        measured.held_by_tests({"held_by_tests": [row | {"says": ["1e-99"]}]})


def test_figures_of_others_have_their_source_and_day() -> None:
    figures = render.read_results(render.RESULTS)["published_figures"]
    assert len(figures) >= 6
    for figure in figures:
        assert figure["source"].startswith("https://") and figure["said"]
        assert re.fullmatch(r"20\d\d-\d\d-\d\d", figure["date"])


def test_a_figure_of_others_beside_the_plan() -> None:
    figure = {"card": "c", "model": "wan2.1-i2v-14b", "size": "480x832x81", "by": "X", "steps": 40,
              "seconds": [100, 200], "said": "how", "date": "2025-01-01",
              "source": "https://e.org"}  # fmt: skip
    plan = {"way": "default", "card": "c", "size": "480x832x81", "seconds_a_step": 5.0,
            "total": "1:05:00"}  # fmt: skip
    results = {"published_figures": [figure], "plans_cards": [plan], "plans_models": []}
    made = published.beside_ours(results).splitlines()[2]
    assert "| 100 to 200 | 3900 | 19.5 to 39.0 | how ([2025-01-01](https://e.org)) |" in made
    a_step = published.beside_ours(results | {"published_figures": [figure | {"steps": 1}]})
    assert "| 5 | 0.0 to 0.1 |" in a_step
    assert "100 to 200" not in published.beside_ours(results, "8 bits")


def test_the_limits_of_the_server() -> None:
    from penstock.serve.guard import SLOWEST_BYTES_S

    seen, limits = "\n".join(held("test_the_limits_of_the_server").rows), Limits()
    for said in (
        f"`--max-upload` ({limits.body_bytes // MIB} MiB)",
        f"`--max-pixels` ({limits.pixels // 1_000_000} million)",
        f"`--max-waiting` ({limits.waiting})",
        f"more than {limits.connections} connections",
        f"headers that do not come within {limits.header_s:.0f} s",
        f"slower than {SLOWEST_BYTES_S // 1024} KiB/s after {limits.body_s:.0f} s",
        f"not read for {limits.body_s:.0f} s",
        f"headers of more than {limits.header_bytes // 1024} KiB",
    ):
        assert said in seen, said


def test_the_fields_of_the_dialect() -> None:
    from penstock.serve import fields as dialect

    table = held("test_the_fields_of_the_dialect")
    ours = set(dialect.VideoFields.model_fields) | dialect.IGNORED
    assert ours <= names(table, 0)
    assert f"{dialect._LONGEST_PROMPT:,} characters" in cells(table, 3)


def test_the_fields_of_an_answer() -> None:
    from penstock.serve.schemas import VideoBody

    table = held("test_the_fields_of_an_answer")
    theirs = {"file_name", "file_path", "url", "inference_time_s", "peak_memory_mb"}
    assert names(table, 0) - {"{code,", "message}"} == set(VideoBody.model_fields) | theirs


def test_the_routes_of_the_server() -> None:
    """Of the dialect: each is one of ours, but for the one that the table says is not."""
    source = (ROOT / "penstock" / "serve" / "api.py").read_text(encoding="utf-8")
    ours = set(re.findall(r'@router\.(\w+)\(\s*"(/[^"]*|)"', source))
    for row in held("test_the_routes_of_the_server").rows:
        asked, *_, here = row.strip("|").split("|")
        if not (said := _NAME.findall(asked)):
            continue
        method, path = said[0].split()
        route = path.removeprefix("/v1/videos").replace("ID", "{video_id}")
        assert ((method.lower(), route) in ours) is not here.strip().startswith("no"), row


def test_the_events_of_a_video() -> None:
    folder = ROOT / "penstock" / "serve"
    sources = "".join(path.read_text(encoding="utf-8") for path in folder.glob("*.py"))
    published_there = set(re.findall(r'\bEvent\("(\w+)"', sources))
    assert names(held("test_the_events_of_a_video"), 0) == published_there


def test_the_nodes() -> None:
    source = (ROOT / "penstock" / "comfy" / "nodes.py").read_text(encoding="utf-8")
    shown = re.findall(r"\*\*(.+?)\*\*", cells(held("test_the_nodes"), 0))
    assert sorted(shown) == sorted(re.findall(r'display_name="(Penstock [^"]+)"', source))


def test_the_inputs_of_the_node() -> None:
    table = held("test_the_inputs_of_the_node")
    tree = ast.parse((ROOT / "penstock" / "comfy" / "nodes.py").read_text(encoding="utf-8"))
    inputs = {
        call.args[0].value
        for made in ast.walk(tree)
        if isinstance(made, ast.FunctionDef) and made.name == "_request_inputs"
        for call in ast.walk(made)
        if isinstance(call, ast.Call) and call.args and isinstance(call.args[0], ast.Constant)
        if isinstance(call.func, ast.Attribute) and call.func.attr == "Input"
    }
    assert len(inputs) > 20
    assert inputs - {"model"} <= names(table, 0)
    rows = "\n".join(table.rows)
    assert f"0: 81 frames, beyond {Grid.coherent}" in rows


def test_the_fields_of_a_line() -> None:
    table = held("test_the_fields_of_a_line")
    ours = {each.name for each in fields(Settings)} | set(lines._OWN) - {"guidance_low"}
    said = {lines._WORDS.get(name, name) for name in names(table, 0, 1)}
    assert ours - {"guidance_high"} == said - {"guidance_low"}
    assert set(lines._WORDS) <= names(table, 0, 1)


def test_the_fields_of_a_result() -> None:
    assert names(held("test_the_fields_of_a_result"), 0) == {each.name for each in fields(Result)}


def test_the_examples() -> None:
    """Each that the table names is there; those of diffusers and any module have another page."""
    elsewhere = {"attach_pipeline.py", "stream_any_model.py"}
    there = {path.name for path in (ROOT / "examples").glob("*.py")}
    assert names(held("test_the_examples"), 2) == there - elsewhere
    page = (DOCS / "diffusers.md").read_text(encoding="utf-8")
    assert all(name in page for name in elsewhere)


def test_the_extras() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    told = {
        extra
        for name in names(held("test_the_extras"), 0)
        for extra in re.findall(r"penstock\[(\w+)\]", name)
    }
    assert told == set(project["optional-dependencies"])


def test_the_variables_of_the_folders() -> None:
    source = (ROOT / "penstock" / "folders.py").read_text(encoding="utf-8")
    told = {
        name
        for name in names(held("test_the_variables_of_the_folders"), 1)
        if re.fullmatch(r"PENSTOCK_\w+", name)
    }
    assert told == set(re.findall(r'_named\("(\w+)"\)', source))
