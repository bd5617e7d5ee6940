"""Models of Wan's making, or built upon it, that penstock knows by name and does not run.

They are told by tensors that the models which run do not have. Sources: the modules of Wan2.1 and
Wan2.2 (``wan/modules``), of VACE, VideoX-Fun (Fun), HuMo, MultiTalk, SkyReels-V2 and ReCamMaster;
those of diffusers where it has a class for one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from penstock.offload.checkpoint import TensorEntry

_BY_MODULE = (
    ("vace_patch_embedding", "Wan VACE"),
    ("vace_blocks", "Wan VACE"),
    ("casual_audio_encoder", "Wan2.2 S2V"),
    ("causal_audio_encoder", "Wan2.2 S2V"),
    ("trainable_cond_mask", "Wan2.2 S2V"),
    ("pose_patch_embedding", "Wan2.2 Animate"),
    ("face_adapter", "Wan2.2 Animate"),
    ("audio_proj.audio_proj_glob_1", "HuMo"),
    ("audio_proj.proj1", "MultiTalk"),
    ("control_adapter", "Wan Fun Camera"),
    ("ref_conv", "Wan Fun Control"),
    ("fps_embedding", "SkyReels-V2 with diffusion forcing"),
    ("cam_encoder", "ReCamMaster"),
)
"""Modules outside the blocks, or in each of them, and the model that has them. A file may have
several: the first counts."""

_BY_CHANNELS = (
    ((32, 16), "Wan Fun Camera"),
    ((48, 16), "Wan Fun Control"),
    ((52, 16), "Wan2.2 Fun Control"),
    ((56, 16), "Wan Fun Control"),
    ((100, 48), "Wan2.2 Fun InP 5B"),
    ((148, 48), "Wan2.2 Fun Control 5B"),
)
"""Input and output channels of transformers that have no module of their own."""

_IN_BLOCK = re.compile(r"(?:^|\.)blocks\.\d+\.")


def stranger(entries: Mapping[str, TensorEntry]) -> str | None:
    """As `penstock.engine.family.protocol.Family.stranger`, whatever stands before the names."""
    modules = {f".{_local(name)}" for name in entries}
    for module, title in _BY_MODULE:
        if any(f".{module}." in name for name in modules):
            return title
    return None


def _local(name: str) -> str:
    """Return ``name`` inside its block, or as it is."""
    return _IN_BLOCK.split(name, maxsplit=1)[-1]


def by_channels(channels: int, out_channels: int) -> str | None:
    """Return the model whose transformer takes so many channels and gives so many."""
    return dict(_BY_CHANNELS).get((channels, out_channels))
