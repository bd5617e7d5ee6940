"""LoRAs of every kind as their trainers write them, and what these make of a weight.

LyCORIS' own modules hold the values, write the files and merge; what it has no module for is
written out here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lycoris.modules.boft import ButterflyOFTModule
from lycoris.modules.diag_oft import DiagOFTModule
from lycoris.modules.full import FullModule
from lycoris.modules.glora import GLoRAModule
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from lycoris.modules.norms import NormModule
from safetensors.torch import save_file
from torch import Tensor, nn

Shapes = Mapping[str, tuple[int, ...]]
LOCALS = ("attn1.to_q", "attn2.to_k", "attn2.to_v", "ffn.net.0.proj", "ffn.net.2")
"""Layers of a block that are changed: square ones, wide, tall, and two that leave the stream."""


@dataclass(frozen=True)
class Made:
    """A LoRA of one kind.

    Attributes:
        tensors: of its file.
        merge: from the model's plain weights to those with the LoRA, for a strength.
    """

    tensors: Mapping[str, Tensor]
    merge: Callable[[Mapping[str, Tensor], float], dict[str, Tensor]]

    def write(self, path: Path) -> Path:
        save_file({name: t.detach().clone().contiguous() for name, t in self.tensors.items()}, path)
        return path


def _filled(module: Any, draw: torch.Generator) -> Any:
    """``module`` with parameters as after some training."""
    for name, parameter in module.named_parameters():
        if "org_module" in name:
            continue
        size = 0.3 if parameter.dim() > 1 else 1.0
        noise = size * torch.randn(parameter.shape, generator=draw)
        base = 1.0 if name in ("rescale", "dora_scale") else 0.0
        parameter.data.copy_(base + noise.abs() if name == "dora_scale" else base + noise)
    return module.eval()


def _lycoris(make: Callable[[nn.Module], Any], shapes: Shapes, modules: list[str], seed: int
             ) -> Made:  # fmt: skip
    draw = torch.Generator().manual_seed(seed)
    layers: dict[str, tuple[nn.Module, Any]] = {}
    for name in modules:
        shape = shapes[f"{name}.weight"]
        org: nn.Module = nn.LayerNorm(shape) if len(shape) == 1 else nn.Linear(shape[1], shape[0])
        layers[name] = org, _filled(make(org), draw)
    tensors = {
        f"lycoris_{name.replace('.', '_')}.{key}": tensor
        for name, (_, module) in layers.items()
        for key, tensor in module.state_dict().items()
        if "org_module" not in key
    }

    def merge(weights: Mapping[str, Tensor], strength: float) -> dict[str, Tensor]:
        made = dict(weights)
        for name, (org, module) in layers.items():
            org.weight.data.copy_(weights[f"{name}.weight"])
            if isinstance(module, FullModule):
                change = module.custom_state_dict()
                made[f"{name}.weight"] = weights[f"{name}.weight"] + strength * change["diff"]
                made[f"{name}.bias"] = weights[f"{name}.bias"] + strength * change["diff_b"]
                continue
            if f"{name}.bias" in weights:
                org.bias.data.copy_(weights[f"{name}.bias"])
            if isinstance(module, (LohaModule, LokrModule)):
                # Its forward, which trains, scales once; its get_merged_weight twice.
                change = module.get_weight(org.weight.shape).detach()
                made[f"{name}.weight"] = weights[f"{name}.weight"] + strength * change
                continue
            merged, bias = module.get_merged_weight(strength)
            made[f"{name}.weight"] = merged.detach()
            if bias is not None and f"{name}.bias" in weights:
                made[f"{name}.bias"] = bias.detach()
        return made

    return Made(tensors, merge)


def _full(org: nn.Module) -> FullModule:
    module = FullModule("l", org)
    module._org_weight = [torch.zeros_like(org.weight)]
    module.org_bias = [torch.zeros_like(org.bias)]
    return module


def _whole_weights(shapes: Shapes, modules: list[str], seed: int) -> Made:
    """``set_weight``, as ComfyUI reads it: whatever the strength."""
    draw = torch.Generator().manual_seed(seed)
    new = {f"{m}.weight": torch.randn(shapes[f"{m}.weight"], generator=draw) * 0.1 for m in modules}
    tensors = {
        f"transformer.{name.removesuffix('.weight')}.set_weight": t for name, t in new.items()
    }
    return Made(tensors, lambda weights, strength: dict(weights) | new)


def _grown_input(shapes: Shapes, modules: list[str], seed: int) -> Made:
    """``reshape_weight``: a pair for four more input channels than there are, which are fed zeros
    by who has none."""
    draw = torch.Generator().manual_seed(seed)
    rows, channels, *kernel = shapes["patch_embedding.weight"]
    down = 0.3 * torch.randn(3, channels + 4, *kernel, generator=draw)
    up = 0.3 * torch.randn(rows, 3, *[1] * len(kernel), generator=draw)
    name = "diffusion_model.patch_embedding"
    tensors = {
        f"{name}.lora_down.weight": down,
        f"{name}.lora_up.weight": up,
        f"{name}.alpha": torch.tensor(1.5),
        f"{name}.reshape_weight": torch.tensor([rows, channels + 4, *kernel]),
    }

    def merge(weights: Mapping[str, Tensor], strength: float) -> dict[str, Tensor]:
        padded = torch.zeros(rows, channels + 4, *kernel)
        padded[:, :channels] = weights["patch_embedding.weight"]
        padded += strength * 1.5 / 3 * (up.flatten(1) @ down.flatten(1)).view(padded.shape)
        return dict(weights) | {"patch_embedding.weight": padded[:, :channels].contiguous()}

    return Made(tensors, merge)


def _norms(shapes: Shapes, modules: list[str], seed: int) -> Made:
    names = sorted({f"{module.rsplit('.attn1', 1)[0]}.norm2" for module in modules
                    if module.endswith("attn1.to_q")})  # fmt: skip
    return _lycoris(lambda org: NormModule("l", org), shapes, names, seed)


_MAKERS: Mapping[str, Callable[[nn.Module], Any]] = {
    "lora": lambda org: LoConModule("l", org, lora_dim=4, alpha=2),
    "dora by outputs": lambda org: LoConModule(
        "l", org, lora_dim=4, alpha=2, weight_decompose=True, wd_on_out=True
    ),
    "dora by inputs": lambda org: LoConModule(
        "l", org, lora_dim=4, alpha=2, weight_decompose=True, wd_on_out=False
    ),
    "loha": lambda org: LohaModule("l", org, lora_dim=4, alpha=2),
    "lokr": lambda org: LokrModule("l", org, lora_dim=2, alpha=3, factor=4),
    "glora": lambda org: GLoRAModule("l", org, lora_dim=4, alpha=2),
    "oft": lambda org: DiagOFTModule("l", org, lora_dim=8, constraint=0.01, rescaled=True),
    "boft": lambda org: ButterflyOFTModule("l", org, lora_dim=16, rescaled=True),
    "differences": _full,
}

KINDS = (*_MAKERS, "norms", "whole weights", "grown input")
"""Of LoRAs: twelve."""

AT_ANY_STRENGTH = tuple(kind for kind in KINDS if not kind.startswith("dora"))
"""LyCORIS turns a DoRA's strength otherwise than ComfyUI and PEFT do."""


def make(kind: str, shapes: Shapes, modules: list[str], seed: int = 0) -> Made:
    """A LoRA of that kind for ``modules`` (linear layers), with random values."""
    others = {"norms": _norms, "whole weights": _whole_weights, "grown input": _grown_input}
    if kind in others:
        return others[kind](shapes, modules, seed)
    return _lycoris(_MAKERS[kind], shapes, modules, seed)


def some_modules(shapes: Shapes) -> list[str]:
    """Layers in every block but one."""
    blocks = sorted({int(name.split(".")[1]) for name in shapes if name.startswith("blocks.")})
    return [f"blocks.{number}.{local}" for number in blocks[:-1] for local in LOCALS]
