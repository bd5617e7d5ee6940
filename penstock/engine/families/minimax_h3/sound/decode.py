"""The phase "sound": latents to a waveform, in fp32."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from penstock.engine.families.minimax_h3.sound.kind import AUDIO
from penstock.engine.files.source import read_bytes
from penstock.engine.media.video import Sound
from penstock.errors import CheckpointError

if TYPE_CHECKING:
    from penstock.engine.model.component import Component
    from penstock.engine.run.stage import Stage


def decode(stage: Stage, latents: Tensor) -> Sound:
    """Return what is heard of normalised latents (2, c, n), fp32, one of the two a channel.

    Raises:
        CheckpointError: the files do not say how the latents are normalised.
    """
    component = stage.model.parts[AUDIO.name]
    with stage.phase("sound", 1, "sound") as (_, phase), stage.rest(component) as vae:
        mean, deviation = statistics(component)
        given = (latents * deviation + mean).to(stage.device)
        samples = vae.decoder(vae.dec_in_proj(given))[:, 0].cpu()
        phase.advance()
    return Sound(samples.numpy(), int(component.config["sampling_rate"]))


def statistics(component: Component) -> tuple[Tensor, Tensor]:
    """Return the mean and deviation (1, c, 1) of the latents: of the config, or beside the weights.

    Raises:
        CheckpointError: neither says them.
    """
    return _statistic(component, "latents_mean"), _statistic(component, "latents_std")


def _statistic(component: Component, name: str) -> Tensor:
    given, stored = component.config.get(name), component.source.extras.get(name)
    if given is not None:
        return torch.tensor(given, dtype=torch.float32).view(1, -1, 1)
    channels = component.config["latent_channels"]
    if stored is None or stored.dtype != "F32" or stored.shape != (channels,):
        raise CheckpointError(
            f"{component.source.raw.path} does not say how the sound's latents are normalised",
            expected=f"{name} in its config.json, or a tensor of {channels} numbers in fp32",
            found="neither" if stored is None else f"{stored.dtype} {list(stored.shape)}",
            remedy="Put the model's config.json beside the file.",
        )
    return torch.frombuffer(bytearray(read_bytes(stored)), dtype=torch.float32).view(1, -1, 1)
