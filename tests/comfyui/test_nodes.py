"""What the nodes are and what they ask for; nothing runs here."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from penstock.comfy.asked import options_of, settings_of
from penstock.engine.model.opening import Opening
from penstock.engine.request.settings import Settings
from penstock.profiles.options import Options
from tests.comfyui import workflows
from tests.comfyui.fake import ComfyUI

PACK = workflows.FOLDER.parent

COMFYS_OWN: dict[str, Any] = {
    "LoadImage": {
        "input": {"required": {"image": [["example.png"], {"image_upload": True}]}},
        "output": ["IMAGE", "MASK"],
    },
    "CreateVideo": {
        "input": {
            "required": {"images": ["IMAGE"], "fps": ["FLOAT", {"min": 1.0, "max": 120.0}]},
            "optional": {"audio": ["AUDIO"]},
        },
        "output": ["VIDEO"],
    },
    "PreviewAny": {"input": {"required": {"source": ["*", {}]}}, "output": []},
    "SaveVideo": {
        "input": {
            "required": {
                "video": ["VIDEO"],
                "filename_prefix": ["STRING"],
                "format": ["COMBO", {"options": ["auto", "mp4"]}],
                "codec": ["COMBO", {"options": ["auto", "h264"]}],
            }
        },
        "output": [],
    },
}
"""ComfyUI's nodes that the workflows use, as version 0.3.64 tells of them."""


@pytest.fixture(scope="module")
def info(nodes: ModuleType) -> dict[str, Any]:
    return {node.define_schema().node_id: node.info() for node in nodes.NODES} | COMFYS_OWN


FILES = (
    "transformer",
    "transformer_2",
    "text_encoder",
    "vae",
    "image_encoder",
    "audio_vae",
    "lora",
)


@pytest.mark.parametrize("name", workflows.NAMES)
def test_a_workflow_says_what_the_schemas_ask_for(info: dict[str, Any], name: str) -> None:
    made = workflows.api_form(workflows.load(name), info)
    for node in made.values():
        known = {
            key: (kind, more) for key, kind, more in workflows.inputs_of(info, node["class_type"])
        }
        assert set(info[node["class_type"]]["input"]["required"]) <= node["inputs"].keys()
        for key, value in node["inputs"].items():
            kind, options = known[key]
            if isinstance(value, list) or key in FILES:
                continue  # a link, which was checked; a file of a user's
            if kind == "COMBO":
                assert value in options["options"]
            elif kind in ("INT", "FLOAT"):
                assert type(value) in (int, float)
                assert options.get("min", value) <= value <= options.get("max", value)
            else:
                assert type(value) is {"STRING": str, "BOOLEAN": bool}[kind]
    assert {"PenstockModel", "PenstockGenerate", "SaveVideo"} <= {
        n["class_type"] for n in made.values()
    }


def test_there_are_four_workflows() -> None:
    assert sorted(path.stem for path in workflows.FOLDER.iterdir()) == sorted(workflows.NAMES)


def test_the_pack_is_fit_for_the_registry() -> None:
    if sys.version_info < (3, 11):
        pytest.skip("no tomllib")
    import tomllib

    from penstock._version import __version__

    told = tomllib.loads((PACK / "pyproject.toml").read_text("utf-8"))
    assert told["project"]["version"] == __version__
    assert told["project"]["dependencies"] == ["penstock"]
    assert {"PublisherId", "DisplayName"} <= told["tool"]["comfy"].keys()


def entry(name: str) -> ModuleType:
    """The pack's file, as ComfyUI loads it."""
    spec = importlib.util.spec_from_file_location(name, PACK / "__init__.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_pack_is_one_file_that_leads_to_the_nodes(nodes: ModuleType, comfyui: ComfyUI) -> None:
    found = entry("as_comfyui_names_it")
    assert not hasattr(found, "NODE_CLASS_MAPPINGS")
    unload = comfyui.memory.unload_all_models
    try:
        extension = asyncio.run(found.comfy_entrypoint())
        assert asyncio.run(extension.get_node_list()) == list(nodes.NODES)
        comfyui.memory.unload_all_models()
        assert comfyui.memory.freed > 0
    finally:
        comfyui.memory.unload_all_models = unload


def test_a_comfyui_without_v3_is_told_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "comfy_api", SimpleNamespace(__path__=[]))
    monkeypatch.setitem(sys.modules, "comfy_api.latest", SimpleNamespace())
    assert entry("old").NODE_CLASS_MAPPINGS == {}
    assert "update ComfyUI" in caplog.text


def test_a_python_without_penstock_is_told_so(
    comfyui: ComfyUI, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "penstock" else real(name)
    )
    assert entry("alone").NODE_CLASS_MAPPINGS == {}
    assert "-m pip install penstock" in caplog.text


def test_a_model_is_its_files(nodes: ModuleType, comfyui: ComfyUI, tmp_path: Path) -> None:
    models = Path(comfyui.folders.get_folder_paths("diffusion_models")[0]).parent
    shown = models / "diffusion_models" / "a.safetensors"
    hidden = models / "diffusion_models" / "sub" / "b.gguf"
    lora = models / "loras" / "l.safetensors"
    hidden.parent.mkdir()
    for each in (shown, hidden, lora):
        each.write_bytes(b"x")
    options = nodes.PenstockModel.info()["input"]["required"]["transformer"][1]["options"]
    assert options == ["none", "a.safetensors", str(Path("sub", "b.gguf"))]
    chosen = {"transformer": "a.safetensors", "transformer_2": options[2], "vae": "none"}
    (model,) = nodes.PenstockModel.execute(tokenizer=" t ", **chosen).args
    assert model["files"] == {
        "transformer": str(shown), "transformer_2": str(hidden), "tokenizer": "t",
    }  # fmt: skip
    (with_one,) = nodes.PenstockLora.execute(model, "l.safetensors", 0.5).args
    (with_two,) = nodes.PenstockLora.execute(with_one, "l.safetensors", 1.0, "high").args
    assert model["loras"] == []
    (unchanged,) = nodes.PenstockLora.execute(with_two, "none", 1.0).args
    assert unchanged is with_two
    opening = Opening.from_values(json.loads(json.dumps(with_two)))
    assert [(each.strength, each.expert) for each in opening.loras] == [(0.5, None), (1.0, "high")]
    before = nodes.PenstockModel.fingerprint_inputs(**chosen)
    assert nodes.PenstockModel.fingerprint_inputs(**chosen) == before
    shown.write_bytes(b"another")
    assert nodes.PenstockModel.fingerprint_inputs(**chosen) != before
    assert nodes.PenstockModel.fingerprint_inputs(transformer=None, folder=None) == []
    hidden.unlink()
    with pytest.raises(FileNotFoundError, match="diffusion_models"):
        nodes.PenstockModel.execute(**chosen)


def test_a_model_without_anything_is_refused(nodes: ModuleType) -> None:
    with pytest.raises(nodes.PenstockFailed, match="choose a transformer"):
        nodes.PenstockModel.execute(transformer="none")
    (model,) = nodes.PenstockModel.execute(transformer="none", folder="/a/folder").args
    assert model == {"model": "/a/folder", "files": {}, "loras": []}


def test_zeros_and_first_words_are_gaps(nodes: ModuleType) -> None:
    kinds = nodes.PenstockGenerate.info()["input"]
    untouched = {
        name: said[1]["default"]
        for name, said in (kinds["required"] | kinds["optional"]).items()
        if "default" in said[1]
    }
    files = {"image": None, "last_image": None, "after": None}
    said = settings_of(untouched | {"prompt": "p"}, files)
    assert said == {"prompt": "p", "seed": 0}
    assert options_of(untouched) == {}


def test_what_is_said_arrives(nodes: ModuleType) -> None:
    given = {
        "prompt": "p", "seed": 1, "negative": "n", "width": 64, "height": 32, "frames": 5,
        "steps": 3, "cfg": 2.0, "cfg_high": 3.0, "cfg_interval": "0.3,0.9", "shift": 4.0,
        "sampler": "euler", "distilled": True, "nag": 5.0, "fit": "pad", "fps": 24.0,
        "window": 9, "overlap": 4,
    }  # fmt: skip
    path = Path("a.png")
    files = {"image": path, "last_image": path, "after": path}
    said = settings_of(given, files) | files
    assert Settings(**said) == Settings(
        prompt="p", seed=1, negative_prompt="n", size="64x32", frames=5, steps=3,
        guidance_scale=2.0, guidance_high=3.0, cfg_interval="0.3,0.9", shift=4.0, sampler="euler",
        distilled=True, nag_scale=5.0, fit="pad", fps=24.0, window=9, overlap=4,
        image=path, last_image=path, after=path,
    )  # fmt: skip
    options = {
        "profile": "p", "vram": "1GiB", "ram": "2GiB", "cache": "plan:3", "attention": "int8",
        "device": "cpu",
    }  # fmt: skip
    assert Options(**options_of(options)).step_cache == "plan:3"
    assert len(options_of(options)) == len(options)


def test_frames_that_are_linked_and_not_asked_for_are_refused_before_anything_runs(
    nodes: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    linked = {"4": {"inputs": {"images": ["3", 0]}}}
    hidden = SimpleNamespace(unique_id="3", prompt=linked)
    monkeypatch.setattr(nodes.PenstockGenerate, "hidden", hidden)
    with pytest.raises(nodes.PenstockFailed, match="VIDEO and IMAGE"):
        nodes.PenstockGenerate.execute({"model": "m"}, prompt="p", seed=0)
    assert nodes.WORKER.pid is None
