"""How far two int8 files of the same weights lie apart that differ in nothing but what was rounded
which way: int8 and ConvRot int8 with all scales a few thousandths larger, on the trained model.

    python -m benchmarks.quality_draws [--pairs 2] [--draws 4]

A difference between two formats that is no larger than one between two draws of the same format
says nothing of the formats. The last line on stdout is JSON.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.quality import Clip, held_out
from benchmarks.quality_kept import Difference
from penstock.engine.engine import Engine
from penstock.engine.files.locate import Files
from penstock.engine.request.settings import resolve
from penstock.quant.values.rotation import unit_rotation
from tests.engine import golden

MINI = Path("penstock/assets/mini")
ROTATIONS = (0, 64)
"""int8 as it is, and ConvRot's in groups of 64, which divide every row of that model."""


def write(rotation: int, factor: float, folder: Path) -> Path:
    """The transformer in ComfyUI's int8, its scales ``factor`` times what takes in each row."""
    tensors = golden.load(MINI, "transformer")
    names = golden.original_names("transformer", list(tensors))
    said: dict[str, object] = {"format": "int8_tensorwise"}
    if rotation:
        said |= {"convrot": True, "convrot_groupsize": rotation}
    file: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if not golden.is_block_matrix(name, tensor):
            file[names[name]] = tensor.contiguous()
            continue
        weight = tensor.float()
        if rotation:
            weight = unit_rotation(weight.clone(), rotation) * rotation**-0.5
        scale = weight.abs().amax(1, keepdim=True) / 127 * factor
        layer = names[name].removesuffix(".weight")
        file[f"{layer}.weight"] = (weight / scale).round().clamp(-127, 127).to(torch.int8)
        file[f"{layer}.weight_scale"] = scale
        file[f"{layer}.comfy_quant"] = torch.tensor(
            list(json.dumps(said).encode()), dtype=torch.uint8
        )
    folder.mkdir()
    shutil.copy(MINI / "transformer" / "config.json", folder)
    save_file(file, folder / "transformer.safetensors")
    return folder / "transformer.safetensors"


def made(clips: Sequence[Clip], transformer: Path | None) -> list[tuple[Tensor, Tensor]]:
    """Latents and frames of every clip."""
    with Engine.open(MINI, files=Files(transformer=transformer), device="cpu") as engine:
        results = [engine.submit(resolve(c.settings, engine.model)).result() for c in clips]
    return [(result.latents, result.video) for result in results]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--pairs", type=int, default=2)
    parser.add_argument("--draws", type=int, default=4)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        clips = held_out(options.pairs, folder / "pictures")
        wanted = made(clips, None)
        for draw in range(options.draws):
            for rotation in ROTATIONS:
                file = write(rotation, 1 + 0.004 * draw, folder / f"{rotation}-{draw}")
                pairs = list(zip(made(clips, file), wanted, strict=True))
                latents = Difference.total(Difference.of(a[0], b[0]) for a, b in pairs)
                frames = Difference.total(Difference.of(a[1], b[1]) for a, b in pairs)
                rows.append(
                    {
                        "format": "int8-convrot" if rotation else "int8",
                        "scales": 1 + 0.004 * draw,
                        "latents_psnr": latents.psnr(),
                        "frames_psnr": frames.psnr(255.0),
                    }
                )
                print(rows[-1], flush=True)
    print(json.dumps({"torch": torch.__version__, "clips": options.pairs, "rows": rows}))


if __name__ == "__main__":
    main()
