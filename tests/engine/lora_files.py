"""LoRA files in every key style, for tiny models, and their effect on a transformer by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from penstock.engine.families.wan import forward as dit
from penstock.engine.families.wan.keys import NAMINGS
from penstock.engine.files.keys import ComponentSource
from penstock.quant.paths import Computing, Scratch

Pairs = dict[str, tuple[Tensor, Tensor]]
_WAN = next(n for n in NAMINGS if (n.component, n.author) == ("transformer", "Wan"))
_INSIDE = {target: name for name, target in (_WAN.inside or {}).items()}
_OUTSIDE = {target: name for name, target in _WAN.outside.items()}


def wan_name(module: str) -> str:
    """Wan2.1's own name of a module that diffusers calls ``module``."""
    if not module.startswith("blocks."):
        return _OUTSIDE[module]
    _, number, local = module.split(".", 2)
    return f"blocks.{number}.{_INSIDE[local]}"


def linears(source: ComponentSource, *, outside: bool) -> list[str]:
    """All linear layers of the blocks, or of the rest."""
    return [
        name.removesuffix(".weight")
        for name, shape in source.shapes.items()
        if len(shape) == 2 and name.endswith(".weight")
        and name.startswith("blocks.") != outside
    ]  # fmt: skip


def pairs(source: ComponentSource, modules: list[str], rank: int = 3, seed: int = 0) -> Pairs:
    """A random low-rank pair for each of ``modules``, strong enough to be seen."""
    draw = torch.Generator().manual_seed(seed)
    found = {}
    for module in modules:
        rows, columns = source.shapes[f"{module}.weight"][:2]
        down = torch.randn(rank, columns, generator=draw) / columns**0.5
        up = torch.randn(rows, rank, generator=draw) * 0.3
        found[module] = (down, up)
    return found


def biases(source: ComponentSource, modules: list[str], seed: int = 0) -> dict[str, Tensor]:
    """A random change of each bias."""
    draw = torch.Generator().manual_seed(seed + 1000)
    shapes = source.shapes
    return {
        module: 0.2 * torch.randn(shapes[f"{module}.bias"], generator=draw) for module in modules
    }


def write_diffusers(path: Path, layers: Pairs, metadata: dict[str, str] | None = None) -> Path:
    """As ``save_lora_weights`` writes them."""
    return _write(path, _named(layers, "transformer.", str, "lora_A", "lora_B"), metadata)


def write_comfy(path: Path, layers: Pairs, alpha: float | None = None) -> Path:
    """Wan2.1's names, ``lora_A`` and ``lora_B``."""
    tensors = _named(layers, "diffusion_model.", wan_name, "lora_A", "lora_B")
    if alpha is not None:
        tensors |= {
            f"diffusion_model.{wan_name(module)}.alpha": torch.tensor(alpha) for module in layers
        }
    return _write(path, tensors)


def write_kohya(path: Path, layers: Pairs, alpha: int = 2) -> Path:
    """Underscores for dots, alphas as whole numbers."""

    def underscored(module: str) -> str:
        return wan_name(module).replace(".", "_")

    tensors = _named(layers, "lora_unet_", underscored, "lora_down", "lora_up")
    for module in layers:
        tensors[f"lora_unet_{underscored(module)}.alpha"] = torch.tensor(alpha)
    return _write(path, tensors)


def write_lightx2v(path: Path, layers: Pairs, diff_b: dict[str, Tensor], **diffs: Tensor) -> Path:
    """Wan2.1's names with whole differences: of biases, and by key in ``diffs``."""
    tensors = _named(layers, "diffusion_model.", wan_name, "lora_down", "lora_up")
    for module, change in diff_b.items():
        tensors[f"diffusion_model.{wan_name(module)}.diff_b"] = change
    return _write(path, tensors | {f"diffusion_model.{key}": t for key, t in diffs.items()})


def _named(layers: Pairs, prefix: str, rename: Any, down: str, up: str) -> dict[str, Tensor]:
    tensors = {}
    for module, (a, b) in layers.items():
        tensors[f"{prefix}{rename(module)}.{down}.weight"] = a
        tensors[f"{prefix}{rename(module)}.{up}.weight"] = b
    return tensors


def _write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)
    return path


def inputs(config: Any, seed: int = 0) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Latents, text states, image states and a timestep for a transformer."""
    draw = torch.Generator().manual_seed(seed)
    latents = torch.randn(1, config.in_channels, 2, 6, 8, generator=draw)
    text = torch.randn(1, 512, config.text_dim, generator=draw)
    image = None
    if config.image_dim is not None:
        image = torch.randn(1, 5, config.image_dim, generator=draw)
    return latents, text, image, torch.tensor([700])


@torch.no_grad()
def ours(files: Any, given: tuple[Tensor, Tensor, Tensor | None, Tensor], chunk: int) -> Tensor:
    """What the transformer of opened ``files`` predicts."""
    latents, text, image, timestep = given
    files = files.installed(Computing(Scratch(1 << 20, "cpu")))
    component = files.transformer

    def read(layout: Any, prefix: str = "") -> dict[str, Tensor]:
        return {name: component.checkpoint.read(prefix + name) for name in layout.places}

    def block(layouts: Any, index: int) -> Any:
        return component.bound(read(layouts[index], f"blocks.{index}."), index)

    def blocks() -> Any:
        for index in range(len(component.blocks)):
            with block(component.blocks, index) as module:
                yield index, module

    with component.bound(read(component.rest)) as model:
        context = dit.prepare_context(model, text, image)
        cross = []
        for index in range(len(component.cross)):
            with block(component.cross, index) as module:
                cross.append(dit.cross_kv(module.attn2, context))
        (output,) = dit.denoise_forward(
            model,
            blocks(),
            latents,
            [cross],
            dit.step_modulation(model, timestep, latents.dtype)[0],
            dit.rope_tables(model, latents.shape[2:], latents.device),
            chunk,
        )
    return output
