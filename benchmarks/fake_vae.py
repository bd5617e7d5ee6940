"""Peak bytes of the VAE at 720p and 480p by tile grid, beside diffusers' whole frames.

Nothing is computed: tensors are fake, shapes and lifetimes are real. Run from the checkout:
``python -m benchmarks.fake_vae``. The last line on stdout is JSON.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from penstock.engine.families.wan.cost.vae import (
    VaeWork,
    decode_bytes,
    decode_work,
    encode_bytes,
    encode_work,
)
from penstock.engine.families.wan.spec import VaeSpec
from penstock.profiles.manifest import Weights
from penstock.profiles.phases import FIRST_FRAME
from penstock.profiles.tiling import TileGrid
from penstock.units import format_bytes
from tests.engine.families.wan.fake_vae import STEADY_LATENTS, FakeVae

SIZES = {"720x1280x81": (21, 90, 160), "480x832x81": (21, 60, 104)}
GRIDS = ((1, 1), (2, 2), (3, 3), (4, 4))
NONE = Weights(0, (), 2)
WAN = VaeSpec(NONE, NONE, 96, 16, (1, 2, 4, 4), 2, (False, True, True))


def diffusers_peaks(fake: FakeVae, latent: tuple[int, int, int]) -> dict[str, int]:
    """diffusers' own decode and encode of a few frames; all 81 only add the video itself."""
    _, height, width = latent
    frames = 1 + 4 * (STEADY_LATENTS - 1)

    def decode(vae: Any) -> Any:
        return vae.decode(
            torch.empty(1, 16, STEADY_LATENTS, height, width, dtype=fake.dtype)
        ).sample

    def encode(vae: Any) -> Any:
        clip = torch.empty(1, 3, frames, 8 * height, 8 * width, dtype=fake.dtype)
        return vae.encode(clip).latent_dist.mode()

    return {"decode": fake.peak_of(decode), "encode": fake.peak_of(encode)}


def row(fake: FakeVae, name: str, shape: tuple[int, int]) -> dict[str, Any]:
    """Measured and predicted figures of one size and grid."""
    latent, grid = SIZES[name], TileGrid(*shape)
    return {
        "size": name,
        "grid": f"{shape[0]}x{shape[1]}",
        "decode_bytes": fake.decode_peak(latent, grid),
        "decode_predicted_bytes": decode_bytes(WAN, latent, grid, 2).device_bytes,
        "decode_flops_ratio": ratio(decode_work, latent, grid),
        "encode_bytes": fake.encode_peak(latent, grid),
        "encode_predicted_bytes": encode_bytes(
            WAN, latent, grid, 2, changes=FIRST_FRAME
        ).device_bytes,
        "encode_flops_ratio": ratio(partial(encode_work, changes=FIRST_FRAME), latent, grid),
    }


def shown(rows: list[dict[str, Any]]) -> Table:
    """The rows as people read them."""
    table = Table(*(key.removesuffix("_bytes").replace("_", " ") for key in rows[0]))
    for entry in rows:
        cells = []
        for key, value in entry.items():
            cells.append(format_bytes(value) if key.endswith("bytes") else
                         f"{value:.3f}" if key.endswith("ratio") else value)  # fmt: skip
        table.add_row(*cells)
    return table


def ratio(work_of: Callable[..., VaeWork], latent: tuple[int, int, int], grid: TileGrid) -> float:
    """Arithmetic of a grid over that of one tile."""
    return work_of(WAN, latent, grid).flops / work_of(WAN, latent, TileGrid(1, 1)).flops


def main() -> None:
    """Print the table, then the JSON."""
    fake, console = FakeVae.make(torch.bfloat16), Console(stderr=True)
    rows = [row(fake, name, grid) for name in SIZES for grid in GRIDS]
    console.print(shown(rows))
    whole = {name: diffusers_peaks(fake, latent) for name, latent in SIZES.items()}
    for name, peaks in whole.items():
        console.print(f"diffusers {name}:", {k: format_bytes(v) for k, v in peaks.items()})
    machine = {"torch": torch.__version__, "machine": platform.machine(), "dtype": "bfloat16"}
    print(json.dumps({"rows": rows, "diffusers": whole, "machine": machine}))


if __name__ == "__main__":
    main()
