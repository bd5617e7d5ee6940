"""Layers of diffusers' Wan VAE, run on one frame at a time with the fewest live bytes.

Every convolution of this VAE is causal in time: a frame needs itself and the two before it. So
instead of chunks of four frames (diffusers), frames flow one by one; the result is the same and the
working set a third. `Past` is what diffusers calls the feature cache.

Equal frames in a row flow as one `Run`. A layer that reaches back over n frames computes the first
n + 1 results of a run; what it would see for the others are the same bits again, so the last result
stands for them. Nothing is compared: that follows from the architecture.

Layers are chained with `through`, which holds on to no frame that a layer is done with.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from penstock.errors import CheckpointError
from penstock.profiles.tiling import CAUSAL_REACH, QUERY_CHUNK, VaeLevels, Window

Run = tuple[Tensor, int]
"""A frame, and how many times it comes in a row."""

Step = Callable[[Tensor, int], Tensor]
"""A layer on a frame, which has come so many times before in its run."""


class Past:
    """What the causal convolutions of one pass remember, in memory that is taken once.

    A new frame takes the place of the oldest. They are joined in one room for all of them, as large
    as the largest needs; other layers may use it meanwhile.

    Args:
        arena: what holds all that is remembered, of one dimension; None: each place is taken when
            its first frame comes.
    """

    def __init__(self, arena: Tensor | None = None) -> None:
        self._memories: dict[nn.Module, _Memory] = {}
        self._room: Tensor | None = None
        self._arena, self._given = arena, 0

    @classmethod
    def of_tiles(
        cls, like: Tensor, tiles: Iterable[Iterable[tuple[Any, Window]]], frames: int
    ) -> Past:
        """Return one for tiles that come one after the other: all its memory is taken here, so that
        nothing of it lies between frames that come and go.

        The channels of true VAEs are multiples of 32: places begin at multiples of 64 bytes.

        Args:
            like: what device and dtype it is of.
            tiles: of each its causal convolutions, and the window that each sees.
            frames: that enter each, at least.
        """
        counts = [
            [conv.in_channels * math.prod(window.shape) for conv, window in tile] for tile in tiles
        ]
        places = min(CAUSAL_REACH, frames) * max(map(sum, counts), default=0)
        past = cls(like.new_empty(places))
        past.room(like, ((CAUSAL_REACH + 1) * max(map(max, counts), default=0),))
        return past

    def forget(self) -> None:
        """Begin anew, in the same memory: what comes next is another tile."""
        self._memories.clear()
        self._given = 0

    def joined(self, conv: nn.Module, frame: Tensor | None, norm: Any) -> Tensor:
        """Return what ``conv`` sees next, (1, c, 3, h, w), zeros before the first frame; it lies in
        the room. Arguments are those of `causal_conv`."""
        memory = self._memories.setdefault(conv, _Memory())
        like = memory.newest if frame is None else frame
        room = self.room(like, (1, like.shape[1], CAUSAL_REACH + 1, *like.shape[-2:]))
        memory.join(room, frame, norm, self._place)
        return room

    def room(self, like: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Return unfilled memory of ``shape`` and of ``like``'s kind, until the next call."""
        count = math.prod(shape)
        if self._room is None or self._room.numel() < count:
            self._room = None  # before there is a larger one
            self._room = like.new_empty(count)
        return self._room[:count].view(shape)

    def leave_room(self) -> None:
        """Give the room back until it is needed again."""
        self._room = None

    def _place(self, like: Tensor) -> Tensor:
        """Return unfilled memory of ``like``'s shape, until all is forgotten."""
        if self._arena is None:
            return torch.empty_like(like, memory_format=torch.contiguous_format)
        first = self._given
        self._given += like.numel()
        return self._arena[first : self._given].view(like.shape)


class _Memory:
    """The last two frames that a convolution has seen, and in which of two places each lies."""

    def __init__(self) -> None:
        self._places: list[Tensor] = []
        self._order: list[int] = []  # the oldest first; one that came twice is there twice

    @property
    def newest(self) -> Tensor:
        """(1, c, 1, h, w)."""
        return self._places[self._order[-1]]

    def join(
        self, room: Tensor, frame: Tensor | None, norm: Any, place: Callable[[Tensor], Tensor]
    ) -> None:
        """Fill ``room`` with what is remembered and the next frame, and remember that one;
        ``place`` gives memory for the first two."""
        absent = CAUSAL_REACH - len(self._order)
        if absent:
            room[:, :, :absent].zero_()
        for at, index in enumerate(self._order, start=absent):
            room[:, :, at : at + 1].copy_(self._places[index])
        newest = self._order[-1] if frame is None else self._write(frame, norm, place)
        room[:, :, -1:].copy_(self._places[newest])
        self._order = [*self._order, newest][-CAUSAL_REACH:]

    def _write(self, frame: Tensor, norm: Any, place: Callable[[Tensor], Tensor]) -> int:
        """Put ``frame`` where the one before it is not."""
        index = 1 - self._order[-1] if self._order else 0
        if index == len(self._places):
            self._places.append(place(frame))
        if norm is None:
            self._places[index].copy_(frame)
        else:
            activated(norm, frame, self._places[index])
        return index


class through(Iterator[Run]):  # noqa: N801 (a `map` of runs)
    """A layer on runs of frames.

    Args:
        step: the layer.
        runs: what enters it.
        reach: frames before the one in hand that the layer sees.
    """

    def __init__(self, step: Step, runs: Iterator[Run], reach: int = 0) -> None:
        self._step, self._runs, self._reach = step, runs, reach
        self._frame: Tensor | None = None
        self._left = self._at = 0

    def __next__(self) -> Run:
        if self._frame is None:
            self._frame, self._left = next(self._runs)
            self._at = 0
        at, frame = self._at, self._frame
        times = self._left if at == self._reach else 1
        self._at, self._left = at + 1, self._left - times
        if not self._left:
            self._frame = None
        return self._step(frame, at), times


def once(frame: Tensor) -> Run:
    """Return a frame that does not come again."""
    return frame, 1


def each_time(layer: Callable[[Tensor], Tensor]) -> Step:
    """Return a layer that sees the frame in hand alone."""
    return lambda frame, _: layer(frame)


def levels_of(vae: Any) -> VaeLevels:
    """Return the geometry of an `AutoencoderKLWan`.

    Raises:
        CheckpointError: one with layers that neither Wan 2.1's nor Wan 2.2's has.
    """
    config = vae.config
    plain = (("patch_size", None), ("decoder_base_dim", (None, config["base_dim"])))
    known = (("attn_scales", []), *(() if config["is_residual"] else plain))
    foreign = [
        f"{name}={config[name]!r}"
        for name, value in known
        if (config[name] not in value if isinstance(value, tuple) else config[name] != value)
    ]
    if foreign:
        raise CheckpointError(
            "this VAE is not a Wan 2.1 VAE, nor Wan 2.2's",
            expected="a plain causal 3D VAE, or one with is_residual",
            found=", ".join(foreign),
            remedy="Use the VAE that came with the model.",
        )
    patch = (config["patch_size"] or 1) if config["is_residual"] else 1
    return VaeLevels(len(config["dim_mult"]), config["num_res_blocks"], patch)


def causal_conv(
    conv: Any,
    past: Past,
    frame: Tensor | None,
    windows: Sequence[Window] | None = None,
    norm: Any = None,
) -> Tensor:
    """Apply a `WanCausalConv3d` to the next frame, (1, c, 1, h, w), which it remembers.

    Args:
        conv: the module, three frames deep.
        past: of this pass.
        frame: the next frame; None: the one before comes again.
        windows: of ``frame`` and of the result; None convolves all with the layer's own padding.
        norm: what goes before, with SiLU.
    """
    joined = past.joined(conv, frame, norm)
    del frame
    spatial = conv._padding[2], conv._padding[0]
    if windows is None:
        return one_frame(conv, joined, spatial)
    before, after = windows
    rows, cols = before.rows.convolved(after.rows), before.cols.convolved(after.cols)
    made = one_frame(conv, joined, (rows.padding, cols.padding))
    return made[..., rows.kept, cols.kept]


def one_frame(conv: Any, stacked: Tensor, padding: tuple[int, int] = (0, 0)) -> Tensor:
    """Return the one frame (1, c_out, 1, h, w) that a 3D convolution makes of as many as it is
    deep.

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


def pointwise(conv: Any, frame: Tensor) -> Tensor:
    """Apply a `WanCausalConv3d` of size 1, which needs neither past nor padding."""
    return one_frame(conv, frame)


def normalised(norm: Any, x: Tensor, out: Tensor | None = None) -> Tensor:
    """Apply `WanRMS_norm`: ``x`` over its length along the channels, rounded where diffusers
    rounds.

    Args:
        norm: the module.
        x: channels in dimension 1.
        out: where the result goes; None makes a new tensor.
    """
    wide = torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype
    length = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=wide).clamp_min_(1e-12)
    if out is None:
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
    torch.div(x, length, out=out)  # computed in fp32, rounded as it is stored
    return out.mul_(norm.scale).mul_(norm.gamma)


def activated(norm: Any, x: Tensor, out: Tensor) -> Tensor:
    """Apply norm and SiLU to ``x``, in ``out``."""
    return F.silu(normalised(norm, x, out), inplace=True)


RESIDUAL_REACH = 2 * CAUSAL_REACH


def residual(block: Any, past: Past, windows: Sequence[Window], x: Tensor, at: int = 0) -> Tensor:
    """Apply a `WanResidualBlock` to the next frame.

    Args:
        block: the module.
        past: of this pass.
        windows: of ``x``, between the two convolutions, and of the result.
        x: (1, c, 1, h, w).
        at: how many times ``x`` has come before in a row, at most `RESIDUAL_REACH`.
    """
    h = causal_conv(
        block.conv2, past, _between(block, past, windows[:2], x, at), windows[1:], block.norm2
    )
    rows, cols = windows[2].inside(windows[0])
    x = x[..., rows, cols]
    if isinstance(block.conv_shortcut, nn.Identity):
        return h.add_(x)
    return h.add_(pointwise(block.conv_shortcut, x))


def _between(
    block: Any, past: Past, windows: Sequence[Window], x: Tensor, at: int
) -> Tensor | None:
    """Return the result of the first convolution; None where it is the one before again."""
    if at > CAUSAL_REACH:
        return None
    return causal_conv(block.conv1, past, x if at == 0 else None, windows, block.norm1)


def residuals(
    blocks: Iterable[Any], past: Past, window: Window, runs: Iterator[Run]
) -> Iterator[Run]:
    """Apply `WanResidualBlock`s to whole frames."""
    for block in blocks:
        runs = through(partial(residual, block, past, (window,) * 3), runs, RESIDUAL_REACH)
    return runs


def middle(mid_block: Any, past: Past, window: Window, runs: Iterator[Run]) -> Iterator[Run]:
    """Apply a `WanMidBlock` to whole frames."""
    first, *rest = mid_block.resnets
    runs = residuals([first], past, window, runs)
    for attention, block in zip(mid_block.attentions, rest, strict=True):
        runs = through(each_time(partial(_attended, attention, past)), runs)
        runs = residuals([block], past, window, runs)
    return runs


def _attended(block: Any, past: Past, x: Tensor) -> Tensor:
    """Apply a `WanAttentionBlock`: single-head attention within the frame, in chunks of
    queries."""
    past.leave_room()
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


def head(model: Any, past: Past, windows: Sequence[Window], runs: Iterator[Run]) -> Iterator[Run]:
    """Apply the last norm, SiLU and convolution of an encoder or decoder."""
    return entered(model.conv_out, past, windows, runs, model.norm_out)


def entered(
    conv: Any,
    past: Past,
    windows: Sequence[Window] | None,
    runs: Iterator[Run],
    norm: Any = None,
) -> Iterator[Run]:
    """Apply a `causal_conv` to runs."""

    def step(frame: Tensor, at: int) -> Tensor:
        return causal_conv(conv, past, None if at else frame, windows, norm)

    return through(step, runs, CAUSAL_REACH)


def halved_size(
    downsampler: Any, past: Past, before: Window, after: Window, frame: Tensor
) -> Tensor:
    """Apply the stride-2 convolution; beyond the right and lower border of the picture it meets
    zeros."""
    conv = downsampler.resample[1]
    read = after.scaled(2)
    size = len(read.rows) + 1, len(read.cols) + 1
    x = frame
    if before.shape != size:
        rows, cols = before.inside(read)
        x = past.room(frame, (*frame.shape[:3], *size)).zero_()
        x[..., rows, cols] = frame
    return F.conv2d(x[:, :, 0], conv.weight, conv.bias, stride=2)[:, :, None]


def joined_in_time(past: Past, seen: list[Tensor]) -> Tensor:
    """Return the last three frames in the room, zeros before the first; the oldest of three is let
    go."""
    _, channels, _, height, width = seen[-1].shape
    room = past.room(seen[-1], (1, channels, CAUSAL_REACH + 1, height, width))
    absent = CAUSAL_REACH + 1 - len(seen)
    if absent:
        room[:, :, :absent].zero_()
    for at, frame in enumerate(seen, start=absent):
        room[:, :, at : at + 1].copy_(frame)
    del seen[:-CAUSAL_REACH]
    return room


def doubled_size(upsampler: Any, past: Past, low: Window, after: Window, frame: Tensor) -> Tensor:
    """Enlarge by the nearest neighbour (a copy, so exact in any dtype), and convolve."""
    conv = upsampler.resample[1]
    height, width = 2 * frame.shape[-2], 2 * frame.shape[-1]
    large = past.room(frame, (1, frame.shape[1], height, width))
    torch.ops.aten._upsample_nearest_exact2d.out(
        frame[:, :, 0], (height, width), 2.0, 2.0, out=large
    )
    before = low.scaled(2)
    rows, cols = before.rows.convolved(after.rows), before.cols.convolved(after.cols)
    made = F.conv2d(large, conv.weight, conv.bias, padding=(rows.padding, cols.padding))
    return made[:, :, None, rows.kept, cols.kept]
