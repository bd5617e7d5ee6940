"""What each tensor of a LoRA file is, by its key: whose names, which module, which part.

Key styles and their sources: diffusers (``save_lora_weights``) and PEFT (``adapter_model``);
musubi-tuner, VideoX-Fun and other trainers in Kohya's style, whose dots are underscores; LyCORIS;
ComfyUI and LightX2V, which keep Wan2.1's own names and add whole differences (``diff``, ``diff_b``,
``diff_m``); DiffSynth (``pipe.dit.``).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import Any, TypeAlias

from penstock.engine.family.naming import Naming
from penstock.engine.family.protocol import ComponentKind, families

_PREFIXES = (
    ("base_model.model.diffusion_model.", "ComfyUI"),
    ("base_model.model.", "PEFT"),
    ("transformer.", "diffusers"),
    ("model.diffusion_model.", "ComfyUI"),
    ("diffusion_model.", "ComfyUI"),
    ("pipe.dit.", "DiffSynth"),
    ("lora_unet_", "Kohya"),
    ("lora_transformer_", "Kohya"),
    ("lycoris_", "LyCORIS"),
    ("", "bare"),
)
_UNDERSCORED = ("Kohya", "LyCORIS")
_ADAPTER = r"(?:\.(?!bias$)\w+)?(?:\.weight)?"
"""What PEFT puts after a tensor's name: an adapter's name, and that it is a weight."""

_ENDS = (
    (r"[._]lora\.down\.weight|\.lora_(?:linear_layer\.)?down\.weight|\.lora_A" + _ADAPTER, "down"),
    (r"[._]lora\.up\.weight|\.lora_(?:linear_layer\.)?up\.weight|\.lora_B" + _ADAPTER, "up"),
    (r"\.lora_B\.bias|\.lora_up\.bias", "up_bias"),
    (r"\.lora_mid\.weight|\.hada_t[12]|\.lokr_t2|\.bm\.weight", "tucker"),
    (r"\.dora_scale|\.lora_magnitude_vector" + _ADAPTER, "magnitude"),
    (r"\.hada_(w[12]_[ab])", "loha "),
    (r"\.lokr_(w[12](?:_[ab])?)", "lokr "),
    (r"\.([ab][12])\.weight", "glora "),
    (r"\.oft_(blocks)", "oft "),
    (r"\.(rescale)", "oft "),
    (r"\.(alpha|diff_m|diff_b|diff)", ""),
    (r"\.w_norm", "diff"),
    (r"\.b_norm", "diff_b"),
    (r"\.set_weight", "set"),
    (r"\.reshape_weight", "reshape"),
)
_ROLES = tuple((re.compile(f"(?:{end})$"), role) for end, role in _ENDS)
_MARKS = re.compile(
    r"[._]lora[._]|^lora_|^lycoris_|\.(?:diff|diff_b|diff_m|set_weight|reshape_weight|dora_scale"
    r"|lokr_\w+|hada_\w+|oft_blocks|rescale|[ab][12]\.weight|[wb]_norm)$"
)
_FOREIGN = (
    (re.compile(r"(?:^|[._])(?:text_encoder|lora_te\d?|text_model)[._]"), "a text encoder's LoRA"),
    (re.compile(r"vace_blocks"), "a LoRA of a VACE model"),
    (re.compile(r"double_blocks|single_(?:transformer_)?blocks"), "a Flux or Hunyuan LoRA"),
    (re.compile(r"transformer_blocks|joint_blocks"), "a LoRA of another transformer"),
    (re.compile(r"down_blocks|up_blocks|mid_block|input_blocks|output_blocks"), "a UNet's LoRA"),
)  # fmt: skip


Said: TypeAlias = "tuple[tuple[str, Any], ...]"


@dataclass(frozen=True)
class KeyPart:
    """What one tensor is.

    Attributes:
        style: whose names: diffusers, PEFT, ComfyUI, DiffSynth, Kohya, LyCORIS or bare.
        module: its module under diffusers' names (``blocks.0.attn1.to_q``), or its parameter.
        family: whose transformer has such a module.
        said: entries of a config, with those values, that tell the order of the halves of its rows.
        role: down, up, up_bias, alpha, magnitude, tucker, diff, diff_b, diff_m, set, reshape, or
            a kind and its part ("loha w1_a", "lokr w2", "glora a1", "oft blocks").
    """

    style: str
    module: str
    role: str
    said: Said = ()
    family: str = ""


def is_lora(keys: Iterable[str]) -> bool:
    """Return whether most of ``keys`` are those of a LoRA or one of its kin."""
    names = [key for key in keys if not key.endswith(".alpha")]
    return 2 * sum(bool(_MARKS.search(name)) for name in names) > len(names)


def parse_key(key: str) -> KeyPart | None:
    """Return what the tensor ``key`` is; None if that is not known."""
    found = next((hit for pattern, role in _ROLES if (hit := _role(pattern, role, key))), None)
    if found is None:
        return None
    path, role = found
    prefix, style = next(pair for pair in _PREFIXES if path.startswith(pair[0]))
    local, underscored = path[len(prefix) :], style in _UNDERSCORED
    module = _module(local.lstrip("_") if underscored else local, underscored, role)
    return None if module is None else KeyPart(style, module.name, role, module.said, module.family)


def _role(pattern: re.Pattern[str], role: str, key: str) -> tuple[str, str] | None:
    """Split a key that ends so: what comes before, and its role."""
    match = pattern.search(key)
    if match is None:
        return None
    part = next((group for group in match.groups() if group is not None), "")
    return key[: match.start()], role + part


def foreign_kind(keys: Iterable[str]) -> str | None:
    """Return what the first of ``keys`` that is known for something else is."""
    for key in keys:
        for pattern, kind in _FOREIGN:
            if pattern.search(key):
                return kind
    return None


@dataclass(frozen=True)
class _Named:
    """A module, by the family whose names it bears."""

    name: str
    family: str
    said: Said = ()


def _module(path: str, underscored: bool, role: str) -> _Named | None:
    mark = "_" if underscored else "."
    if role == "diff_m":
        path += f"{mark}modulation"
    path = path.replace(f"{mark}processor{mark}", mark)
    match = re.fullmatch(rf"blocks{re.escape(mark)}(\d+){re.escape(mark)}(.+)", path)
    inside, outside = _tables(underscored)
    target = (inside if match else outside).get(match[2] if match else path)
    if target is None:
        return _module_of_others(path, mark)
    name = target if match is None else f"blocks.{int(match[1])}.{target}"
    return _Named(name, families()[0].NAME)


def _module_of_others(path: str, mark: str) -> _Named | None:
    """Return the module by the names of the families after the first, each with a table of its
    own."""
    for family in families()[1:]:
        kind = next(iter(family.KINDS.values()))
        for naming in kind.namings:
            start = (naming.block or kind.blocks).replace(".", mark)
            match = re.fullmatch(rf"{re.escape(start)}(\d{{1,6}}){re.escape(mark)}(.+)", path)
            inside, outside = _tables_of(kind, naming, mark)
            target = (inside if match else outside).get(match[2] if match else path)
            if target is not None:
                named = target if match is None else f"{kind.blocks}{int(match[1])}.{target}"
                return _Named(named, family.NAME, _said(kind, naming, named))
    return None


def _said(kind: ComponentKind, naming: Naming, module: str) -> Said:
    """Return what a config would say of a file with these names, of the order of the module's
    halves."""
    if not module.endswith(naming.halves or ("\0",)):
        return ()
    entries = {name for each in kind.namings for name in each.config}
    return tuple((name, naming.config.get(name, kind.defaults[name])) for name in sorted(entries))


def _tables_of(
    kind: ComponentKind, naming: Naming, mark: str
) -> tuple[Mapping[str, str], Mapping[str, str]]:
    """Return diffusers' names of the modules in a block, and outside, by those of ``naming``."""
    if naming.inside is not None:
        inside, outside = dict(naming.inside), dict(naming.outside)
    else:
        shapes = kind.shapes(dict(kind.defaults) | {"num_layers": 1})
        modules = {name.rpartition(".")[0] for name in shapes}
        first = f"{kind.blocks}0."
        inside = {each[len(first) :]: each[len(first) :] for each in modules if first in each}
        outside = {each: each for each in modules if not each.startswith(first)}
    return tuple(  # type: ignore[return-value]
        {name.replace(".", mark): target for name, target in table.items()}
        for table in (inside, outside)
    )


@lru_cache(maxsize=2)
def _tables(underscored: bool) -> tuple[Mapping[str, str], Mapping[str, str]]:
    """Return diffusers' names of what is in a block, and outside, by everyone's; biases by their
    own."""
    wan = _makers()
    return _names(wan.inside or {}, underscored), _names(wan.outside, underscored)


def _names(table: Mapping[str, str], underscored: bool) -> Mapping[str, str]:
    names = dict(table) | {name: name for name in table.values() if name not in table}
    names |= {f"{name}.bias": f"{target}.bias" for name, target in names.items()}
    if underscored:
        names = {name.replace(".", "_"): target for name, target in names.items()}
    return MappingProxyType(names)


def _makers() -> Naming:
    """Return the names that the makers of the model gave, which most LoRAs keep."""
    streamed = next(iter(families()[0].KINDS.values()))
    return next(naming for naming in streamed.namings if naming.inside is not None)
