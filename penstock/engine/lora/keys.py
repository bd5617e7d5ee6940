"""What each tensor of a LoRA file is, by its key: whose names, which module, which part.

Key styles and their sources: diffusers (``save_lora_weights``) and PEFT (``adapter_model``);
musubi-tuner and other trainers in Kohya's style, whose dots are underscores; ComfyUI and LightX2V,
which keep Wan2.1's own names and add whole differences (``diff``, ``diff_b``, ``diff_m``).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from penstock.engine.families.wan.keys import NAMINGS
from penstock.engine.family.naming import Naming

_PREFIXES = (
    ("base_model.model.", "PEFT"),
    ("transformer.", "diffusers"),
    ("model.diffusion_model.", "ComfyUI"),
    ("diffusion_model.", "ComfyUI"),
    ("lora_unet_", "Kohya"),
    ("", "bare"),
)
_DOWN = ("lora_A.weight", "lora_A.default.weight", "lora_down.weight", "lora.down.weight")
_UP = ("lora_B.weight", "lora_B.default.weight", "lora_up.weight", "lora.up.weight")
_ROLES: Mapping[str, str] = MappingProxyType(
    dict.fromkeys(_DOWN, "down")
    | dict.fromkeys(_UP, "up")
    | {"lora_B.bias": "up_bias", "lora_up.bias": "up_bias", "alpha": "alpha"}
    | {"diff": "diff", "diff_b": "diff_b", "diff_m": "diff_m"}
)
_MARKS = re.compile(r"[._]lora[._]|\.(?:diff|diff_b|diff_m|lokr_\w+|hada_\w+)$|^lora_")
_FOREIGN = (
    (re.compile(r"dora_scale|lora_magnitude_vector"), "DoRA"),
    (re.compile(r"\.lokr_"), "LoKr"),
    (re.compile(r"\.hada_"), "LoHa"),
    (re.compile(r"\.lora_mid\."), "a convolution's Tucker form"),
    (re.compile(r"(?:^|[._])(?:text_encoder|lora_te\d?|text_model)[._]"), "a text encoder's LoRA"),
    (re.compile(r"vace_blocks"), "a LoRA of a VACE model"),
    (re.compile(r"double_blocks|single_(?:transformer_)?blocks"), "a Flux or Hunyuan LoRA"),
    (re.compile(r"transformer_blocks|joint_blocks"), "a LoRA of another transformer"),
    (re.compile(r"down_blocks|up_blocks|mid_block|input_blocks|output_blocks"), "a UNet's LoRA"),
)  # fmt: skip


@dataclass(frozen=True)
class Part:
    """What one tensor is.

    Attributes:
        style: whose names: diffusers, PEFT, ComfyUI, Kohya or bare.
        module: its module under diffusers' names (``blocks.0.attn1.to_q``).
        role: down, up, up_bias, alpha, diff, diff_b or diff_m.
    """

    style: str
    module: str
    role: str


def is_lora(keys: Iterable[str]) -> bool:
    """Whether most of ``keys`` are those of a LoRA or one of its kin."""
    names = [key for key in keys if not key.endswith(".alpha")]
    return 2 * sum(bool(_MARKS.search(name)) for name in names) > len(names)


def parse_key(key: str) -> Part | None:
    """What the tensor ``key`` is; None if that is not known."""
    suffix = next((end for end in _ROLES if key.endswith("." + end)), None)
    if suffix is None:
        return None
    path = key[: -len(suffix) - 1]
    prefix, style = next(pair for pair in _PREFIXES if path.startswith(pair[0]))
    module = _module(path[len(prefix) :], underscored=style == "Kohya", role=_ROLES[suffix])
    return None if module is None else Part(style, module, _ROLES[suffix])


def foreign_kind(keys: Iterable[str]) -> str | None:
    """What the first of ``keys`` that is known for something else is."""
    for key in keys:
        for pattern, kind in _FOREIGN:
            if pattern.search(key):
                return kind
    return None


def _module(path: str, *, underscored: bool, role: str) -> str | None:
    wan = _wan()
    inside, outside = dict(wan.inside or {}), dict(wan.outside)
    if role == "diff_m":
        path += "_modulation" if underscored else ".modulation"
    mark = "_" if underscored else "."
    match = re.fullmatch(rf"blocks{re.escape(mark)}(\d+){re.escape(mark)}(.+)", path)
    local, table = (match[2], inside) if match else (path, outside)
    names = table | {name: name for name in table.values() if name not in table}
    if underscored:
        names = {name.replace(".", "_"): target for name, target in names.items()}
    target = names.get(local)
    return target if target is None or match is None else f"blocks.{int(match[1])}.{target}"


def _wan() -> Naming:
    return next(n for n in NAMINGS if (n.component, n.author) == ("transformer", "Wan"))
