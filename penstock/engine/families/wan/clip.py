"""The picture a video starts from: encoded by CLIP, turned into conditioning.

The encoder is run layer by layer as free functions over the modules of transformers'
``CLIPVisionModel``. The transformer wants ``hidden_states[-2]``, so the last layer, the pooled
output and the post-norm are never needed: do not load them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from importlib import util
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import Module
from torch.nn.functional import interpolate, scaled_dot_product_attention

from penstock.engine.families.wan.config import IMAGE_PROCESSOR
from penstock.engine.families.wan.terms import SQUASHED_ROWS
from penstock.engine.files import side_fields
from penstock.engine.files.fields import check_fields
from penstock.engine.media.fit import Fitting
from penstock.errors import CheckpointError


def preprocess(picture: Image.Image, width: int, height: int, fit: Fitting | None = None) -> Tensor:
    """Return the picture at the video's size, ``(1, 3, height, width)`` fp32 in [-1, 1].

    As diffusers' ``VideoProcessor.preprocess``: Lanczos to exactly this size, whatever the aspect.

    Args:
        fit: what of the picture comes where; None: all of it to this size.
    """
    fit = fit or Fitting(None, (width, height))
    sized = np.array(picture.resize(fit.inner, Image.Resampling.LANCZOS, box=fit.box))
    frame = torch.full((1, 3, height, width), -1.0)
    (left, top), (wide, high) = fit.place, fit.inner
    part = frame[0, :, top : top + high, left : left + wide]
    part.copy_(torch.from_numpy(sized).permute(2, 0, 1))  # (h, w, 3) -> (3, h, w)
    part.div_(255.0).mul_(2.0).sub_(1.0)
    return frame


def _frame_of(picture: Image.Image) -> Tensor:
    """Return (1, 3, h, w) fp32 in [-1, 1]."""
    frame = torch.from_numpy(np.array(picture)).permute(2, 0, 1).unsqueeze(0)
    scaled = frame.to(torch.float32, memory_format=torch.contiguous_format).div_(255.0)
    return scaled.mul_(2.0).sub_(1.0)


def conditioning(
    encoded: Tensor,
    latents_mean: Sequence[float],
    latents_std: Sequence[float],
    temporal: int = 4,
    *,
    ends: bool = False,
) -> Tensor:
    """Return what is concatenated to the noise: the mask of given frames and the encoded picture.

    As ``WanImageToVideoPipeline.prepare_latents``: the mask has ``temporal`` channels, one for each
    video frame of a latent frame, and is one where the frame is given: the first latent frame, and
    of the last one the last channel where the clip ends with a picture.

    Args:
        encoded: the VAE's mean for the picture, then zeros, ``(1, z, t, h, w)``, not normalised.
        latents_mean, latents_std: the VAE config's, one a channel.
        temporal: video frames a latent frame.
        ends: the last frame of the clip is given too.

    Returns:
        ``(1, temporal + z, t, h, w)``, 20 channels for Wan2.1, in the type of ``encoded``.
    """
    batch, channels, frames, height, width = encoded.shape
    view = (1, channels, 1, 1, 1)
    mean = torch.tensor(latents_mean).view(view).to(encoded)
    inverse_std = 1.0 / torch.tensor(latents_std).view(view).to(encoded)
    joined = encoded.new_zeros(batch, temporal + channels, frames, height, width)
    joined[:, :temporal, 0] = 1
    if ends:
        joined[:, temporal - 1, -1] = 1
    joined[:, temporal:] = (encoded - mean) * inverse_std
    return joined


def make_image_processor(config: Mapping[str, Any]) -> Any:
    """Make the CLIP image processor of a ``preprocessor_config.json``'s content.

    Raises:
        CheckpointError: it is of no use.
    """
    from transformers import CLIPImageProcessor

    try:
        return CLIPImageProcessor.from_dict(dict(config))
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError("no usable image processor config", found=str(error)) from error


def squashed_values(config: Mapping[str, Any], picture: Image.Image, side: int) -> Tensor:
    """Return the whole picture as CLIP sees it, ``(1, 3, side, side)`` fp32, whatever its aspect.

    As Wan's makers prepare it (``wan/modules/clip.py``): bicubic without antialias, neither rounded
    nor clamped. Some rows at a time along the rows, then once along the columns, so that the
    picture never lies in memory in fp32; the weights of the other direction are then exactly one.

    Args:
        config: of the image processor; its mean and deviation count.
        picture: in RGB.
        side: of what the encoder takes, in pixels.

    Raises:
        CheckpointError: the processor is of no use.
    """
    mean, deviation = _statistics(config)
    narrow = torch.empty(1, 3, picture.height, side)
    for top in range(0, picture.height, SQUASHED_ROWS):
        end = min(top + SQUASHED_ROWS, picture.height)
        band = _frame_of(picture.crop((0, top, picture.width, end)))
        narrow[:, :, top:end] = _bicubic(band, (end - top, side))
    seen = _bicubic(narrow, (side, side)).mul_(0.5).add_(0.5)
    return seen.sub_(mean).div_(deviation)


def _statistics(config: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Return the mean and deviation (1, 3, 1, 1) of what the image encoder was trained with.

    Raises:
        CheckpointError: the processor is of no use.
    """
    try:
        check_fields(config, side_fields.IMAGE_PROCESSOR, "preprocessor_config.json")
    except CheckpointError as error:
        raise CheckpointError("no usable image processor config", found=str(error)) from error
    mean, deviation = (
        torch.tensor(config.get(name, IMAGE_PROCESSOR[name])).view(1, 3, 1, 1)
        for name in ("image_mean", "image_std")
    )
    return mean, deviation


def _bicubic(frame: Tensor, size: tuple[int, int]) -> Tensor:
    return interpolate(frame, size=size, mode="bicubic", align_corners=False)


def pixel_values(config: Mapping[str, Any], picture: Image.Image, side: int) -> Tensor:
    """Return the picture's centre as CLIP sees it, ``(1, 3, side, side)`` fp32, as transformers'
    processor makes it for diffusers.

    It is scaled down first, as the processor itself would do it: that makes copies of what it gets.

    Args:
        config: of the image processor.
        picture: in RGB.
        side: of what the encoder takes, in pixels.

    Raises:
        CheckpointError: the processor is of no use, or makes something else for this encoder.
    """
    small = _scaled(config, picture, side)
    found = _plainly_processed(config, small)
    if found is None:
        found = make_image_processor(config)(images=small, return_tensors="pt").pixel_values
    if found.shape != (1, 3, side, side):
        raise _unfit(side, f"{list(found.shape)}")
    return found


def _plainly_processed(config: Mapping[str, Any], small: Image.Image) -> Tensor | None:
    """Return ``small`` at the size that a processor's config names, as transformers' processor
    makes it without torchvision; None: that one is to be asked.

    It is where torchvision is installed, whose arithmetic rounds otherwise, and where steps are
    left out or the crop is larger than the picture. Importing it takes two seconds.
    """
    given = {**IMAGE_PROCESSOR, **config}
    steps = ("do_convert_rgb", "do_rescale", "do_normalize")
    if util.find_spec("torchvision") is not None or not all(given[name] for name in steps):
        return None
    if given["do_resize"]:
        size = _named_size(given["size"], small.size)
        if size is None:
            return None
        small = small.resize(size, resample=Image.Resampling(given["resample"]))
    if given["do_center_crop"]:
        crop = _named_size(given["crop_size"], None)
        if crop is None or crop[0] > small.width or crop[1] > small.height:
            return None
        left, top = (small.width - crop[0]) // 2, (small.height - crop[1]) // 2
        small = small.crop((left, top, left + crop[0], top + crop[1]))
    # In fp64, then rounded once; then normed in fp32
    unit = (np.array(small).astype(np.float64) * given["rescale_factor"]).astype(np.float32)
    mean, deviation = (
        np.array(given[name], dtype=np.float32) for name in ("image_mean", "image_std")
    )
    return torch.from_numpy((unit - mean) / deviation).permute(2, 0, 1)[None].contiguous()


def _named_size(
    named: int | Mapping[str, int], picture: tuple[int, int] | None
) -> tuple[int, int] | None:
    """Return the width and height that a config names; for ``picture``, by its shorter side. None:
    in another way."""
    entries = {"shortest_edge": named} if isinstance(named, int) else dict(named)
    if set(entries) == {"height", "width"}:
        return entries["width"], entries["height"]
    if set(entries) != {"shortest_edge"}:
        return None
    short = entries["shortest_edge"]
    if picture is None:
        return short, short
    low, high = sorted(picture)
    long = int(short * high / low)
    return (long, short) if picture[0] > picture[1] else (short, long)


def _scaled(config: Mapping[str, Any], picture: Image.Image, side: int) -> Image.Image:
    size = config.get("size", side)
    shortest = size if isinstance(size, int) else size.get("shortest_edge")
    if not config.get("do_resize", True) or shortest is None:
        return picture
    if shortest > 2 * side:
        raise _unfit(side, f"a shortest edge of {shortest}")
    low, high = sorted(picture.size)
    long = int(shortest * high / low)
    wide = picture.width > picture.height
    resample = Image.Resampling(config.get("resample", Image.Resampling.BICUBIC))
    return picture.resize((long, shortest) if wide else (shortest, long), resample=resample)


def _unfit(side: int, found: str) -> CheckpointError:
    return CheckpointError(
        "the image processor does not suit the image encoder",
        expected=f"pictures of {side} x {side} pixels, scaled to twice that at most",
        found=found,
        remedy="Copy preprocessor_config.json and the encoder's config.json from one model.",
    )


def embed_pixels(embeddings: Any, pre_layer_norm: Module, pixels: Tensor) -> Tensor:
    """Return the patches, class token and positions, normed: ``(1, 3, s, s) -> (1, n, d)``.

    Args:
        embeddings: ``CLIPVisionModel.embeddings``; only its weights are used, not its buffers.
        pre_layer_norm: ``CLIPVisionModel.pre_layrnorm``.
        pixels: from `squashed_values` or `pixel_values`.
    """
    weight = embeddings.patch_embedding.weight
    patches = embeddings.patch_embedding(pixels.to(weight)).flatten(2).transpose(1, 2)
    head = embeddings.class_embedding.expand(1, 1, -1)
    tokens = torch.cat([head, patches], dim=1) + embeddings.position_embedding.weight
    return pre_layer_norm(tokens)  # type: ignore[no-any-return]


def encode_layers(blocks: Iterable[tuple[int, Module]], hidden: Tensor) -> Tensor:
    """Run CLIP encoder layers; give it the first
    `penstock.engine.families.wan.structure.layers_needed`.

    Args:
        blocks: ``(index, CLIPEncoderLayer)`` in order, weights bound while the loop holds them.
        hidden: ``(1, n, d)`` from `embed_pixels`.

    Returns:
        ``(1, n, d)``: after all but the last layer, ``hidden_states[-2]``.
    """
    (found,) = encode_pictures(blocks, [hidden])
    return found


def encode_pictures(blocks: Iterable[tuple[int, Module]], hidden: list[Tensor]) -> list[Tensor]:
    """As `encode_layers`, of several pictures in one visit of each layer, one after the other."""
    for _, block in blocks:
        for at in range(len(hidden)):
            hidden[at] = _run_layer(block, hidden[at])
    return hidden


def _run_layer(layer: Any, hidden: Tensor) -> Tensor:
    hidden = hidden + _attend(layer.self_attn, layer.layer_norm1(hidden))
    return hidden + _feed_forward(layer.mlp, layer.layer_norm2(hidden))


def _attend(module: Any, normed: Tensor) -> Tensor:
    # (1, n, heads * d) -> (1, heads, n, d)
    query, key, value = (
        part(normed).unflatten(-1, (-1, module.head_dim)).transpose(1, 2)
        for part in (module.q_proj, module.k_proj, module.v_proj)
    )
    mixed = scaled_dot_product_attention(query, key, value, scale=module.scale)
    del query, key, value
    return module.out_proj(mixed.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


def _feed_forward(module: Any, normed: Tensor) -> Tensor:
    return module.fc2(module.activation_fn(module.fc1(normed)))  # type: ignore[no-any-return]
