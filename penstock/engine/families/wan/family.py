"""Wan as a family: what the engine is told of it (`penstock.engine.family.protocol`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from penstock.engine.families.wan import config as configs_of
from penstock.engine.families.wan.builtin import BUILTIN
from penstock.engine.families.wan.kinds import KINDS
from penstock.engine.families.wan.model import WanModel, components, manifest_of, streamed
from penstock.engine.families.wan.strangers import stranger
from penstock.engine.family.protocol import Config
from penstock.errors import CheckpointError
from penstock.profiles.phases import Manifest

NAME = "wan"
MODEL = WanModel
manifest = manifest_of
SCHEDULER: Config = configs_of.UNIPC
IMAGE_PROCESSOR: Config = configs_of.IMAGE_PROCESSOR
adapted_title = configs_of.adapted_title

__all__ = [
    "IMAGE_PROCESSOR", "KINDS", "MODEL", "NAME", "SCHEDULER", "build", "builtins", "check_pipeline",
    "check_together", "components", "manifest", "needed", "pipeline", "streamed", "stranger",
    "work",
]  # fmt: skip

_PIPELINES = ("WanImageToVideoPipeline", "WanPipeline")


def check_pipeline(folder: Path, index: Config) -> None:
    """Refuse a ``model_index.json`` of another pipeline.

    Raises:
        CheckpointError: not Wan2.1.
    """
    if index.get("_class_name") not in _PIPELINES:
        raise CheckpointError(
            f"{folder} holds another kind of model",
            expected=" or ".join(_PIPELINES),
            found=str(index.get("_class_name")),
        )


def check_together(origin: str, configs: Mapping[str, Config]) -> None:
    """Refuse networks of different models: their widths meet, or they do not belong together.

    Raises:
        CheckpointError: names the two, and the sizes that differ.
    """
    streamed = configs["transformer"]
    pairs = [
        ("text_encoder", "d_model", configs["text_encoder"]["d_model"], "text_dim"),
        ("vae", "z_dim", configs["vae"]["z_dim"], "out_channels"),
    ]
    if "transformer_2" in configs:
        _check_alike(origin, streamed, configs["transformer_2"])
    if "image_encoder" in configs:
        width = configs["image_encoder"]["hidden_size"]
        pairs.append(("image_encoder", "hidden_size", width, "image_dim"))
        _check_places(origin, streamed, configs["image_encoder"])
    for name, entry, found, wanted in pairs:
        if found != streamed[wanted]:
            raise CheckpointError(
                f"the {name.replace('_', ' ')} and the transformer of {origin} are of two models",
                expected=f"{entry} {streamed[wanted]}, the transformer's {wanted}",
                found=str(found),
                remedy=f"Give the {name.replace('_', ' ')} that belongs to this transformer.",
            )


def _check_alike(origin: str, first: Config, second: Config) -> None:
    """Refuse two transformers that cannot go on from one another's latents."""
    for entry in ("in_channels", "out_channels", "patch_size", "text_dim", "image_dim"):
        one, other = first[entry], second[entry]
        if (list(one) if entry == "patch_size" else one) != (
            list(other) if entry == "patch_size" else other
        ):
            raise CheckpointError(
                f"the two transformers of {origin} are of two models",
                expected=f"{entry} {one} in both",
                found=str(other),
                remedy="Give the ones for high and for low noise of one model.",
            )


def _check_places(origin: str, streamed: Config, encoder: Config) -> None:
    """Refuse a model of two pictures whose encoder gives another number of tokens for them."""
    places = streamed["pos_embed_seq_len"]
    tokens = 2 * ((encoder["image_size"] // encoder["patch_size"]) ** 2 + 1)
    if places not in (None, tokens):
        raise CheckpointError(
            f"the image encoder and the transformer of {origin} are of two models",
            expected=f"{places} tokens of two pictures, the transformer's pos_embed_seq_len",
            found=str(tokens),
            remedy="Give the image encoder that belongs to this transformer.",
        )


def needed(config: Config) -> Iterator[str]:
    """Yield the text encoder, the VAE, for a picture's model the image encoder; and where it has
    none the other transformer."""
    yield "text_encoder"
    yield "vae"
    if config.get("image_dim") is not None:
        yield "image_encoder"
    elif configs_of.wants_picture(config):
        yield "transformer_2"


def pipeline(configs: Mapping[str, Config]) -> str:
    """Return diffusers' class for a model of networks with these configs."""
    pictured = configs_of.wants_picture({**configs_of.TRANSFORMER, **configs["transformer"]})
    return "WanImageToVideoPipeline" if pictured else "WanPipeline"


def build(component: str, config: Config) -> tuple[Any, Any]:
    """Build the network on the meta device with one block, and that block (None: it has none)."""
    from penstock.engine.families.wan.networks import build as make

    return make(component, config)


def work() -> Any:
    """Return how the phases of a job run."""
    from penstock.engine.families.wan.work import WORK

    return WORK


def claims(pipe: Any) -> bool:
    """Return whether a diffusers pipeline is one of Wan 2.1."""
    from penstock.engine.families.wan.attach.checks import is_wan21

    return is_wan21(pipe)


def attachable(pipe: Any) -> None:
    """Refuse a pipeline that penstock does not run as diffusers does.

    Raises:
        UsageError: names the reason.
    """
    from penstock.engine.families.wan.attach.checks import check_pipeline as check

    check(pipe)


def has_parts_for(model: WanModel) -> bool:
    """Return whether those parts make diffusers' pipeline of a model: Wan2.1's of one picture or
    none."""
    manifest = model.manifest
    return not (manifest.second or manifest.tokenwise or manifest.transformer.pos_embed)


def attach_parts() -> Any:
    """Return what stands in the place of each network of a diffusers pipeline."""
    from penstock.engine.families.wan.attach.pipeline import PARTS

    return PARTS


def pipeline_of(model: WanModel, desk: Any) -> Any:
    """Return diffusers' pipeline of a model, its networks replaced by parts."""
    from penstock.engine.families.wan.attach.pipeline import pipeline_of as make

    return make(model, desk)


def samples() -> Any:
    """Return what `penstock doctor` measures of the engine's own operations."""
    from penstock.engine.families.wan.samples import SAMPLES

    return SAMPLES


def synthetics() -> Any:
    """Return the models of true shapes that `penstock bench` makes on the spot, by name."""
    from penstock.engine.families.wan.synthetic import SYNTHETIC

    return SYNTHETIC


def builtins() -> Mapping[str, Callable[[str], Manifest]]:
    """Return the descriptions of true models without their files."""
    return BUILTIN
