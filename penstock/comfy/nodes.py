"""The nodes, for ComfyUI's V3 API. They compute nothing: what a node asks for, the worker does."""

from __future__ import annotations

import atexit
import base64
import io as bytes_io
import logging
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import comfy.model_management as memory
import folder_paths
from comfy.utils import ProgressBar
from comfy_api.latest import ComfyExtension, InputImpl, io, ui
from comfy_execution.graph import ExecutionBlocker
from server import PromptServer

from penstock.comfy.asked import AUTO, MODELS_OWN, options_of, settings_of
from penstock.comfy.choices import choices, path_of, stamp
from penstock.comfy.order import MAKE, PLAN, RESUME, NodeOrder
from penstock.comfy.pictures import drop, mapped, picture_file
from penstock.comfy.process import Interrupted, Message, Process, WorkerDied
from penstock.engine.request.generation import FITS, MAX_SEED, MAX_STEPS, SAMPLERS
from penstock.engine.run.jobs import list_jobs
from penstock.errors import StorageError
from penstock.profiles.options import DEVICES
from penstock.profiles.profile import names as profiles
from penstock.serve.order import COMPLETED, FAILED

log = logging.getLogger(__name__)

CATEGORY = "penstock"
MODEL = "PENSTOCK_MODEL"
NEWEST = "newest unfinished"
PARTS = ("transformer", "transformer_2", "text_encoder", "vae", "image_encoder", "audio_vae")
EXPERTS = ("by its name", "both", "high", "low")

_PREVIEW_SIDE = 512
_PERCENT = 100
INTERNAL = "internal"
"""The code of an error that nobody raised on purpose (`penstock.serve.order.error_values`)."""

_ALL = 1e30
"""Bytes that ComfyUI takes for all that there are."""
_MOST_SIDE, _MOST_FRAMES = 8192, 100_000

WORKER = Process()
"""The one of this ComfyUI. Nodes are classes that ComfyUI copies and locks: they hold nothing."""


_NO_IMAGES = (
    "IMAGE frames are linked, and the node makes the video alone: switch its `images` to VIDEO and "
    "IMAGE. They are fp32, and take 0.83 GiB for 81 of 1280x720."
)


class PenstockFailed(RuntimeError):
    """Why a node cannot do what it was asked for, and what to do next."""


class Watch:
    """What a user sees of an order while it is done, and whether they have had enough.

    Args:
        node: the id of the node, for the text beneath it.
    """

    def __init__(self, node: str | None) -> None:
        self._node, self._bar = node, ProgressBar(_PERCENT)
        self._stopped = False
        self.job: str | None = None
        self.plan = ""

    def hear(self, message: Message) -> None:
        """Show what the worker tells."""
        if message["event"] == "job":
            self.job, self.plan = message["name"], message["plan"]
        elif message["event"] == "notice":
            log.info("penstock: %s", message["message"])
        else:
            self._progress(message)

    def _progress(self, message: Message) -> None:
        self.say(
            f"{message['phase']}: {message['unit']} {message['step']} of {message['total']}, "
            f"about {_clock(message['eta_s'])} left"
        )
        shown = message["preview"]
        preview = None if shown is None else ("JPEG", _picture(shown), _PREVIEW_SIDE)
        try:
            self._bar.update_absolute(message["progress"], _PERCENT, preview)
        except memory.InterruptProcessingException:
            self._stopped = True

    def interrupted(self) -> bool:
        """Return whether the user has interrupted since this was asked last."""
        stopped, self._stopped = self._stopped, False
        try:
            memory.throw_exception_if_processing_interrupted()
        except memory.InterruptProcessingException:
            return True
        return stopped

    def say(self, text: str) -> None:
        """Show a text beneath the node."""
        if self._node is not None:
            PromptServer.instance.send_progress_text(text, self._node)


def _picture(encoded: str) -> Any:
    from PIL import Image

    return Image.open(bytes_io.BytesIO(base64.b64decode(encoded)))


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _done(order: NodeOrder, watch: Watch) -> Message:
    """Return how an order ended, if well.

    Raises:
        PenstockFailed: it failed, or the worker died of it.
        InterruptProcessingException: the user has interrupted.
    """
    try:
        ended = WORKER.do(order, watch.hear, watch.interrupted)
    except WorkerDied as error:
        raise PenstockFailed(
            f"penstock's worker {error}. {_kept(watch)}Signal 9 mostly means that this machine ran "
            "out of memory: lower the RAM budget. What it said last is on ComfyUI's console."
        ) from error
    except Interrupted:
        ended = {}
    if ended.get("state") == COMPLETED:
        return ended
    if ended.get("state") == FAILED:
        raise PenstockFailed(f"{_why(ended['error'])} {_kept(watch)}".strip())
    told = _kept(watch)
    log.info("penstock: interrupted. %s", told)
    watch.say(told)
    raise memory.InterruptProcessingException


def _why(error: Mapping[str, Any]) -> str:
    if error["code"] != INTERNAL:
        return str(error["message"])
    return "Something unexpected went wrong in penstock's worker: ComfyUI's console says what."


def _kept(watch: Watch) -> str:
    if watch.job is None:
        return ""
    return (
        f"The job is kept as {watch.job}: queue the same again, or let Penstock Resume go on with "
        "it. "
    )


def _scratch() -> Path:
    folder = Path(folder_paths.get_temp_directory()) / "penstock"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _make(order: Mapping[str, Any], images: bool, hidden: Any) -> Any:
    """Have a video made, with ComfyUI's own models out of the way.

    Args:
        order: what is asked for.
        images: IMAGE frames too.
        hidden: the node's id, and the prompt that it stands in.
    """
    node = hidden.unique_id
    if not images and _is_linked(hidden.prompt or {}, node):
        raise PenstockFailed(_NO_IMAGES)
    name = secrets.token_hex(8)
    video, frames = _scratch() / f"{name}.mp4", _scratch() / f"{name}.fp32"
    watch = Watch(node)
    _make_room()
    try:
        ended = _done(
            NodeOrder(name, video=str(video), frames=str(frames) if images else None, **order),
            watch,
        )
        handed = mapped(frames, ended["shape"]) if images else ExecutionBlocker(_NO_IMAGES)
    finally:
        drop(frames)
    took = f"took {ended['report']['seconds']:.1f} s\n\n{watch.plan}"
    return io.NodeOutput(handed, InputImpl.VideoFromFile(str(video)), took)


def _is_linked(prompt: Mapping[str, Any], node: str) -> bool:
    """Return whether anything takes the frames, which are the node's first output."""
    values = (value for each in prompt.values() for value in each.get("inputs", {}).values())
    return any(isinstance(value, list) and value == [node, 0] for value in values)


def _make_room() -> None:
    """As `unload_all_models`, which would end the worker as well (`_rest_with_the_models`)."""
    memory.free_memory(_ALL, memory.get_torch_device())
    memory.soft_empty_cache()


def _files(inputs: Mapping[str, Any]) -> dict[str, Path | None]:
    start, end, after = (inputs.get(name) for name in ("start_image", "end_image", "after"))
    return {
        "image": None if start is None else picture_file(start, _scratch()),
        "last_image": None if end is None else picture_file(end, _scratch()),
        "after": None if after is None else _video_file(after),
    }


def _video_file(video: Any) -> Path:
    """Return where a VIDEO lies as a file; one that is none yet becomes one."""
    source = video.get_stream_source()
    if isinstance(source, str):
        return Path(source)
    path = _scratch() / f"{secrets.token_hex(8)}.mp4"
    video.save_to(str(path))
    return path


def _request_inputs() -> list[Any]:
    """Return the inputs of Plan and Generate alike."""
    return [
        io.Custom(MODEL).Input("model", tooltip="From Penstock Model."),
        io.String.Input("prompt", multiline=True, default="", tooltip="What should happen."),
        io.String.Input(
            "negative", multiline=True, default="", optional=True,
            tooltip="What to avoid; empty: the model's own.",
        ),
        io.Image.Input("start_image", optional=True, tooltip="The picture to start from."),
        io.Image.Input("end_image", optional=True, tooltip="The picture to end with."),
        io.Video.Input(
            "after", optional=True,
            tooltip="A video to go on from: its last frame, its size, and its settings where none "
            "are given here. It comes first in the new one.",
        ),
        io.Int.Input(
            "width", default=0, min=0, max=_MOST_SIDE, step=16, optional=True,
            tooltip="Pixels; both 0: the model's own area in the picture's aspect.",
        ),
        io.Int.Input("height", default=0, min=0, max=_MOST_SIDE, step=16, optional=True),
        io.Int.Input(
            "frames", default=0, min=0, max=_MOST_FRAMES, optional=True,
            tooltip="0: the model's own. Most models take 4n+1.",
        ),
        io.Int.Input(
            "steps", default=0, min=0, max=MAX_STEPS, optional=True, tooltip="0: the model's own."
        ),
        io.Float.Input(
            "cfg", default=0.0, min=0.0, max=100.0, step=0.1, optional=True,
            tooltip="Guidance scale; 0: the model's own, 1: none, which halves the time.",
        ),
        io.Float.Input(
            "cfg_high", default=0.0, min=0.0, max=100.0, step=0.1, optional=True,
            tooltip="Of a pair's transformer for much noise; 0: as cfg, or the model's own.",
        ),
        io.String.Input(
            "cfg_interval", default="", optional=True,
            tooltip='Guidance at some noise levels alone, such as "0.3,0.9"; empty: at all.',
        ),
        io.Float.Input(
            "shift", default=0.0, min=0.0, max=100.0, step=0.1, optional=True,
            tooltip="Flow shift of the noise levels; 0: the model's own for this size.",
        ),
        io.Int.Input(
            "seed", default=0, min=0, max=MAX_SEED, control_after_generate=True,
        ),
        io.Combo.Input(
            "sampler", options=[MODELS_OWN, *SAMPLERS], default=MODELS_OWN, optional=True
        ),
        io.Boolean.Input(
            "distilled", default=False, optional=True,
            tooltip="For models or LoRAs distilled to four steps: steps, cfg, shift and sampler "
            "follow where none are given.",
        ),
        io.Float.Input(
            "nag", default=0.0, min=0.0, max=100.0, step=0.5, optional=True,
            tooltip="A negative prompt without guidance, such as 5; 0: off.",
        ),
        io.Combo.Input(
            "fit", options=[MODELS_OWN, *FITS], default=MODELS_OWN, optional=True,
            tooltip="What is done with a picture of another aspect.",
        ),
        io.Float.Input(
            "fps", default=0.0, min=0.0, max=240.0, step=0.001, optional=True,
            tooltip="Of the file; 0: the model's own.",
        ),
        io.Int.Input(
            "window", default=0, min=0, max=_MOST_FRAMES, optional=True,
            tooltip="A long video is denoised in windows of so many frames; 0: 81 where it needs "
            "them.",
        ),
        io.Int.Input("overlap", default=0, min=0, max=_MOST_FRAMES, optional=True),
        io.Combo.Input(
            "profile", options=[AUTO, *(name for name in profiles() if name != AUTO)],
            default=AUTO, optional=True, tooltip="Budgets by name; auto: what is free here.",
        ),
        *_budget_inputs(),
        io.String.Input(
            "cache", default="", optional=True,
            tooltip="Steps are skipped: budget, budget:0.001 or plan:N (N are computed); empty: "
            "none are.",
        ),
        io.Combo.Input(
            "attention", options=[AUTO, "sdpa", "int8"], default=AUTO, optional=True,
            tooltip="int8: self-attention in 8 bits, where comfy-kitchen is installed.",
        ),
    ]  # fmt: skip


def _budget_inputs() -> list[Any]:
    return [
        io.String.Input(
            "vram", default="", optional=True,
            tooltip='Ceiling on VRAM, such as "10GiB"; empty: what is free.',
        ),
        io.String.Input(
            "ram", default="", optional=True,
            tooltip='Ceiling on RAM for buffers, such as "24GiB"; empty: what is free.',
        ),
        io.Combo.Input("device", options=list(DEVICES), default=DEVICES[0], optional=True),
    ]  # fmt: skip


def _images_input() -> Any:
    return io.Boolean.Input(
        "images", default=False, optional=True, label_on="VIDEO and IMAGE", label_off="VIDEO alone",
        tooltip="IMAGE frames are fp32: 81 of 1280x720 take 0.83 GiB. VIDEO alone makes none.",
    )  # fmt: skip


def _video_outputs() -> list[Any]:
    return [
        io.Image.Output("made_images", display_name="IMAGE"),
        io.Video.Output("made_video", display_name="VIDEO"),
        io.String.Output("report", display_name="report"),
    ]


class PenstockModel(io.ComfyNode):
    """A model, named by its files or its folder. Nothing of it is read."""

    @classmethod
    def define_schema(cls) -> Any:
        """As ComfyUI asks for it."""
        return io.Schema(
            node_id="PenstockModel",
            display_name="Penstock Model",
            category=CATEGORY,
            description="A model by its files, or by the folder that holds them.",
            inputs=[
                io.Combo.Input("transformer", options=choices("transformer")),
                io.Combo.Input(
                    "transformer_2", options=choices("transformer_2"), optional=True,
                    tooltip="Of a pair (Wan2.2 A14B) the one for little noise.",
                ),
                io.Combo.Input("text_encoder", options=choices("text_encoder"), optional=True),
                io.Combo.Input("vae", options=choices("vae"), optional=True),
                io.Combo.Input(
                    "image_encoder", options=choices("image_encoder"), optional=True,
                    tooltip="CLIP vision, where the model has one (Wan2.1 I2V).",
                ),
                io.Combo.Input(
                    "audio_vae", options=choices("audio_vae"), optional=True,
                    tooltip="Where the model makes sound.",
                ),
                io.String.Input(
                    "tokenizer", default="", optional=True,
                    tooltip="A folder or a SentencePiece file, where the text encoder's file holds "
                    "no tokenizer.",
                ),
                io.String.Input(
                    "folder", default="", optional=True,
                    tooltip="A folder of diffusers or penstock, or a hub id: has what is not "
                    "chosen above.",
                ),
            ],
            outputs=[io.Custom(MODEL).Output("model", display_name="model")],
        )  # fmt: skip

    @classmethod
    def fingerprint_inputs(cls, tokenizer: str = "", folder: str = "", **chosen: str) -> Any:
        """Return another value where a file of that name is another."""
        return [stamp(path) for path in _parts(chosen).values()]

    @classmethod
    def execute(cls, tokenizer: str = "", folder: str = "", **chosen: str) -> Any:
        """Name the files."""
        files = {name: str(path) for name, path in _parts(chosen).items()}
        if tokenizer.strip():
            files["tokenizer"] = tokenizer.strip()
        if not folder.strip() and "transformer" not in files:
            raise PenstockFailed("no model: choose a transformer, or name a folder")
        return io.NodeOutput({"model": folder.strip() or None, "files": files, "loras": []})


def _parts(chosen: Mapping[str, str]) -> dict[str, Path]:
    paths = {name: path_of(name, chosen.get(name)) for name in PARTS}
    return {name: path for name, path in paths.items() if path is not None}


class PenstockLora(io.ComfyNode):
    """A LoRA more."""

    @classmethod
    def define_schema(cls) -> Any:
        """As ComfyUI asks for it."""
        return io.Schema(
            node_id="PenstockLora",
            display_name="Penstock LoRA",
            category=CATEGORY,
            description="Applies a LoRA beside the weights. Several are chained.",
            inputs=[
                io.Custom(MODEL).Input("model"),
                io.Combo.Input("lora", options=choices("lora")),
                io.Float.Input(
                    "strength", default=1.0, min=-20.0, max=20.0, step=0.01,
                    tooltip="1 is as trained.",
                ),
                io.Combo.Input(
                    "expert", options=list(EXPERTS), default=EXPERTS[0], optional=True,
                    tooltip="Of a pair of transformers the one that it is for.",
                ),
            ],
            outputs=[io.Custom(MODEL).Output("with_lora", display_name="model")],
        )  # fmt: skip

    @classmethod
    def fingerprint_inputs(cls, lora: str, **rest: Any) -> Any:
        """Return another value where the file of that name is another."""
        path = path_of("lora", lora)
        return None if path is None else stamp(path)

    @classmethod
    def execute(
        cls, model: Mapping[str, Any], lora: str, strength: float, expert: str = EXPERTS[0]
    ) -> Any:
        """Name the file too."""
        path = path_of("lora", lora)
        if path is None:
            return io.NodeOutput(model)
        named = [] if expert == EXPERTS[0] else [expert]
        more = [str(path), strength, *named]
        return io.NodeOutput({**model, "loras": [*model["loras"], more]})


class PenstockPlan(io.ComfyNode):
    """What a video takes, before anything is loaded."""

    @classmethod
    def define_schema(cls) -> Any:
        """As ComfyUI asks for it."""
        return io.Schema(
            node_id="PenstockPlan",
            display_name="Penstock Plan",
            category=CATEGORY,
            description="Phases, GiB and minutes of a video, and whether it fits. Loads nothing.",
            inputs=_request_inputs(),
            outputs=[
                io.String.Output("plan", display_name="plan"),
                io.Boolean.Output("fits", display_name="fits"),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, model: Mapping[str, Any], **inputs: Any) -> Any:
        """Plan in the worker."""
        order = NodeOrder(secrets.token_hex(8), PLAN, **_asked(model, inputs))
        watch = Watch(cls.hidden.unique_id)
        ended = _done(order, watch)
        watch.say(ended["text"])
        return io.NodeOutput(ended["text"], ended["fits"], ui=ui.PreviewText(ended["text"]))


def _asked(model: Mapping[str, Any], inputs: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "model": model,
        "options": options_of(inputs),
        "settings": settings_of(inputs, _files(inputs)),
    }


class PenstockGenerate(io.ComfyNode):
    """A video."""

    @classmethod
    def define_schema(cls) -> Any:
        """As ComfyUI asks for it."""
        return io.Schema(
            node_id="PenstockGenerate",
            display_name="Penstock Generate",
            category=CATEGORY,
            description="Makes a video under budgets of VRAM and RAM. What an interrupt stops goes "
            "on when the same is queued again.",
            inputs=[*_request_inputs(), _images_input()],
            outputs=_video_outputs(),
            hidden=[io.Hidden.unique_id, io.Hidden.prompt],
        )

    @classmethod
    def execute(cls, model: Mapping[str, Any], images: bool = False, **inputs: Any) -> Any:
        """Have it made."""
        order = {"do": MAKE, **_asked(model, inputs)}
        return _make(order, images, cls.hidden)


class PenstockResume(io.ComfyNode):
    """The rest of a video."""

    @classmethod
    def define_schema(cls) -> Any:
        """As ComfyUI asks for it."""
        return io.Schema(
            node_id="PenstockResume",
            display_name="Penstock Resume",
            category=CATEGORY,
            description="Goes on with a job that was interrupted, or whose machine was switched "
            "off; those of `penstock generate` too.",
            inputs=[
                io.Combo.Input("job", options=[NEWEST, *_unfinished()], default=NEWEST),
                *_budget_inputs(),
                _images_input(),
            ],
            outputs=_video_outputs(),
            hidden=[io.Hidden.unique_id, io.Hidden.prompt],
        )

    @classmethod
    def validate_inputs(cls, job: str) -> bool | str:
        """Any name may be asked for: of a job that is done, ComfyUI may have the result still."""
        return bool(job) or "name a job"

    @classmethod
    def fingerprint_inputs(cls, job: str, **rest: Any) -> Any:
        """Return another value where the newest job is another."""
        return job if job != NEWEST else _unfinished()[:1]

    @classmethod
    def execute(cls, job: str, images: bool = False, **inputs: Any) -> Any:
        """Have it made."""
        order = {
            "do": RESUME,
            "job": None if job == NEWEST else job,
            "options": options_of(inputs),
        }
        return _make(order, images, cls.hidden)


def _unfinished() -> list[str]:
    """Return the names of jobs that can go on, the newest first."""
    try:
        return [info.name for info in list_jobs() if info.unfinished]
    except StorageError as error:
        log.warning("penstock: the jobs cannot be listed: %s", error)
        return []


NODES = (PenstockModel, PenstockLora, PenstockPlan, PenstockGenerate, PenstockResume)


class PenstockExtension(ComfyExtension):
    """The pack."""

    async def get_node_list(self) -> list[Any]:
        """Return its nodes."""
        return list(NODES)


async def comfy_entrypoint() -> PenstockExtension:
    """Return where ComfyUI enters."""
    _rest_with_the_models()
    atexit.register(WORKER.rest)
    return PenstockExtension()


def _rest_with_the_models() -> None:
    """Let the worker go when ComfyUI unloads its models: its free-memory request tells nobody else.
    While a job runs (which unloads them first) the worker stays."""
    unload = memory.unload_all_models

    def unload_all_models() -> None:
        unload()
        WORKER.rest()

    memory.unload_all_models = unload_all_models
