"""What each weight format costs in quality, against the weights as a model's files hold them.

    python -m benchmarks.quality [--model FOLDER] [--formats int8,fp8,...] [--prompt TEXT]...
        [--image FILE] [--size WxH] [--frames N] [--steps N] [--threads N]

Without ``--model`` a tiny random one is made: its block matrices are Gaussian with rare outliers
(one weight in a thousand, eight times as large) and it computes in fp32, so that all differences
are the format's. A random model says how formats compare, not what a video looks like.

For each format the transformer is packed, and the whole model run:

- layer: 1 - cosine of a matrix's output on Gaussian inputs, the worst of all matrices;
- block: 1 - cosine of what a block adds to its input, the worst of all blocks;
- latents and frames: PSNR in dB over the range of the reference (frames: 255), of all videos
  together; and the latents' cosine;
- bytes a block;
- score: what a caller's own judge says of the videos, if there is one (`measure`).

Formats that are only read (GGUF's K-quants and 4/5-bit types) cannot be made here. The last line on
stdout is JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from penstock.engine.engine import Engine
from penstock.engine.firstuse import FirstUse
from penstock.engine.locate import Files, locate
from penstock.engine.model import Component
from penstock.engine.settings import Settings, resolve
from penstock.engine.synthetic import write_tiny_model
from penstock.offload.layout import BlockLayout
from penstock.offload.ledger import ByteLedger
from penstock.offload.streamer import load_block
from penstock.quant.format import writable
from penstock.quant.linear import QuantLinear
from penstock.quant.policy import default_policy
from penstock.units import GIB

FAST = ("int8", "fp8")
"""Formats that are also multiplied in 8 bits."""

Score = Callable[[Sequence[Tensor]], float]
"""Judges videos, uint8 (frames, h, w, 3), in the order of their settings."""

_WIDTHS = {"num_attention_heads": 2, "attention_head_dim": 128, "ffn_dim": 512, "num_layers": 4}
_TINY = Settings(
    prompt="a red circle moves", negative_prompt="", size="64x48", frames=9, steps=4, seed=3
)
_TEXT_TOKENS, _IMAGE_TOKENS = 512, 17


@dataclass(frozen=True)
class Quality:
    """One row of the table; infinite PSNR where nothing differs, no score without a judge."""

    format: str
    compute: str
    layer_error: float
    block_error: float
    latents_cosine: float
    latents_psnr: float
    frames_psnr: float
    block_bytes: int
    score: float | None


@dataclass(frozen=True)
class Outcome:
    """What a model gave: outputs of each block's matrices and of each block, and the videos."""

    layers: list[Tensor]
    updates: list[Tensor]
    latents: list[Tensor]
    videos: list[Tensor]
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


def run(model: Path, files: Files, compute: str, settings: Sequence[Settings]) -> Outcome:
    """Make the videos, and apply each matrix and each block, computing as ``compute`` says."""
    with Engine.open(model, files=files, compute=compute, device="cpu") as engine:
        component = engine.model.transformer
        storage = engine.model.manifest.transformer
        parts = (storage.storage, storage.context_storage or storage.storage)
        layers: list[Tensor] = []
        updates = []
        with engine.model.scratch.held(max(part.scratch_bytes for part in parts)):
            for index in range(len(component.blocks)):
                with _loaded(component, index) as block:
                    layers += _layer_outputs(block, index, component.dtype)
                    updates.append(_update(component, block, index))
        results = [engine.submit(resolve(each, engine.model)).result() for each in settings]
    path = results[0].report.compute_path
    return Outcome(
        layers,
        updates,
        [result.latents for result in results],
        [result.video for result in results],
        f"{compute} ({path})",
        sum(map(_stored_bytes, (component.blocks[0], component.cross[0]))),
    )


def _stored_bytes(layout: BlockLayout) -> int:
    return sum(place.nbytes for place in layout.places.values())


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

    rope = component.module.rope(torch.empty(1, config.in_channels, 3, 4 * height, 5 * across))
    hidden, context, modulation = noise(1, 60, width), noise(1, tokens, width), noise(1, 6, width)
    update: Tensor = block(hidden, context, (0.2 * modulation).float(), rope) - hidden
    return update


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


def psnr(found: Tensor, reference: Tensor, span: float) -> float:
    """Peak signal to noise in dB of values that range over ``span``; infinite where equal."""
    error = float((found.double() - reference.double()).square().mean())
    return math.inf if error == 0 else 10 * math.log10(span**2 / error)


def compare(name: str, found: Outcome, reference: Outcome, score: Score | None) -> Quality:
    """One row of the table."""
    ours, theirs = (_joined(each.latents) for each in (found, reference))
    return Quality(
        format=name,
        compute=found.compute,
        layer_error=worst(found.layers, reference.layers),
        block_error=worst(found.updates, reference.updates),
        latents_cosine=cosine(ours, theirs),
        latents_psnr=psnr(ours, theirs, float(theirs.max() - theirs.min())),
        frames_psnr=psnr(_joined(found.videos), _joined(reference.videos), 255.0),
        block_bytes=found.block_bytes,
        score=None if score is None else score(found.videos),
    )


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


def measure(
    model: Path,
    scratch: Path,
    formats: Sequence[str],
    settings: Sequence[Settings],
    score: Score | None = None,
) -> Iterator[Quality]:
    """The table, a row as soon as it is known: the model as stored, then every format, and those
    that multiply in 8 bits also that way.

    Args:
        model: a folder, or anything else that `penstock.engine.locate.locate` takes.
        scratch: a folder for packs.
        settings: of the videos to make; each with a seed.
        score: adds a column.
    """
    source = locate(model).transformer
    reference = run(model, Files(), "exact", settings)
    yield compare("as stored", reference, reference, score)
    for name in formats:
        use = FirstUse.of(source, name, scratch)
        use.make(GIB, lambda nbytes: None)
        files = Files(transformer=use.folder / "transformer")
        for compute in ("exact", "fast") if name in FAST else ("exact",):
            yield compare(name, run(model, files, compute, settings), reference, score)


_HEAD = (
    "format",
    "compute",
    "layer",
    "block",
    "lat. cos",
    "lat. dB",
    "frames dB",
    "bytes",
    "score",
)


def line(row: Quality) -> str:
    """A row for people."""
    score = "" if row.score is None else f"{row.score:.3f}"
    return (
        f"{row.format:<12} {row.compute:<16} {row.layer_error:>9.2e} {row.block_error:>9.2e} "
        f"{row.latents_cosine:>9.6f} {row.latents_psnr:>8.2f} {row.frames_psnr:>9.2f} "
        f"{row.block_bytes:>12,} {score:>7}"
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path)
    parser.add_argument("--formats", default=",".join(writable()))
    parser.add_argument("--prompt", action="append")
    parser.add_argument("--image", type=Path)
    parser.add_argument("--size")
    parser.add_argument("--frames", type=int)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as scratch:
        model = options.model or write_model(Path(scratch) / "model")
        base = _TINY if options.model is None else Settings(prompt=_TINY.prompt, seed=_TINY.seed)
        settings = [_changed(base, options, text) for text in options.prompt or [base.prompt]]
        print("{:<12} {:<16} {:>9} {:>9} {:>9} {:>8} {:>9} {:>12} {:>7}".format(*_HEAD))
        rows = []
        for row in measure(model, Path(scratch), options.formats.split(","), settings):
            rows.append(row)
            print(line(row), flush=True)
    facts = {"machine": platform.machine(), "torch": torch.__version__, "videos": len(settings)}
    print(json.dumps(facts | {"model": str(options.model), "rows": [_plain(row) for row in rows]}))


def _changed(base: Settings, options: argparse.Namespace, prompt: str) -> Settings:
    given = {name: getattr(options, name) for name in ("image", "size", "frames", "steps")}
    named = {name: value for name, value in given.items() if value is not None}
    return Settings(**(asdict(base) | named | {"prompt": prompt}))


def _plain(row: Quality) -> dict[str, object]:
    """For JSON, which has no infinity."""
    return {key: None if value == math.inf else value for key, value in asdict(row).items()}


if __name__ == "__main__":
    main()
