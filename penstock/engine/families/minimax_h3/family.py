"""MiniMax-H3 as a family: what the engine is told of it (`penstock.engine.family.protocol`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from penstock.engine.families.minimax_h3.builtin import BUILTIN
from penstock.engine.families.minimax_h3.config import SCHEDULER
from penstock.engine.families.minimax_h3.keys import stranger
from penstock.engine.families.minimax_h3.kinds import KINDS
from penstock.engine.families.minimax_h3.model import H3Model, components, manifest_of, streamed
from penstock.engine.families.minimax_h3.text.patches import PROCESSOR
from penstock.engine.family.protocol import Config
from penstock.errors import CheckpointError
from penstock.profiles.phases import Manifest

NAME = "minimax-h3"
MODEL = H3Model
manifest = manifest_of
IMAGE_PROCESSOR: Config = PROCESSOR

__all__ = [
    "IMAGE_PROCESSOR", "KINDS", "MODEL", "NAME", "SCHEDULER", "build", "builtins", "check_pipeline",
    "check_together", "components", "manifest", "needed", "pipeline", "streamed", "stranger",
    "work",
]  # fmt: skip

PIPELINE = "MiniMaxH3ModularPipeline"


def check_pipeline(folder: Path, index: Config) -> None:
    """Refuse an index of another pipeline.

    Raises:
        CheckpointError: not MiniMax-H3.
    """
    if index.get("_class_name") != PIPELINE:
        raise CheckpointError(
            f"{folder} holds another kind of model",
            expected=PIPELINE,
            found=str(index.get("_class_name")),
        )


def check_together(origin: str, configs: Mapping[str, Config]) -> None:
    """Refuse networks of different models: their widths meet, or they do not belong together.

    Raises:
        CheckpointError: names the two, and the sizes that differ.
    """
    from penstock.engine.families.minimax_h3.text.config import width_of

    streamed = configs["transformer"]
    pairs = (
        ("text_encoder", "hidden_size", width_of(configs["text_encoder"]), "text_dim"),
        ("vae", "latent_channels", configs["vae"]["latent_channels"], "in_channels"),
        ("audio_vae", "latent_channels", configs["audio_vae"]["latent_channels"],
         "audio_in_channels"),
    )  # fmt: skip
    for name, entry, found, wanted in pairs:
        if found != streamed[wanted]:
            raise CheckpointError(
                f"the {name.replace('_', ' ')} and the transformer of {origin} are of two models",
                expected=f"{entry} {streamed[wanted]}, the transformer's {wanted}",
                found=str(found),
                remedy=f"Give the {name.replace('_', ' ')} that belongs to this transformer.",
            )


def needed(config: Config) -> Iterator[str]:
    """Yield the text encoder and both VAEs."""
    yield "text_encoder"
    yield "vae"
    yield "audio_vae"


def pipeline(configs: Mapping[str, Config]) -> str:
    """Return diffusers' class for the model."""
    return PIPELINE


def adapted_title(width: int | None, blocks: int, pictured: bool) -> str:
    """As `penstock.engine.family.protocol.Family.adapted_title`."""
    return "MiniMax-H3"


def build(component: str, config: Config) -> tuple[Any, Any]:
    """Build the network on the meta device with one block, and that block (None: it has none)."""
    from penstock.engine.families.minimax_h3.networks import build as make

    return make(component, config)


def work() -> Any:
    """Return how the phases of a job run."""
    from penstock.engine.families.minimax_h3.work import WORK

    return WORK


def claims(pipe: Any) -> bool:
    """Return whether a diffusers pipeline is run with parts of this family: none is, its modules
    are streamed as any others."""
    return False


def has_parts_for(model: H3Model) -> bool:
    """None: its pipeline keeps its own networks."""
    return False


def samples() -> Any:
    """Return what `penstock doctor` measures: Wan's serves for all."""
    return None


def synthetics() -> Any:
    """Return the models of true shapes that `penstock bench` makes on the spot, by name."""
    from penstock.engine.families.minimax_h3.synthetic import SYNTHETIC

    return SYNTHETIC


def builtins() -> Mapping[str, Callable[[str], Manifest]]:
    """Return the descriptions of true models without their files."""
    return BUILTIN
