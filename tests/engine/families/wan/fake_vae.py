"""Peak bytes of the VAE at any size, measured on fake tensors, without weights or arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel

from penstock.engine.families.wan import vae_decode, vae_encode, vae_layers
from penstock.engine.families.wan.cost.runs import clip_runs
from penstock.engine.families.wan.vae_layers import levels_of
from penstock.profiles.phases import FIRST_FRAME
from penstock.profiles.tiling import TileGrid, decode_tiles, encode_tiles
from tests.meter import StorageMeter

STEADY_LATENTS = 3
"""Latent frames after which all that a causal pass remembers is full."""


@dataclass(frozen=True)
class FakeVae:
    """A VAE of fake tensors and the mode they belong to."""

    mode: FakeTensorMode
    vae: Any
    dtype: torch.dtype

    @classmethod
    def make(cls, dtype: torch.dtype, **config: Any) -> FakeVae:
        """An `AutoencoderKLWan` of ``config``."""
        from diffusers import AutoencoderKLWan

        mode, before = FakeTensorMode(), torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with mode:
                return cls(mode, AutoencoderKLWan(**config), dtype)
        finally:
            torch.set_default_dtype(before)

    @contextmanager
    def measured(self):
        """A meter that counts all but the weights, with the attention that stores its scores."""
        weights = list(self.vae.parameters())
        attention = sdpa_kernel(SDPBackend.MATH)
        with self.mode, StorageMeter(weights) as meter, torch.no_grad(), attention:
            yield meter

    def decode_peak(self, latent: tuple[int, int, int], grid: TileGrid) -> int:
        """Peak of a decoding: the last whole latent frames, then the largest tile, until steady."""
        with self.measured() as meter:
            latents = torch.empty(1, self.vae.config.z_dim, *latent, dtype=self.dtype)
            arch = levels_of(self.vae)
            pair = 2 if self.vae.config.is_residual else 1  # with what the shortcut sees
            features = _blank(
                pair * self.vae.decoder.dim * self.vae.decoder.dim_mult[-1],
                latent,
                self.dtype,
                STEADY_LATENTS,
            )
            for feature in vae_decode._whole_frames(self.vae, latents[:, :, :STEADY_LATENTS]):
                features.append(feature)
            del feature
            tiles = decode_tiles(arch, grid, *latent[1:])
            tile = max(tiles, key=lambda tile: _area(tile.levels[-1][0]))
            remembering = [vae_decode._remembering(self.vae.decoder, each) for each in tiles]
            past = vae_layers.Past.of_tiles(features[0], remembering, STEADY_LATENTS)
            frames = vae_decode._tile_frames(self.vae.decoder, features, tile, past, arch.patch)
            for pixels in islice(frames, 1 + 4 * (STEADY_LATENTS - 1)):
                vae_decode.to_uint8(pixels[0, :, 0])
            return meter.peak

    def encode_peak(
        self, latent: tuple[int, int, int], grid: TileGrid, changes: Sequence[int] = FIRST_FRAME
    ) -> int:
        """Peak of an encoding: all of the largest tile, then the first whole frames."""
        frames, height, width = latent
        arch = levels_of(self.vae)
        tiles = encode_tiles(arch, grid, height, width)
        tile = max(tiles, key=lambda tile: _area(tile.pixels))
        runs = clip_runs(1 + 4 * (frames - 1), changes)
        with self.measured() as meter:
            picture = torch.empty(3, arch.factor * height, arch.factor * width, dtype=self.dtype)
            source = vae_encode.first_frame_then_zeros(picture)

            def encoded():
                window = tile.pixels.scaled(arch.patch)
                clip = ((source(first, window), times) for first, times in runs)
                made = vae_encode._tile_frames(self.vae.encoder, clip, tile, arch.patch)
                yield from map(itemgetter(1), made)

            lengths = list(encoded())
            channels = self.vae.encoder.dim * self.vae.encoder.dim_mult[-2]
            blank = _blank(channels, (len(lengths), height, width), self.dtype, 0)
            features = list(zip(blank, lengths, strict=True))
            del blank
            for _ in encoded():
                pass
            with suppress(_Steady):
                vae_encode._whole_frames(self.vae, features, _stop_when_steady())
            return meter.peak

    def peak_of(self, work: Callable[[Any], Tensor]) -> int:
        """Peak of any work on the VAE."""
        with self.measured() as meter:
            work(self.vae)
            return meter.peak


class _Steady(Exception):  # noqa: N818
    """Nothing new happens from here on."""


def _stop_when_steady() -> Callable[[], None]:
    seen = iter(range(STEADY_LATENTS))

    def should_stop() -> None:
        if next(seen, None) is None:
            raise _Steady

    return should_stop


def _blank(
    channels: int, latent: tuple[int, int, int], dtype: torch.dtype, fewer: int
) -> list[Tensor]:
    """Features of latent frames, made outside the layers under test."""
    frames, height, width = latent
    return [torch.empty(1, channels, 1, height, width, dtype=dtype) for _ in range(frames - fewer)]


def _area(window: Any) -> int:
    return window.shape[0] * window.shape[1]
