"""What a diffusers pipeline must be for penstock to run it; every refusal names its reason."""

from __future__ import annotations

from typing import Any

from torch import nn

from penstock.engine.attach.guard import check_runnable
from penstock.engine.attach.part import Part
from penstock.errors import UsageError

_CLASSES = {
    "transformer": "WanTransformer3DModel",
    "text_encoder": "UMT5EncoderModel",
    "vae": "AutoencoderKLWan",
    "image_encoder": "CLIPVisionModel",
}


def is_wan21(pipe: Any) -> bool:
    """Return whether it is a pipeline of Wan 2.1: one transformer, one timestep a step."""
    from diffusers import WanImageToVideoPipeline, WanPipeline

    # By name: a subclass may have a step of its own.
    if type(pipe) not in (WanPipeline, WanImageToVideoPipeline):
        return False
    second = getattr(pipe, "transformer_2", None) is not None
    config = getattr(pipe.transformer, "config", {})
    places = getattr(config, "pos_embed_seq_len", None)  # of two pictures
    other = second or pipe.config.boundary_ratio is not None or places is not None
    return not (other or pipe.config.expand_timesteps)


def check_pipeline(pipe: Any) -> None:
    """Refuse what penstock does not run as diffusers does.

    Raises:
        UsageError: missing or changed models, somebody else's offloading, cache or attention, or
            one that is attached already.
    """
    image = pipe.transformer is not None and pipe.transformer.config.image_dim is not None
    for name in ("transformer", "text_encoder", "vae", *(["image_encoder"] if image else [])):
        _check_model(name, getattr(pipe, name))
        check_runnable(getattr(pipe, name), name)
    _check_transformer(pipe.transformer)
    _check_cache(pipe.transformer)


def _check_cache(transformer: Any) -> None:
    if getattr(transformer, "_is_cached", False):
        raise UsageError(
            "the transformer has a cache of cache-dit",
            expected="a pipeline whose steps are all computed",
            found="cache_dit.enable_cache",
            remedy="Call cache_dit.disable_cache(pipe) first, or stream the transformer alone with "
            "penstock.stream, which keeps the cache.",
        )


def _check_model(name: str, model: Any) -> None:
    if isinstance(model, Part):
        raise UsageError(
            "the pipeline is attached already", remedy="Call penstock.detach(pipe) first."
        )
    if type(model).__name__ != _CLASSES[name]:
        raise UsageError(
            f"the pipeline's {name} cannot be run",
            expected=_CLASSES[name],
            found=type(model).__name__ if model is not None else "none",
            remedy="Load the pipeline with its own models, uncompiled.",
        )
    for path, module in model.named_modules():
        # A registry is there after every call; its hooks are what changes one.
        registry = getattr(module, "_diffusers_hook", None)
        if hasattr(module, "_hf_hook") or (registry is not None and registry.hooks):
            raise UsageError(
                f"{name}{path and f'.{path}'} is hooked",
                expected="models that run by themselves",
                found="CPU offloading, group offloading, a cache or another hook",
                remedy="Load the pipeline without enable_*_offload and caches: the budget does it.",
            )
        if hasattr(module, "base_layer"):
            raise UsageError(
                f"{name}{path and f'.{path}'} carries an adapter",
                expected="plain layers",
                found=type(module).__name__,
                remedy="Call pipe.fuse_lora() and pipe.unload_lora_weights() first.",
            )


def _check_transformer(transformer: nn.Module) -> None:
    for path, module in transformer.named_modules():
        processor = getattr(module, "processor", None)
        if processor is not None and type(processor).__name__ != "WanAttnProcessor":
            raise UsageError(
                f"transformer.{path} has an attention processor of its own",
                expected="WanAttnProcessor",
                found=type(processor).__name__,
                remedy="Restore it with transformer.set_attn_processor(WanAttnProcessor()).",
            )
        backend = getattr(processor, "_attention_backend", None)
        if backend is not None and getattr(backend, "value", backend) != "native":
            raise UsageError(
                f"transformer.{path} has an attention backend of its own",
                expected="torch's own",
                found=str(getattr(backend, "value", backend)),
                remedy='Call pipe.transformer.set_attention_backend("native") first.',
            )
        if getattr(module, "fused_projections", False):
            raise UsageError(
                f"transformer.{path} has fused projections",
                expected="plain ones",
                remedy="Call unfuse_projections first.",
            )
