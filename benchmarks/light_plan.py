"""What a plan and a refusal take, beside `import torch`, which they do without.

    python -m benchmarks.light_plan [--rounds 5] [--against FOLDER]

Each is a process of its own: `penstock plan --model` and a `penstock generate` that cannot fit, of
the model in the box and of the headers of the true I2V 14B model (the files behind them are holes).
They take turns within one run, with `import torch` as a process of its own, and with another
checkout of penstock in ``--against FOLDER``. A ratio is the command's median over `import torch`'s,
or the other checkout's over this one's, in CPU seconds; wall seconds stand beside them. Modules are
compiled before the first round, as they are after an installation. The last line on stdout is JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from benchmarks.fake_dit import I2V_14B
from penstock.engine.families.wan.kinds import KINDS
from penstock.engine.packs.names import FILE_NAMES
from penstock.engine.request.demo import MINI

HERE = Path(__file__).parents[1]
ENCODERS: Mapping[str, dict[str, Any]] = {
    "text_encoder": {
        "vocab_size": 256384, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24,
        "num_heads": 64, "relative_attention_num_buckets": 32,
    },
    "image_encoder": {
        "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32,
        "num_attention_heads": 16, "num_channels": 3, "image_size": 224, "patch_size": 14,
    },
    "vae": {
        "base_dim": 96, "z_dim": 16, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 2,
        "temperal_downsample": [False, True, True],
    },
}  # fmt: skip
"""Of Wan-AI/Wan2.1-I2V-14B-720P-Diffusers, beside the transformer's."""


def write_headers(folder: Path) -> Path:
    """A model folder of true shapes in bf16: headers, and files as long as they say, with holes."""
    transformer = I2V_14B | {"cross_attn_norm": True}
    for component, config in {"transformer": transformer, **ENCODERS}.items():
        path = folder / component / FILE_NAMES[KINDS[component].made_by[0]]
        path.parent.mkdir(parents=True)
        (path.parent / "config.json").write_text(json.dumps(config))
        header: dict[str, Any] = {}
        end = 0
        for name, shape in KINDS[component].shapes(config).items():
            start, end = end, end + 2 * math.prod(shape)
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
        text = json.dumps(header).encode()
        with path.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + end)
    for name in ("tokenizer", "scheduler", "image_processor", "model_index.json"):
        (folder / name).symlink_to(Path(MINI) / name)
    return folder


def cases(folder: Path) -> dict[str, list[str]]:
    """Arguments of python by name; the refusals are by the VRAM budget."""
    picture = folder / "picture.png"
    Image.new("RGB", (64, 64)).save(picture)
    true, small = str(write_headers(folder / "14b")), str(MINI)
    generate = ["-m", "penstock", "generate", "--prompt", "x", "--image", str(picture),
                "-o", str(folder / "never.mp4")]  # fmt: skip
    budgets = ["--ram", "40GiB", "--vram"]
    return {
        "import torch": ["-c", "import torch"],
        "plan, model in the box": ["-m", "penstock", "plan", "--model", small],
        "plan, true 14B": ["-m", "penstock", "plan", "--model", true, *budgets, "12GiB"],
        "refusal, model in the box": [*generate, "--model", small, "--vram", "1MiB"],
        "refusal, true 14B": [*generate, "--model", true, *budgets, "1GiB"],
    }


def seconds(arguments: Sequence[str], tree: Path, folder: Path) -> tuple[float, float]:
    """CPU and wall seconds of one process in the checkout ``tree``."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environ |= {"PYTHONPATH": str(tree), "PYTHONPYCACHEPREFIX": str(folder / "compiled")}
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(
        [sys.executable, *arguments], cwd=tree, env=environ, capture_output=True, text=True
    )
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    expected = 1 if "generate" in arguments else 0
    if done.returncode != expected or (expected and "no plan fits" not in done.stderr):
        raise RuntimeError(f"{arguments}: {done.returncode} {done.stderr[-500:]}")
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, wall


def measured(trees: Mapping[str, Path], rounds: int, folder: Path) -> dict[str, dict[str, Any]]:
    """Median CPU and wall seconds of each case in each checkout."""
    taken: dict[tuple[str, str], list[tuple[float, float]]] = {}
    commands = cases(folder)
    for turn in range(rounds + 1):  # the first compiles
        for name, arguments in commands.items():
            for tree in list(trees)[:: -1 if turn % 2 else 1]:
                found = seconds(arguments, trees[tree], folder)
                if turn:
                    taken.setdefault((name, tree), []).append(found)
    return {name: {tree: _medians(taken[name, tree]) for tree in trees} for name in commands}


def _medians(pairs: Sequence[tuple[float, float]]) -> dict[str, float]:
    cpu, wall = zip(*pairs, strict=True)
    return {
        "cpu_s": round(statistics.median(cpu), 3),
        "wall_s": round(statistics.median(wall), 3),
        "longest_wall_s": round(max(wall), 3),
    }


def main() -> None:
    """Measure, print a row a case, and last the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--against", type=Path)
    options = parser.parse_args()
    trees = {"here": HERE} | ({"against": options.against.resolve()} if options.against else {})
    with tempfile.TemporaryDirectory() as folder:
        found = measured(trees, options.rounds, Path(folder))
    torch_s = found["import torch"]["here"]["cpu_s"]
    for name, sides in found.items():
        sides["over_import_torch"] = round(sides["here"]["cpu_s"] / torch_s, 3)
        if options.against:
            sides["against_over_here"] = round(
                sides["against"]["cpu_s"] / sides["here"]["cpu_s"], 2
            )
        print(f"{name:28} {json.dumps(sides)}", flush=True)
    print(
        json.dumps({"python": sys.version.split()[0], "rounds": options.rounds, "results": found})
    )


if __name__ == "__main__":
    main()
