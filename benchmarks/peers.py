"""Streaming beside what others do with a model that is too large: same weights, same forward.

    python -m benchmarks.peers [--folder DIR] [--blocks 10] [--rounds 2] [--cases a,b]

A transformer of Wan2.1 14B's true widths with random bf16 weights is written, and each peer does
the same forward (one branch, few tokens, so that bringing the weights is what is measured) in a
process of its own, the page cache emptied of the files before every forward that reads them:

- ``resident``: diffusers' `WanTransformer3DModel`, all weights in memory;
- ``mmap``: the same module over a memory-mapped safetensors file;
- ``accelerate_cpu`` and ``accelerate_disk``: `cpu_offload` and `disk_offload`, the latter from the
  files it makes for itself beforehand (which is not timed);
- ``group_offload`` and ``group_offload_disk``: diffusers' own, a block at a time, with a stream on
  CUDA;
- ``aircanvas``, where it can be imported: its engine over its own shards, uncompressed;
- ``penstock_disk`` and ``penstock_ram``: every block streamed from disk; every block kept in RAM;
- ``penstock_stream``: diffusers' module under `penstock.stream`, every block from disk;
- on CUDA also ``model_offload`` and ``sequential_offload`` (what diffusers' pipelines call so),
  and ``mmgp`` where it can be imported.

``first_s`` is the first forward, nothing prepared; ``step_s`` the later ones: penstock then has
the cross-attention K/V, which do not change from step to step, and others compute them again.
``plain`` are sequential direct reads of the same file; ``disk_tier_over_plain`` holds the rate
while the tier was reading against theirs, ``forward_over_plain`` all blocks over a whole step.
The last line on stdout is JSON.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

from benchmarks.disk_tier import read_plain
from penstock.engine.machine.disk import forget

Forward = Callable[[], Any]
SEED = 0
READY = "ready"
CHUNK_TOKENS = 1 << 16


def main() -> None:
    """Run one peer, or all of them in processes of their own."""
    options = parse()
    if options.case is not None:
        os.environ["DIFFUSERS_VERBOSITY"] = os.environ["TRANSFORMERS_VERBOSITY"] = "error"
        if is_told_to_go():
            print(json.dumps(play(options)))
        return
    with ExitStack() as stack:
        folder = options.models
        if folder is None:
            made = tempfile.TemporaryDirectory(dir=options.folder, prefix="penstock-peers-")
            folder = Path(stack.enter_context(made))
        report = measure(options, folder)
    print(json.dumps(report))


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, or ``arguments`` in its place."""
    parser = argparse.ArgumentParser(description="penstock beside its peers")
    parser.add_argument("--folder", default=None, help="where the files are written, twice their")
    parser.add_argument("--models", type=Path, default=None, help="where they are, or are kept")
    parser.add_argument("--name", default="wan2.1-i2v-14b")
    parser.add_argument("--blocks", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=2, help="forwards after the first")
    parser.add_argument("--size", default="64x64x5", help="pixels and frames")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--save", type=Path, default=None, help="a file, written after each peer")
    parser.add_argument("--cases", default=None, help="some of the peers, by name")
    parser.add_argument("--case", default=None, help=argparse.SUPPRESS)
    parser.add_argument("--limit-s", type=float, default=900, help="for one peer")
    return parser.parse_args(arguments)


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Write the model, let every peer run, and set them side by side."""
    report: dict[str, Any] = {}
    path = weights_file(folder)
    if not path.exists():
        written = outcome(start(options, "write", folder), options.limit_s)
        if "failed" in written:
            sys.exit(written["failed"])
    found: dict[str, Any] = {}
    for name in wanted(options):
        found[name] = measured(start(options, name, folder), name, options, folder)
        print(f"{name}: {json.dumps(found[name])}", flush=True)
        report = summary(options, found, path.stat().st_size)
        if options.save is not None:  # after each peer, so that a run cut short keeps what it has
            options.save.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return report


def wanted(options: argparse.Namespace) -> list[str]:
    """The peers of this run."""
    known = [name for name in PEERS if options.device == "cuda" or name not in ON_CUDA]
    if options.cases is None:
        return [name for name in known if name not in PACKAGES or importlib.util.find_spec(name)]
    chosen: list[str] = options.cases.split(",")
    strangers = sorted(set(chosen) - set(known))
    if strangers:
        sys.exit(f"unknown peers: {', '.join(strangers)}; there are {', '.join(known)}")
    return chosen


def start(options: argparse.Namespace, case: str, folder: Path) -> subprocess.Popen[str]:
    """A peer's process: it imports what it needs, says so, and waits for a line to go on."""
    flags = ["--case", case, "--folder", str(folder), "--blocks", str(options.blocks)]
    flags += ["--rounds", str(options.rounds), "--size", options.size, "--name", options.name]
    command = [sys.executable, "-m", "benchmarks.peers", *flags, "--device", options.device]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True)


def is_told_to_go() -> bool:
    """In a peer's process: import what takes seconds, then wait; False if nobody is there."""
    for name in ("accelerate", "diffusers.models.transformers.transformer_wan"):
        importlib.import_module(name)
    print(READY, flush=True)
    return bool(sys.stdin.readline())


def await_ready(process: subprocess.Popen[str]) -> None:
    """Until its imports are over, or the process is."""
    assert process.stdout is not None
    while process.stdout.readline().strip() not in (READY, ""):
        pass


def measured(
    process: subprocess.Popen[str], name: str, options: argparse.Namespace, folder: Path
) -> dict[str, Any]:
    """What a peer reports and, where it read the disk, how long plain reads take."""
    path = weights_file(folder)
    forget(path)
    found = outcome(process, options.limit_s)
    if name in FROM_DISK:
        found["plain_s"] = timed(lambda: read_plain(path))
    return found


def outcome(process: subprocess.Popen[str], limit_s: float) -> dict[str, Any]:
    """Let a peer do its work: what it reports; its failure is a report too."""
    try:
        stdout, stderr = process.communicate("go\n", timeout=limit_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return {"failed": f"longer than {limit_s:g} s"}
    if process.returncode != 0:
        return {"failed": stderr.strip().splitlines()[-1][:300] if stderr else "killed"}
    report: dict[str, Any] = json.loads(stdout.splitlines()[-1])
    return report


def summary(
    options: argparse.Namespace, found: Mapping[str, Any], file_bytes: int
) -> dict[str, Any]:
    """All figures, and the ratios that matter: others' seconds over those of penstock's."""
    ours = found.get("penstock_disk", {})
    plain_s = [row["plain_s"] for row in found.values() if "plain_s" in row]
    report: dict[str, Any] = {
        "benchmark": "peers",
        "machine": f"{platform.platform()}, {os.cpu_count()} cores",
        "threads": os.environ.get("OMP_NUM_THREADS", "default"),
        "device": options.device,
        "model": f"{options.name}, {options.blocks} blocks, bf16",
        "file_bytes": file_bytes,
        "size": options.size,
        "rounds": options.rounds,
        "plain_gb_per_s": file_bytes / statistics.median(plain_s) / 1e9 if plain_s else None,
        "peers": dict(found),
        "same_output": same(found),
    }
    if "step_s" in ours:
        report["against_penstock_disk"] = {
            name: {
                key: round(row[key] / ours[key], 3) for key in ("first_s", "step_s") if key in row
            }
            for name, row in found.items()
            if name != "penstock_disk" and "failed" not in row
        }
        streamed_rate = ours["pass_bytes"] / ours["step_s"] / 1e9
        report["forward_over_plain"] = round(streamed_rate / report["plain_gb_per_s"], 3)
        report["disk_tier_over_plain"] = round(ours["read_gb_per_s"] / report["plain_gb_per_s"], 3)
    return report


def same(found: Mapping[str, Any]) -> bool:
    """Whether all that ran gave the same bits."""
    return len({row["output_sha256"] for row in found.values() if "failed" not in row}) == 1


def weights_file(folder: Path) -> Path:
    """The transformer's file."""
    return folder / "model" / "transformer" / "diffusion_pytorch_model.safetensors"


def play(options: argparse.Namespace) -> dict[str, Any]:
    """One peer (or the writer) in this process."""
    folder = Path(options.folder)
    if options.case == "write":
        return write(options, folder)
    with PEERS[options.case](options, folder) as (forward, figures):
        return {**run_forwards(options, folder, forward), **figures()}


def run_forwards(options: argparse.Namespace, folder: Path, forward: Forward) -> dict[str, Any]:
    """Seconds of the first forward and of the others, the process's peak, the output's hash."""
    import hashlib

    import torch

    seconds, digests = [], set()
    for _ in range(1 + options.rounds):
        drop_cache(folder)
        started = time.perf_counter()
        with torch.no_grad():
            output = forward().float().cpu()
        seconds.append(time.perf_counter() - started)
        digests.add(hashlib.sha256(output.contiguous().numpy().tobytes()).hexdigest())
        del output
        gc.collect()
    assert len(digests) == 1, "a peer that does not repeat itself"
    return {
        "first_s": round(seconds[0], 3),
        "step_s": round(statistics.median(seconds[1:]), 3),
        "steps_s": [round(each, 3) for each in seconds[1:]],
        "peak_bytes": resident_peak(),
        "vram_bytes": vram_peak(options.device),
        "output_sha256": digests.pop(),
    }


def drop_cache(folder: Path) -> None:
    """Forget every file that holds weights."""
    for path in folder.rglob("*"):
        if path.suffix in (".safetensors", ".dat"):
            forget(path)


def resident_peak() -> int:
    """VmHWM: what the kernel says this process held at most."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(next(line for line in status.splitlines() if "VmHWM" in line).split()[1]) << 10


def vram_peak(device: str) -> int:
    """What torch's CUDA allocator held at most."""
    import torch

    return int(torch.cuda.max_memory_reserved()) if device == "cuda" else 0


def timed(work: Callable[[], object]) -> float:
    """Seconds of one call."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def write(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Make the model."""
    from transformers.utils import logging

    from penstock.engine.bench.weights import write_synthetic

    logging.disable_progress_bar()
    write_synthetic(
        folder / "model", options.name, blocks=options.blocks, weight_format="bf16", seed=SEED
    )
    return {}


# The peers: each gives a forward, and what else is to be told at the end.

Peer = Iterator[tuple[Forward, Callable[[], dict[str, Any]]]]


def nothing() -> dict[str, Any]:
    """Nothing else."""
    return {}


def empty_model(folder: Path) -> Any:
    """diffusers' module on the meta device; buffers (rotary tables) are real."""
    import torch
    from accelerate import init_empty_weights
    from diffusers import WanTransformer3DModel

    config = WanTransformer3DModel.load_config(folder / "model" / "transformer")
    with init_empty_weights(include_buffers=False):
        model = WanTransformer3DModel.from_config(config).eval().requires_grad_(False)
    for parameter in model.parameters():  # as the file has them: hooks cast to what they find
        parameter.data = parameter.data.to(torch.bfloat16)
    return model


def tensors(folder: Path) -> Iterator[tuple[str, Any]]:
    """The weights of the file, one at a time."""
    from safetensors import safe_open

    with safe_open(str(weights_file(folder)), "pt") as file:
        for name in file.keys():  # noqa: SIM118 - no mapping
            if not name.startswith("__"):
                yield name, file.get_tensor(name)


def inputs(options: argparse.Namespace) -> dict[str, Any]:
    """What every forward is given; the same values whatever the peer."""
    import torch

    from penstock.engine.bench.synthetic import synthetic

    width, height, frames = (int(part) for part in options.size.split("x"))
    config = synthetic(options.name).streamed
    draw = torch.Generator().manual_seed(SEED)

    def random(*shape: int) -> Any:
        value = torch.randn(*shape, generator=draw).to(torch.bfloat16)
        return value.to(options.device)

    latent = (1 + (frames - 1) // 4, height // 8, width // 8)
    return {
        "hidden_states": random(1, config["in_channels"], *latent),
        "encoder_hidden_states": random(1, 512, config["text_dim"]),
        "encoder_hidden_states_image": random(1, 257, config["image_dim"]),
        "timestep": torch.tensor([713], device=options.device),
    }


def call(model: Any, given: Mapping[str, Any]) -> Forward:
    """The module's own forward."""
    return lambda: model(**given).sample


def loaded(folder: Path, device: str) -> Any:
    """The module with all its weights on ``device``."""
    model = empty_model(folder)
    whole = {name: tensor.clone().to(device) for name, tensor in tensors(folder)}
    model.load_state_dict(whole, assign=True, strict=True)
    return model.to(device)


@contextmanager
def resident(options: argparse.Namespace, folder: Path) -> Peer:
    """Everything in memory."""
    yield call(loaded(folder, options.device), inputs(options)), nothing


@contextmanager
def mapped(options: argparse.Namespace, folder: Path) -> Peer:
    """The file mapped anew for each forward, so that each finds the page cache empty."""
    from safetensors.torch import load_file

    model, given = empty_model(folder), inputs(options)

    def forward() -> Any:
        whole = load_file(weights_file(folder), device=options.device)
        whole = {name: tensor for name, tensor in whole.items() if not name.startswith("__")}
        model.load_state_dict(whole, assign=True, strict=True)
        output = call(model.to(options.device), given)()
        model.to("meta")
        return output

    rope = {name: buffer.clone() for name, buffer in model.rope.named_buffers()}

    def with_rope() -> Any:
        for name, buffer in rope.items():
            setattr(model.rope, name, buffer.to(options.device))
        return forward()

    yield with_rope, nothing


@contextmanager
def accelerate_cpu(options: argparse.Namespace, folder: Path) -> Peer:
    """Weights in RAM, hooks bring each layer's: what sequential offload is."""
    import torch
    from accelerate import cpu_offload

    model = cpu_offload(loaded(folder, "cpu"), torch.device(options.device))
    yield call(model, inputs(options)), nothing


@contextmanager
def accelerate_disk(options: argparse.Namespace, folder: Path) -> Peer:
    """Weights in accelerate's own memory-mapped files."""
    import torch
    from accelerate import disk_offload
    from accelerate.utils import offload_weight, save_offload_index

    place = folder / "offloaded"
    place.mkdir()
    index: dict[str, Any] = {}
    for name, tensor in tensors(folder):
        index = offload_weight(tensor, name, str(place), index)
    save_offload_index(index, str(place))
    for path in place.iterdir():
        forget(path)
    model = disk_offload(empty_model(folder), str(place), torch.device(options.device))
    yield call(model, inputs(options)), nothing


def streamed(host_resident: bool) -> Callable[[argparse.Namespace, Path], Any]:
    """penstock's own stages, every block from disk or every block from RAM."""

    @contextmanager
    def peer(options: argparse.Namespace, folder: Path) -> Peer:
        from dataclasses import replace

        from penstock.engine.engine import Engine
        from penstock.profiles.options import Options
        from penstock.profiles.plan import StreamPlan

        named = Options(
            device=options.device, chunk_tokens=str(CHUNK_TOKENS), cross_kv="vram",
            residual="bf16",  # as diffusers has it
        )  # fmt: skip
        with Engine.open(folder / "model", options=named) as engine:
            request = asked(options)
            plan = engine.plan(request)
            count = len(engine.model.streamed.blocks)
            places = StreamPlan(count, 0, count, 2, 0) if host_resident else StreamPlan(
                count, 0, 0, 2, 2
            )  # fmt: skip
            plan = plan.with_phases((replace(plan["denoise"], stream=places),))
            with closing(forwards(engine, request, plan, options)) as work:
                stats: dict[str, Any] = {}

                def forward() -> Any:
                    output, figures = next(work)
                    stats.update(figures)
                    return output

                yield forward, lambda: stats

    return peer


def asked(options: argparse.Namespace) -> Any:
    """The request whose step is run; one branch."""
    from penstock.engine.request.generation import GenerationRequest

    width, height, frames = (int(part) for part in options.size.split("x"))
    return GenerationRequest(
        prompt="a benchmark", image=Path("not opened: its states are drawn"), width=width,
        height=height, frames=frames, steps=1 + options.rounds, guidance_scale=1.0, seed=SEED,
    )  # fmt: skip


def forwards(
    engine: Any, request: Any, plan: Any, options: argparse.Namespace
) -> Generator[Any, None, None]:
    """A forward each time it is asked for, as `penstock.engine.families.wan.work.denoise` does it;
    what the prompt decides is computed in the first."""
    import threading

    import torch

    from penstock.engine.bench.measure import MeasuredStage
    from penstock.engine.families.wan import forward as dit
    from penstock.engine.families.wan.work import Forward as Streamed
    from penstock.engine.families.wan.work import expert_of, prepare
    from penstock.engine.run.keeper import Conditions

    device = torch.device(options.device)
    stage = MeasuredStage(engine.run_of(request, plan), lambda event: None, threading.Event())
    given = inputs(options)
    component, latents = engine.model.streamed, given["hidden_states"]
    conditions = Conditions(
        (given["encoder_hidden_states"],), given["encoder_hidden_states_image"], None
    )
    with torch.no_grad(), stage.rest(component) as model:
        expert = expert_of(stage, second=False)
        cross, modulation = prepare(stage, model, conditions, given["timestep"], expert)
        with stage.phase("denoise", request.steps, "step") as (phase_plan, phase):
            passes = request.steps
            with stage.stream(component.blocks, phase_plan.stream, phase, passes) as stream:
                forward = Streamed(model, component, stream, cross, plan["denoise"].chunk_tokens,
                                   phase)  # fmt: skip
                rope = dit.rope_tables(model, latents.shape[2:], device)
                for _ in range(passes):
                    (output,) = forward(latents, range(1), modulation[0], rope)
                    yield output, figures_of(stage)


def figures_of(stage: Any) -> dict[str, Any]:
    """What the streams moved, at what rate, and what the ledgers held."""
    moved = stage.moved("denoise")
    return {
        "read_bytes": moved.read_bytes,
        "direct_share": moved.direct_bytes / moved.read_bytes if moved.read_bytes else 0.0,
        "read_gb_per_s": moved.read_bytes / moved.read_s / 1e9 if moved.read_s else 0.0,
        "stall_s": moved.compute_wait_s,
        "ledger_vram_bytes": stage.device_ledger.peak,
        "ledger_ram_bytes": stage.host_ledger.peak,
        "block_bytes": stage.model.transformer.blocks[0].nbytes,
        "pass_bytes": sum(layout.read_bytes for layout in stage.model.transformer.blocks),
    }


@contextmanager
def model_offload(options: argparse.Namespace, folder: Path) -> Peer:
    """The whole model to the device for each forward, and back: diffusers' model offload."""
    import torch
    from accelerate import cpu_offload_with_hook

    model, hook = cpu_offload_with_hook(loaded(folder, "cpu"), torch.device("cuda"))
    given = inputs(options)

    def forward() -> Any:
        output = call(model, given)()
        hook.offload()
        return output

    yield forward, nothing


def grouped(to_disk: bool) -> Callable[[argparse.Namespace, Path], Any]:
    """diffusers' group offload by blocks; with a stream, where there are streams."""

    @contextmanager
    def peer(options: argparse.Namespace, folder: Path) -> Peer:
        import torch

        model = loaded(folder, "cpu")
        more = {"offload_to_disk_path": str(folder / "groups")} if to_disk else {}
        model.enable_group_offload(
            onload_device=torch.device(options.device), offload_device=torch.device("cpu"),
            offload_type="block_level", num_blocks_per_group=1,
            use_stream=options.device == "cuda", non_blocking=options.device == "cuda", **more,
        )  # fmt: skip
        yield call(model, inputs(options)), nothing

    return peer


@contextmanager
def aircanvas(options: argparse.Namespace, folder: Path) -> Peer:
    """aircanvas' engine around diffusers' module, over the shards that it makes for itself
    beforehand (which is not timed)."""
    if importlib.util.find_spec("aircanvas") is None:
        sys.exit("aircanvas is not installed")
    splitter = importlib.import_module("aircanvas.sharding.splitter")
    streaming = importlib.import_module("aircanvas.streaming.engine")
    from safetensors.torch import save_file

    plain, place = folder / "plain", folder / "shards"
    (plain / "transformer").mkdir(parents=True)
    config = folder / "model" / "transformer" / "config.json"
    shutil.copy(config, plain / "transformer")
    # Of the file's tensors those that only fill pages up are none that it knows.
    save_file(dict(tensors(folder)), plain / "transformer" / weights_file(folder).name)
    manifest = splitter.split_model(str(plain), subfolder="transformer", cache_dir=place)
    shutil.rmtree(plain)
    with streaming.StreamingEngine(
        empty_model(folder), manifest, place, device=options.device
    ) as engine:
        yield call(engine.model, inputs(options)), lambda: dict(engine.stats)


@contextmanager
def attached(options: argparse.Namespace, folder: Path) -> Peer:
    """diffusers' module, its blocks streamed by `penstock.stream` from the same file: two slots,
    two staging buffers."""
    import penstock

    model = empty_model(folder)
    block = sum(each.nbytes for each in model.blocks[0].parameters())
    outside = sum(each.nbytes for each in (*model.parameters(), *model.buffers()))
    outside -= block * len(model.blocks)
    with penstock.stream(
        model,
        "blocks",
        files=weights_file(folder),
        device=options.device,
        vram=outside + block * 9 // 4,
        ram=block * 9 // 4,
    ) as streamed:
        yield call(model, inputs(options)), lambda: {"read_bytes": streamed.report.read_bytes}


@contextmanager
def mmgp(options: argparse.Namespace, folder: Path) -> Peer:
    """mmgp's profile for little VRAM."""
    if importlib.util.find_spec("mmgp") is None:
        sys.exit("mmgp is not installed")
    from mmgp import offload

    model = loaded(folder, "cpu")
    offload.profile({"transformer": model}, profile_no=4, quantizeTransformer=False)
    yield call(model, inputs(options)), nothing


FROM_DISK = (
    "penstock_disk", "penstock_stream", "accelerate_disk", "mmap", "group_offload_disk",
    "aircanvas",
)  # fmt: skip
"""Peers beside which the file is read plainly, for their rates to be compared with."""

PACKAGES = ("aircanvas", "mmgp")
"""Peers that are left out where they are not installed, unless they are asked for."""

ON_CUDA = ("model_offload", "mmgp")
PEERS: dict[str, Callable[[argparse.Namespace, Path], Any]] = {
    "penstock_disk": streamed(host_resident=False),
    "penstock_stream": attached,
    "accelerate_disk": accelerate_disk,
    "mmap": mapped,
    "penstock_ram": streamed(host_resident=True),
    "accelerate_cpu": accelerate_cpu,
    "resident": resident,
    "model_offload": model_offload,
    "group_offload": grouped(to_disk=False),
    "group_offload_disk": grouped(to_disk=True),
    "mmgp": mmgp,
    "aircanvas": aircanvas,
}


if __name__ == "__main__":
    main()
