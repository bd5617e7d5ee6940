"""The VAE beside an earlier build of it: seconds, bits, and what tiles cost.

Two processes, one with this checkout's engine and one with that of ``--old``, do the same work in
turns on the same random VAE of the true structure, each on one thread; CPU seconds are compared,
and the medians of pairs are told. It takes some three minutes of them.

- ``encode``: the conditioning clip of 81 frames, whole and in tiles, fp32 and bf16;
- ``decode``: the first latents of a 720p video, whole and in 3x3 tiles: the ratio of the two beside
  that of their arithmetic. ``counted`` are the tensor operations that compute or copy in bf16, and
  the bytes that they allocate, on small latents: they are as many at any size.

The last line on stdout is JSON.

    python -m benchmarks.vae_reuse --old ../earlier [--pairs 2]
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FRAMES = 81
ENCODE = {"base_dim": 16, "latent": (1 + (FRAMES - 1) // 4, 8, 12), "grids": ((1, 1), (2, 2))}
DECODE = {"base_dim": 8, "latent": (2, 90, 160), "grids": ((1, 1), (3, 3))}
NAMES = ("old", "new")


# In each process.


class Worker:
    """One engine, and the VAEs that it was asked for."""

    def __init__(self) -> None:
        import torch

        torch.set_num_threads(1)
        self._torch = torch
        found = importlib.util.find_spec("penstock.engine.families")
        package = "penstock.engine.families.wan" if found else "penstock.engine.wan"
        self._encode = importlib.import_module(f"{package}.vae_encode")
        self._decode = importlib.import_module(f"{package}.vae_decode")
        self._grid = importlib.import_module("penstock.profiles.tiling").TileGrid
        self._vaes: dict[tuple[int, str], Any] = {}

    def run(self, order: dict[str, Any]) -> dict[str, Any]:
        """CPU seconds and a digest of the result; with ``count``, operations and bytes instead."""
        work = getattr(self, f"_{order['half']}d")(order)
        if order.get("count"):
            with _counting() as counted:
                work()
            return {"operations": counted.operations, "allocated_bytes": counted.bytes}
        began = time.process_time()
        made = work()
        seconds = time.process_time() - began
        bits = made.contiguous().view(self._torch.uint8).numpy()
        return {"s": seconds, "digest": hashlib.sha256(bits.tobytes()).hexdigest()}

    def _encoded(self, order: dict[str, Any]) -> Any:
        torch, (frames, height, width) = self._torch, order["latent"]
        size = 1 + 4 * (frames - 1), 8 * height, 8 * width
        vae = self._vae(order)
        picture = torch.rand(3, *size[1:], generator=torch.Generator().manual_seed(1)) * 2 - 1
        source = self._encode.first_frame_then_zeros(picture.to(vae.dtype))
        grid = self._grid(*order["grid"])
        # The engine from before equal frames were encoded once is not told of them.
        told = {"changes": (0, 1)} if order["told"] else {}
        return lambda: self._encode.encode_tiled(vae, source, size, grid, **told)

    def _decoded(self, order: dict[str, Any]) -> Any:
        torch, vae = self._torch, self._vae(order)
        noise = torch.randn(1, 16, *order["latent"], generator=torch.Generator().manual_seed(2))
        latents, grid = noise.to(vae.dtype), self._grid(*order["grid"])
        return lambda: self._decode.decode_frames(vae, latents, grid)

    def _vae(self, order: dict[str, Any]) -> Any:
        from diffusers import AutoencoderKLWan

        key = order["base_dim"], order["dtype"]
        if key not in self._vaes:
            self._torch.manual_seed(0)
            dtype = getattr(self._torch, order["dtype"])
            self._vaes[key] = AutoencoderKLWan(base_dim=order["base_dim"]).to(dtype).eval()
        return self._vaes[key]


def _counting() -> Any:
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_iter

    class Counting(TorchDispatchMode):  # type: ignore[no-untyped-call]
        """Counts operations that are no views, and the bytes of storages that they make."""

        operations = bytes = 0

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            given = {
                leaf.untyped_storage()._cdata
                for leaf in tree_iter((args, kwargs or {}))
                if isinstance(leaf, torch.Tensor)
            }
            made = func(*args, **(kwargs or {}))
            fresh = [
                leaf.untyped_storage()
                for leaf in tree_iter(made)
                if isinstance(leaf, torch.Tensor) and leaf.untyped_storage()._cdata not in given
            ]
            self.bytes += sum(storage.nbytes() for storage in fresh)
            changes = any(each.alias_info and each.alias_info.is_write
                          for each in func._schema.arguments)  # fmt: skip
            empty = "empty" in func._schema.name
            self.operations += bool((fresh or changes) and not empty)
            return made

    return Counting()  # type: ignore[no-untyped-call]


def serve() -> None:
    """Answer orders, a line of JSON each."""
    worker = Worker()
    for line in sys.stdin:
        print(json.dumps(worker.run(json.loads(line))), flush=True)


# In the one that compares.


class Engine:
    """The process of one checkout."""

    def __init__(self, checkout: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--serve"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, text=True, env=os.environ | {"PYTHONPATH": str(checkout)},
        )  # fmt: skip

    def run(self, **order: Any) -> dict[str, Any]:
        """As `Worker.run`."""
        assert self._process.stdin is not None and self._process.stdout is not None
        print(json.dumps(order), file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        if not answer:
            sys.exit("a process ended: run this script with --serve and the order to see why")
        return json.loads(answer)  # type: ignore[no-any-return]

    def close(self) -> None:
        """End it."""
        self._process.communicate()


def cases() -> Iterator[dict[str, Any]]:
    """Each work that is compared."""
    for half, case, dtypes in (
        ("encode", ENCODE, ("float32", "bfloat16")),
        ("decode", DECODE, ("float32",)),
    ):
        for dtype in dtypes:
            for grid in case["grids"]:  # type: ignore[attr-defined]
                yield {
                    "half": half, "dtype": dtype, "grid": grid, "base_dim": case["base_dim"],
                    "latent": case["latent"],
                }  # fmt: skip


def compared(engines: dict[str, Engine], case: dict[str, Any], pairs: int) -> dict[str, Any]:
    """One case in turns, the first of each pair changing."""
    seconds: dict[str, list[float]] = {name: [] for name in NAMES}
    digests = set()
    for pair in range(pairs):
        for name in NAMES if pair % 2 == 0 else NAMES[::-1]:
            found = engines[name].run(**case, told=name == "new")
            seconds[name].append(found["s"])
            digests.add(found["digest"])
    ratios = [new / old for old, new in zip(seconds["old"], seconds["new"], strict=True)]
    return case | {
        "seconds": seconds,
        "new_over_old": statistics.median(ratios),
        "identical": len(digests) == 1,
    }


def tiles_over_whole(rows: list[dict[str, Any]], engines: dict[str, Engine]) -> dict[str, Any]:
    """What 3x3 tiles cost of a decoding, by each engine, beside the arithmetic."""
    from penstock.engine.families.wan.cost.vae import decode_work
    from penstock.engine.families.wan.spec import VaeSpec
    from penstock.profiles.manifest import Weights
    from penstock.profiles.tiling import TileGrid

    none, grids = Weights(0, (), 4), [TileGrid(*grid) for grid in DECODE["grids"]]  # type: ignore[attr-defined]
    spec = VaeSpec(none, none, DECODE["base_dim"], 16, (1, 2, 4, 4), 2, (False, True, True))  # type: ignore[arg-type]
    whole, tiled = (decode_work(spec, DECODE["latent"], grid) for grid in grids)  # type: ignore[arg-type]
    found: dict[str, Any] = {
        "flops": tiled.flops / whole.flops,
        "elements": tiled.elements / whole.elements,
    }
    for name in NAMES:
        pairs = zip(*(row["seconds"][name] for row in rows), strict=True)
        found[name] = statistics.median(b / a for a, b in pairs)
    return found


def main() -> None:
    """Print a line a case, then the JSON."""
    arguments = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    arguments.add_argument("--old", type=Path, help="checkout of the earlier build")
    arguments.add_argument("--pairs", type=int, default=2)
    arguments.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = arguments.parse_args()
    if options.serve:
        serve()
        return
    if options.old is None:
        arguments.error("--old is needed: a checkout to compare with")
    here = Path(__file__).resolve().parent.parent
    engines = {"old": Engine(options.old.resolve()), "new": Engine(here)}
    rows = []
    for case in cases():
        rows.append(compared(engines, case, options.pairs))
        print(rows[-1], file=sys.stderr)
    decoded = [row for row in rows if row["half"] == "decode"]
    counted = {
        name: [
            engine.run(
                **(row | {"dtype": "bfloat16", "latent": (2, 9, 12)}), count=True, told=False
            )
            for row in decoded
        ]
        for name, engine in engines.items()
    }
    report = {
        "clock": "CPU seconds of a process, one thread",
        "encode_new_over_old": max(r["new_over_old"] for r in rows if r["half"] == "encode"),
        "identical": all(row["identical"] for row in rows),
        "tiles_over_whole": tiles_over_whole(decoded, engines),
        "counted": counted,
        "rows": rows,
        "machine": platform.machine(),
    }
    for engine in engines.values():
        engine.close()
    print(json.dumps(report))


if __name__ == "__main__":
    main()
