"""The example workflows as a browser loads them, and as ComfyUI's HTTP API takes them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[2] / "comfyui" / "example_workflows"
NAMES = ("image_to_video", "text_to_video", "four_steps", "long_video")

WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")

ANY = "*"

Info = Mapping[str, Any]
"""Of nodes by their types, as ``/object_info`` has it."""


def load(name: str) -> dict[str, Any]:
    """A workflow as its file has it."""
    return dict(json.loads((FOLDER / f"{name}.json").read_text("utf-8")))


def inputs_of(info: Info, kind: str) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Name, type and options of each input of a node, in the order of its widgets."""
    given = info[kind]["input"]
    for name, said in [*given.get("required", {}).items(), *given.get("optional", {}).items()]:
        options = dict(said[1]) if len(said) > 1 else {}
        if isinstance(said[0], list):
            yield name, "COMBO", {"options": said[0], **options}
        else:
            yield name, said[0], options


def widgets_of(node: Mapping[str, Any], info: Info) -> dict[str, Any]:
    """The values of a node's widgets by their inputs' names; none may be left over."""
    values = list(node["widgets_values"])
    found = {}
    for name, kind, options in inputs_of(info, node["type"]):
        if kind in WIDGETS:
            found[name] = values.pop(0)
            if options.get("control_after_generate"):
                assert values.pop(0) in ("fixed", "increment", "decrement", "randomize")
            if options.get("image_upload"):
                assert values.pop(0) == "image"
    assert values == [], node["type"]
    return found


def links_of(node: Mapping[str, Any], workflow: Mapping[str, Any], info: Info) -> dict[str, Any]:
    """What is linked to a node's inputs: the other node's id, and its output; types must agree."""
    types = {name: kind for name, kind, _ in inputs_of(info, node["type"])}
    by_id = {link[0]: link for link in workflow["links"]}
    others = {each["id"]: each for each in workflow["nodes"]}
    found = {}
    for slot, given in enumerate(node["inputs"]):
        assert types[given["name"]] == given["type"]
        if given["link"] is None:
            continue
        _, source, output, target, at, kind = by_id[given["link"]]
        assert (target, at) == (node["id"], slot)
        assert info[others[source]["type"]]["output"][output] == kind
        assert given["type"] in (kind, ANY)
        assert given["link"] in others[source]["outputs"][output]["links"]
        found[given["name"]] = [str(source), output]
    return found


def api_form(workflow: Mapping[str, Any], info: Info) -> dict[str, Any]:
    """What is posted to ``/prompt`` for a workflow."""
    return {
        str(node["id"]): {
            "class_type": node["type"],
            "inputs": widgets_of(node, info) | links_of(node, workflow, info),
        }
        for node in workflow["nodes"]
    }
