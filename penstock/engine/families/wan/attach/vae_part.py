"""The VAE of a Wan pipeline as diffusers calls it, run by penstock under a budget."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NoReturn

import torch
from torch import Tensor

from penstock.engine.attach.part import Part
from penstock.engine.families.wan.model import model_of
from penstock.engine.families.wan.vae_decode import decode_tiled
from penstock.engine.families.wan.vae_encode import encode_tiled
from penstock.engine.model.component import Component
from penstock.errors import UsageError
from penstock.profiles.manifest import VideoShape
from penstock.profiles.tiling import TileGrid, Window


class _Mode:
    """A posterior of which the mode is known: what Wan's pipelines use."""

    def __init__(self, mode: Tensor) -> None:
        self._mode = mode

    def mode(self) -> Tensor:
        """Return (b, z, t, h, w)."""
        return self._mode

    def sample(self, generator: torch.Generator | None = None) -> NoReturn:
        """Not known.

        Raises:
            UsageError: always.
        """
        raise UsageError(
            "the VAE of an attached pipeline gives its posterior's mode alone",
            expected="latent_dist.mode()",
            remedy="Detach the pipeline to draw samples.",
        )


class VaePart(Part):
    """`diffusers.AutoencoderKLWan`: by its own forward where the budget holds that, else by exact
    tiles, whose result is the same but for rounding."""

    @property
    def component(self) -> Component:
        """Its files."""
        return model_of(self.desk).vae_decoder

    def enable_tiling(self, *_: Any, **__: Any) -> None:
        """Nothing to do: tiles are chosen by the budget."""

    disable_tiling = enable_slicing = disable_slicing = enable_tiling

    @torch.no_grad()
    def encode(self, x: Tensor, return_dict: bool = True) -> Any:
        """Map pixels (b, 3, t, h, w) in [-1, 1] to a posterior's mode (b, z, t', h', w').

        Raises:
            RequestError: a size that does not divide into latents.
            OverBudget: no plan fits.
        """
        from diffusers.models.modeling_outputs import AutoencoderKLOutput

        modes = [self._encode(clip) for clip in x]
        posterior: Any = _Mode(torch.cat(modes).to(x.device))
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    def _encode(self, clip: Tensor) -> Tensor:
        desk, (frames, height, width) = self.desk, clip.shape[1:]
        shape = VideoShape(width, height, frames)
        phase, component = desk.plan(shape)["encode"], model_of(desk).vae_encoder

        def pixels(frame: int, window: Window) -> Tensor:
            rows, cols = window.inside(Window.whole(height, width))
            return clip[None, :, frame : frame + 1, rows, cols].to(desk.device, component.dtype)

        whole = desk.whole(phase, shape)
        changes = None if whole else _changes(clip.contiguous())
        with desk.phase(whole or phase), desk.rest(component) as vae:
            if whole is not None:
                given = clip[None].to(desk.device, component.dtype)
                mode: Tensor = _of_diffusers(vae).encode(given).latent_dist.mode()
            else:
                size = (frames, height, width)
                mode = encode_tiled(vae, pixels, size, TileGrid(*phase.tiles), changes=changes)
            return mode.to(self.device)

    @torch.no_grad()
    def decode(self, z: Tensor, return_dict: bool = True) -> Any:
        """Map latents (b, z, t, h, w) in the VAE's own range to pixels (b, 3, t', h', w') in
        [-1, 1].

        Raises:
            OverBudget: no plan fits.
        """
        from diffusers.models.autoencoders.vae import DecoderOutput

        spec = model_of(self.desk).manifest.vae
        batch, _, frames, height, width = z.shape
        shape = VideoShape(
            width * spec.spatial_factor,
            height * spec.spatial_factor,
            (frames - 1) * spec.temporal_factor + 1,
        )
        video = torch.empty(
            (batch, 3, shape.frames, shape.height, shape.width), dtype=z.dtype, device=z.device
        )
        for latents, clip in zip(z, video, strict=True):
            self._decode(latents, clip, shape)
        return DecoderOutput(sample=video) if return_dict else (video,)

    def _decode(self, latents: Tensor, clip: Tensor, shape: VideoShape) -> None:
        desk, component = self.desk, self.component
        phase = desk.plan(shape)["decode"]
        whole, window = desk.whole(phase, shape), Window.whole(shape.height, shape.width)
        with desk.phase(whole or phase), desk.rest(component) as vae:
            given = latents[None].to(desk.device, component.dtype)
            if whole is not None:
                clip.copy_(_of_diffusers(vae).decode(given, return_dict=False)[0][0])
                return
            for piece in decode_tiled(vae, given, TileGrid(*phase.tiles)):
                rows, cols = piece.window.inside(window)
                clip[:, piece.frame, rows, cols] = piece.pixels.to(clip)


def _of_diffusers(vae: Any) -> Any:
    """Return diffusers' own class around the tensors that are bound to ``vae``: its forward, its
    bits."""
    from diffusers import AutoencoderKLWan

    with torch.device("meta"):
        original = AutoencoderKLWan.from_config(dict(vae.config))
    original.load_state_dict(vae.state_dict(), assign=True)
    return original.eval()


def _changes(clip: Tensor) -> list[int]:
    """Return the frames of ``clip``, contiguous (3, t, h, w), that differ from the one before in
    any bit."""
    frames = clip.view(torch.uint8).unbind(1)
    differ = (not torch.equal(*pair) for pair in pairwise(frames))
    return [0, *(at for at, differs in enumerate(differ, start=1) if differs)]
