"""Layers of diffusers' Wan VAE, run on one frame at a time with the fewest live bytes.

Every convolution of this VAE is causal in time: a frame needs itself and the two before it. So
instead of chunks of four frames (diffusers), frames flow one by one; the result is the same and the
working set a third. `Past` is what diffusers calls the feature cache.

Layers are chained with `map`, which holds on to no frame that has passed through it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from penstock.errors import CheckpointError
from penstock.profiles.tiling import QUERY_CHUNK, VaeLevels, Window

Past = dict[nn.Module, tuple[Tensor, ...]]
"""The last one or two input frames of each causal convolution."""


def levels_of(vae: Any) -> VaeLevels:
    """The geometry of an `AutoencoderKLWan`.

    Raises:
        CheckpointError: a Wan 2.2 VAE, or one with layers that Wan 2.1 has not.
    """
    config = vae.config
    foreign = [
        f"{name}={config[name]!r}"
        for name, value in (("is_residual", False), ("patch_size", None), ("attn_scales", []))
        if config[name] != value
    ]
    if config["decoder_base_dim"] not in (None, config["base_dim"]):
        foreign.append(f"decoder_base_dim={config['decoder_base_dim']!r}")
    if foreign:
        raise CheckpointError(
            "this VAE is not a Wan 2.1 VAE",
            expected="a plain causal 3D VAE (is_residual=False, patch_size=None)",
            found=", ".join(foreign),
            remedy="Use the VAE that came with the Wan 2.1 model.",
        )
    return VaeLevels(len(config["dim_mult"]), config["num_res_blocks"])


def causal_conv(
    conv: Any, past: Past, frame: Tensor, windows: Sequence[Window] | None = None
) -> Tensor:
    """A `WanCausalConv3d` on the next frame, (1, c, 1, h, w), which it remembers.

    Args:
        conv: the module.
        past: of this pass.
        frame: the next frame.
        windows: of ``frame`` and of the result; None convolves all with the layer's own padding.
    """
    seen = (*past.pop(conv, ()), frame)
    stacked = _stacked(seen, conv.kernel_size[0])
    past[conv] = seen[1 - conv.kernel_size[0] :]
    del seen, frame  # the oldest frame is no longer needed
    spatial = conv._padding[2], conv._padding[0]
    if windows is None:
        return one_frame(conv, stacked, spatial)
    before, after = windows
    rows, cols = before.rows.convolved(after.rows), before.cols.convolved(after.cols)
    made = one_frame(conv, stacked, (rows.padding, cols.padding))
    return made[..., rows.kept, cols.kept]


def one_frame(conv: Any, stacked: Tensor, padding: tuple[int, int] = (0, 0)) -> Tensor:
    """The one frame (1, c_out, 1, h, w) that a 3D convolution makes of as many as it is deep.

    That is a 2D convolution whose channels are those of all the frames, on the same bytes. torch's
    own 3D convolution copies each pixel for every tap where an input is small (27 times the input,
    and up to ten times slower); its 2D convolution does so for a tenth of a megabyte at most.

    Args:
        conv: a `torch.nn.Conv3d`.
        stacked: (1, c_in, t, h, w), with t the kernel's.
        padding: rows and columns of zeros on each side.
    """
    merged = stacked.flatten(1, 2)  # (1, c, t, h, w) -> (1, c*t, h, w), no copy
    return F.conv2d(merged, conv.weight.flatten(1, 2), conv.bias, padding=padding)[:, :, None]


def _stacked(seen: Sequence[Tensor], depth: int) -> Tensor:
    """The last ``depth`` frames, zeros before the first, as one tensor."""
    missing = depth - len(seen)
    if missing > 0:
        seen = (*[seen[0].new_zeros(1).expand(seen[0].shape)] * missing, *seen)
    return torch.cat(list(seen[-depth:]), dim=2)


def pointwise(conv: Any, frame: Tensor) -> Tensor:
    """A `WanCausalConv3d` of size 1, which needs neither past nor padding."""
    return one_frame(conv, frame)


def normalised(norm: Any, x: Tensor) -> Tensor:
    """`WanRMS_norm`: ``x`` over its length along the channels, rounded where diffusers rounds."""
    low = x.dtype in (torch.float16, torch.bfloat16)
    wide = x.float() if low else x
    length = wide.norm(2, dim=1, keepdim=True).clamp_min_(1e-12)
    out = wide.div_(length).to(x.dtype) if low else wide / length
    del wide, length
    return out.mul_(norm.scale).mul_(norm.gamma)


def activated(norm: Any, x: Tensor) -> Tensor:
    """Norm and SiLU; the result is a new frame."""
    return F.silu(normalised(norm, x), inplace=True)


def residual(block: Any, past: Past, windows: Sequence[Window], x: Tensor) -> Tensor:
    """A `WanResidualBlock` on the next frame.

    Args:
        block: the module.
        past: of this pass.
        windows: of ``x``, between the two convolutions, and of the result.
        x: (1, c, 1, h, w).
    """
    h = causal_conv(block.conv1, past, activated(block.norm1, x), windows[:2])
    h = activated(block.norm2, h)
    h = causal_conv(block.conv2, past, h, windows[1:])
    rows, cols = windows[2].inside(windows[0])
    x = x[..., rows, cols]
    if isinstance(block.conv_shortcut, nn.Identity):
        return h.add_(x)
    return h.add_(pointwise(block.conv_shortcut, x))


def residuals(
    blocks: Iterable[Any], past: Past, window: Window, frames: Iterator[Tensor]
) -> Iterator[Tensor]:
    """`WanResidualBlock`s on whole frames."""
    for block in blocks:
        frames = map(partial(residual, block, past, (window,) * 3), frames)
    return frames


def middle(
    mid_block: Any, past: Past, window: Window, frames: Iterator[Tensor]
) -> Iterator[Tensor]:
    """A `WanMidBlock` on whole frames."""
    first, *rest = mid_block.resnets
    frames = residuals([first], past, window, frames)
    for attention, block in zip(mid_block.attentions, rest, strict=True):
        frames = map(partial(_attended, attention), frames)
        frames = residuals([block], past, window, frames)
    return frames


def _attended(block: Any, x: Tensor) -> Tensor:
    """A `WanAttentionBlock`: single-head attention within the frame, in chunks of queries."""
    _, channels, _, height, width = x.shape
    qkv = F.conv2d(normalised(block.norm, x[:, :, 0]), block.to_qkv.weight, block.to_qkv.bias)
    qkv = qkv.reshape(1, 1, 3 * channels, -1).transpose(2, 3).contiguous()
    query, key, value = qkv.chunk(3, dim=-1)  # (1, 1, h*w, c) each
    del qkv
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    for start in range(0, query.shape[2], QUERY_CHUNK):
        chunk = slice(start, start + QUERY_CHUNK)
        out[:, :, chunk] = F.scaled_dot_product_attention(query[:, :, chunk], key, value)
    del query, key, value
    out = out[0].transpose(1, 2).reshape(1, channels, height, width)
    out = F.conv2d(out, block.proj.weight, block.proj.bias)
    return out[:, :, None].add_(x)


def head(model: Any, past: Past, windows: Sequence[Window], x: Tensor) -> Tensor:
    """The last norm, SiLU and convolution of an encoder or decoder on the next frame."""
    return causal_conv(model.conv_out, past, activated(model.norm_out, x), windows)
