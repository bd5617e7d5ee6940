"""The OpenAPI page: plain HTML of this server's own, without a script and without another host."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from html import escape
from typing import Any


def docs_page(openapi: Mapping[str, Any]) -> str:
    """Return all routes with their parameters, bodies and answers."""
    info = openapi["info"]
    parts = [
        "<!doctype html><html lang='en'><meta charset='utf-8'>",
        "<meta name='viewport' content='width=device-width, initial-scale=1'>",
        f"<title>{escape(info['title'])} {escape(info['version'])}</title>",
        f"<h1>{escape(info['title'])} {escape(info['version'])}</h1>",
        f"<p>{escape(info['description'])} As data: <a href='/openapi.json'>/openapi.json</a>.</p>",
    ]
    for path, methods in openapi["paths"].items():
        for method, route in methods.items():
            parts += _route(method, path, route)
    return "\n".join([*parts, "</html>"])


def _route(method: str, path: str, route: Mapping[str, Any]) -> Iterator[str]:
    yield f"<h2><code>{escape(method.upper())} {escape(path)}</code></h2>"
    yield f"<p>{escape(route.get('description', ''))}</p>"
    rows = [
        (each["name"], each["in"], each["schema"], each.get("description", ""))
        for each in route.get("parameters", [])
    ]
    body = route.get("requestBody", {}).get("content", {}).get("application/json", {})
    for name, schema in body.get("schema", {}).get("properties", {}).items():
        rows.append((name, "body", schema, schema.get("description", "")))
    if rows:
        yield "<table><tr><th>name</th><th>in</th><th>type</th><th></th></tr>"
        for name, place, schema, told in rows:
            cells = (name, place, _type(schema), told)
            yield "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>"
        yield "</table>"
    answers = ", ".join(sorted(route.get("responses", {})))
    yield f"<p>Answers: {escape(answers)}</p>"


def _type(schema: Mapping[str, Any]) -> str:
    kinds = schema.get("anyOf", [schema])
    names = [each.get("type", "any") for each in kinds]
    return " or ".join(dict.fromkeys(name for name in names if name != "null"))
