"""What each format costs in quality, on a tiny random model against full precision.

    python benchmarks/quality.py [--formats int8,fp8,...] [--steps 4] [--threads 1]

The model's block matrices are Gaussian with rare outliers (one weight in a thousand, eight times as
large); it computes in fp32, so that all differences are the format's. For each format the whole
model is packed and run:

- block cosine: of what a block adds to its input, the worst of all blocks;
- latents and frames PSNR: of the job's results, in dB over the reference's range (frames: 255);
- bytes a block.

Formats that are only read (K-quants of GGUF) cannot be made here and are not in the table. A tiny
random model says how formats compare, not what a video of the real one looks like. The last line on
stdout is JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import cosine_similarity

from penstock.engine.engine import Engine
from penstock.engine.locate import locate
from penstock.engine.model import Component
from penstock.engine.pack import pack
from penstock.engine.report import JobResult
from penstock.engine.request import GenerationRequest
from penstock.engine.synthetic import write_tiny_model
from penstock.offload.layout import BlockLayout
from penstock.offload.ledger import ByteLedger
from penstock.offload.streamer import load_block
from penstock.quant.policy import default_policy
from penstock.units import GIB

FORMATS = (
    "fp32", "bf16", "fp16", "gguf-q8_0", "int8", "quanto-int8", "fp8", "quanto-fp8", "quanto-int4",
    "nf4",
)  # fmt: skip
FAST = ("int8", "fp8")
_WIDTHS = {"num_attention_heads": 2, "attention_head_dim": 128, "ffn_dim": 512, "num_layers": 4}


@dataclass(frozen=True)
class Quality:
    """One row of the table."""

    format: str
    compute: str
    block_cosine: float
    latents_psnr: float
    frames_psnr: float
    block_bytes: int


@dataclass(frozen=True)
class Outcome:
    """What a model gave: each block's update of one input, and the job's result."""

    updates: list[Tensor]
    result: JobResult
    compute: str
    block_bytes: int


def write_model(folder: Path) -> Path:
    """A tiny text-to-video model with outliers in its block matrices."""
    write_tiny_model(folder, image_to_video=False, seed=1, transformer=_WIDTHS, vae={"base_dim": 8})
    (path,) = (folder / "transformer").glob("*.safetensors")
    tensors = load_file(path)
    generator = torch.Generator().manual_seed(2)
    for name in default_policy({key: tensor.shape for key, tensor in tensors.items()}):
        rows, columns = tensors[name].shape
        weight = torch.randn(rows, columns, generator=generator) / math.sqrt(columns)
        weight[torch.rand(rows, columns, generator=generator) < 1e-3] *= 8
        tensors[name] = weight
    save_file(tensors, path, {"format": "pt"})
    return folder


def run(folder: Path, compute: str, steps: int) -> Outcome:
    """Run a job and each block with ``compute``."""
    request = GenerationRequest(
        prompt="a red circle moves", negative_prompt="", width=64, height=48, frames=9,
        steps=steps, seed=3,
    )  # fmt: skip
    with Engine.open(folder, compute=compute, device="cpu", vram="1GiB", ram="1GiB") as engine:
        component = engine.model.transformer
        updates = [_update(component, index) for index in range(len(component.blocks))]
        result = engine.submit(request).result()
    layouts = (component.blocks[0], component.cross[0])
    return Outcome(updates, result, result.report.compute, sum(map(_stored_bytes, layouts)))


def _stored_bytes(layout: BlockLayout) -> int:
    return sum(place.nbytes for place in layout.places.values())


@torch.no_grad()
def _update(component: Component, index: int) -> Tensor:
    """What a block, run by diffusers' own forward, adds to a fixed input."""
    config, generator = component.module.config, torch.Generator().manual_seed(index)
    width = config.num_attention_heads * config.attention_head_dim
    hidden = torch.randn(1, 60, width, generator=generator)
    text = torch.randn(1, 32, width, generator=generator)
    modulation = 0.2 * torch.randn(1, 6, width, generator=generator)
    rope = component.module.rope(torch.empty(1, config.in_channels, 3, 8, 10))
    scratch_bytes = max(component.storage.scratch_bytes, component.context_storage.scratch_bytes)
    with _loaded(component, index) as block, component.scratch.held(scratch_bytes, "cpu"):
        return block(hidden, text, modulation, rope) - hidden


@contextmanager
def _loaded(component: Component, index: int) -> Iterator[Any]:
    """A block with all of its weights bound."""
    ledger = ByteLedger("memory", GIB)
    cpu = torch.device("cpu")
    options = {"device": cpu, "device_ledger": ledger, "host_ledger": ledger}
    with (
        load_block(component.blocks[index], **options) as streamed,
        load_block(component.cross[index], **options) as cross,
        component.templates[index].bound({**streamed, **cross}) as block,
    ):
        yield block


def psnr(found: Tensor, reference: Tensor, span: float) -> float:
    """Peak signal to noise in dB of values that range over ``span``; infinite where equal."""
    error = float((found.double() - reference.double()).square().mean())
    return math.inf if error == 0 else 10 * math.log10(span**2 / error)


def compare(name: str, found: Outcome, reference: Outcome) -> Quality:
    """One row of the table."""
    cosines = [
        float(cosine_similarity(ours.double().flatten(), theirs.double().flatten(), dim=0))
        for ours, theirs in zip(found.updates, reference.updates, strict=True)
    ]
    latents = reference.result.latents
    span = float(latents.max() - latents.min())
    return Quality(
        format=name,
        compute=found.compute,
        block_cosine=min(cosines),
        latents_psnr=psnr(found.result.latents, latents, span),
        frames_psnr=psnr(found.result.video, reference.result.video, 255.0),
        block_bytes=found.block_bytes,
    )


def measure(scratch: Path, formats: tuple[str, ...], steps: int) -> list[Quality]:
    """The table: every format, and those that multiply in 8 bits also that way."""
    model = write_model(scratch / "model")
    reference = run(model, "exact", steps)
    rows = []
    for name in formats:
        folder = pack(locate(model), name, scratch / name).folder
        for compute in ("exact", "fast") if name in FAST else ("exact",):
            rows.append(compare(name, run(folder, compute, steps), reference))
    return rows


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--formats", default=",".join(FORMATS))
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as scratch:
        rows = measure(Path(scratch), tuple(options.formats.split(",")), options.steps)
    head = ("format", "compute", "1 - block cosine", "latents dB", "frames dB", "bytes a block")
    print("{:<12} {:<16} {:>16} {:>10} {:>10} {:>14}".format(*head))
    for row in rows:
        print(
            f"{row.format:<12} {row.compute:<16} {1 - row.block_cosine:>16.2e} "
            f"{row.latents_psnr:>10.2f} {row.frames_psnr:>10.2f} {row.block_bytes:>14,}"
        )
    machine = {"machine": platform.machine(), "torch": torch.__version__, "steps": options.steps}
    table = [
        {key: None if value == math.inf else value for key, value in asdict(row).items()}
        for row in rows
    ]
    print(json.dumps(machine | {"rows": table}))


if __name__ == "__main__":
    main()
