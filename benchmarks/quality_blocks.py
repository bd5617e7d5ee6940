"""What a transformer's matrices and blocks give for fixed inputs, and how far it is from what they
should give."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from penstock.engine.engine import Engine
from penstock.engine.model.component import Component
from penstock.offload.layout import BlockLayout
from penstock.offload.ledger import ByteLedger
from penstock.offload.streamer import load_block
from penstock.quant.linear import QuantLinear
from penstock.units import GIB

_TEXT_TOKENS, _IMAGE_TOKENS = 512, 17


@dataclass(frozen=True)
class Outputs:
    """What a model's matrices and blocks give for fixed inputs."""

    layers: list[Tensor]
    updates: list[Tensor]


def outputs(engine: Engine) -> Outputs:
    """Apply each matrix and each block of the transformer to fixed inputs."""
    component, storage = engine.model.streamed, engine.model.manifest.transformer
    parts = (storage.storage, storage.context_storage or storage.storage)
    layers: list[Tensor] = []
    updates = []
    with engine.model.scratch.held(max(part.scratch_bytes for part in parts)):
        for index in range(len(component.blocks)):
            with _loaded(component, index) as block:
                layers += _layer_outputs(block, index, component.dtype)
                updates.append(_update(component, block, index))
    return Outputs(layers, updates)


@torch.no_grad()
def _layer_outputs(block: nn.Module, seed: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    linears = [each for each in block.modules() if isinstance(each, (nn.Linear, QuantLinear))]
    return [
        linear(torch.randn(32, linear.in_features, generator=generator).to(dtype))
        for linear in linears
    ]


@torch.no_grad()
def _update(component: Component, block: Any, seed: int) -> Tensor:
    """What a block, run by diffusers' own forward, adds to a fixed input."""
    config, generator = component.module.config, torch.Generator().manual_seed(seed)
    width = config.num_attention_heads * config.attention_head_dim
    _, height, across = config.patch_size
    tokens = _TEXT_TOKENS + (0 if config.image_dim is None else _IMAGE_TOKENS)

    def noise(*dims: int) -> Tensor:
        return torch.randn(*dims, generator=generator).to(component.dtype)

    original = _of_diffusers(config, block)
    rope = original.rope(torch.empty(1, config.in_channels, 3, 4 * height, 5 * across))
    hidden, context, modulation = noise(1, 60, width), noise(1, tokens, width), noise(1, 6, width)
    inputs = (hidden, context, (0.2 * modulation).float(), rope)
    update: Tensor = original.blocks[0](*inputs) - hidden
    return update


def _of_diffusers(config: Any, block: nn.Module) -> Any:
    """Diffusers' transformer of one block, around the layers of ``block`` (quantised ones, too)."""
    original = WanTransformer3DModel.from_config(dict(config) | {"num_layers": 1})
    for name, module in block.named_modules():
        own = original.blocks[0].get_submodule(name)
        if isinstance(module, (nn.Linear, QuantLinear)):
            original.blocks[0].set_submodule(name, module)
        else:
            for parameter, value in module.named_parameters(recurse=False):
                setattr(own, parameter, value)
    return original


@contextmanager
def _loaded(component: Component, index: int) -> Iterator[Any]:
    """A block with all of its weights bound."""
    ledger, cpu = ByteLedger("memory", 64 * GIB), torch.device("cpu")

    def load(layout: BlockLayout) -> Any:
        return load_block(layout, device=cpu, device_ledger=ledger, host_ledger=ledger)

    with (
        load(component.blocks[index]) as streamed,
        load(component.cross[index]) as cross,
        component.bound({**streamed, **cross}, index) as block,
    ):
        yield block


def worst(found: Sequence[Tensor], reference: Sequence[Tensor]) -> float:
    """The largest 1 - cosine of pairs."""
    return max(1 - cosine(*pair) for pair in zip(found, reference, strict=True))


def cosine(found: Tensor, reference: Tensor) -> float:
    """Of all values as one vector."""
    return float(cosine_similarity(found.double().flatten(), reference.double().flatten(), dim=0))
