"""Previews: what the video looks like while it is being denoised, by a linear map of the latents.

No network runs: three weighted sums over the channels of one latent frame.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

FIT_SIDE = 16
"""Latents a side of what is decoded for a fit: a video's own size where that is smaller."""

FIT_FRAMES = 8
"""Pictures that are decoded for a fit."""


@dataclass(frozen=True)
class Preview:
    """A small picture of the video as the model sees it coming: the middle latent frame of its
    present estimate of the result.

    Attributes:
        width, height: pixels: an eighth of the video's.
        rgb: ``height * width * 3`` bytes, row by row.
    """

    width: int
    height: int
    rgb: bytes

    def to_image(self) -> Image.Image:
        """Return the picture, mode RGB.

        Raises:
            Nothing.
        """
        return Image.frombytes("RGB", (self.width, self.height), self.rgb)


@dataclass(frozen=True)
class RgbMap:
    """Normalised latents to red, green and blue in [-1, 1].

    Attributes:
        factors: (z, 3).
        bias: (3,).
        note: where it is from.
    """

    factors: Tensor
    bias: Tensor
    note: str

    def __call__(self, latents: Tensor) -> Tensor:
        """Return (z, h, w), fp32, on any device, to (h, w, 3) there."""
        z, height, width = latents.shape
        factors, bias = self.factors.to(latents.device), self.bias.to(latents.device)
        return torch.addmm(bias, latents.reshape(z, -1).T, factors).view(height, width, 3)


def fit_map(
    decode: Callable[[Tensor], Tensor], z_dim: int, size: tuple[int, int], check: Callable[[], None]
) -> RgbMap:
    """Return the map that is nearest to a VAE, by least squares over pictures that it decodes
    itself.

    Args:
        decode: normalised latents (1, z, 1, h, w), fp32 on the CPU, to uint8 (1, H, W, 3).
        z_dim: channels of the latents.
        size: height and width of the video's latents.
        check: called between pictures; ends the fit by raising.
    """
    height, width = (min(FIT_SIDE, side) for side in size)
    inputs, outputs = [], []
    for latents in _smooth_latents(z_dim, height, width):
        check()
        pixels = decode(latents)[0].permute(2, 0, 1)[None].float() / 127.5 - 1
        small = F.adaptive_avg_pool2d(pixels, (height, width))
        inputs.append(latents[0, :, 0].reshape(z_dim, -1).T)
        outputs.append(small[0].reshape(3, -1).T)
    return _least_squares(torch.cat(inputs), torch.cat(outputs))


def _smooth_latents(z_dim: int, height: int, width: int) -> list[Tensor]:
    """Return normal noise whose neighbours are alike, as those of pictures are: (1, z, 1, h, w)
    each."""
    generator = torch.Generator("cpu").manual_seed(0)
    coarse = torch.randn(FIT_FRAMES, z_dim, 4, 4, generator=generator)
    smooth = F.interpolate(coarse, (height, width), mode="bilinear", align_corners=True)
    smooth = smooth / smooth.std(dim=(0, 2, 3), correction=0, keepdim=True)
    return [frame[None, :, None] for frame in smooth]


def _least_squares(inputs: Tensor, outputs: Tensor) -> RgbMap:
    centre, mean = inputs.double().mean(0), outputs.double().mean(0)
    offsets, colours = inputs - centre, outputs - mean
    # Few pictures leave directions undetermined: the pseudoinverse adds nothing there.
    factors = torch.linalg.pinv(offsets) @ colours
    rest = (colours - offsets @ factors).square().sum()
    explained = 1 - rest / colours.square().sum().clamp_min(1e-12)
    note = f"fitted to this VAE, explaining {100 * float(explained):.0f} % of it"
    return RgbMap(factors.float(), (mean - centre @ factors).float(), note)


class Previewer:
    """Makes the previews of one engine's jobs; the map of its VAE is found once."""

    def __init__(self) -> None:
        self._map: RgbMap | None = None

    @property
    def is_ready(self) -> bool:
        """Whether the map is known."""
        return self._map is not None

    def use(self, rgb_map: RgbMap) -> None:
        """Use this map from now on."""
        self._map = rgb_map

    def make(self, latents: Tensor, prediction: Tensor, sigma: float) -> Preview:
        """Make the preview of a step.

        The estimate is that of flow matching, whose latents are ``(1 - sigma) * result + sigma *
        noise`` and whose prediction is ``noise - result`` (Lipman and others, "Flow Matching for
        Generative Modeling", arXiv:2210.02747): ``result = latents - sigma * prediction``.

        Args:
            latents: (1, z, t, h, w), as given to the transformer at the step.
            prediction: the guided one, of that shape.
            sigma: the step's share of noise.
        """
        assert self._map is not None
        frame = latents.shape[2] // 2
        estimate = latents[0, :, frame].float() - sigma * prediction[0, :, frame].float()
        pixels = self._map(estimate).mul_(127.5).add_(127.5).round_().clamp_(0, 255)
        height, width = pixels.shape[:2]
        return Preview(width, height, pixels.to(torch.uint8).cpu().numpy().tobytes())
