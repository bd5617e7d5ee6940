"""What each weight format costs in quality, against the weights as a model's files hold them.

    python -m benchmarks.quality [--formats int8,fp8,...] [--save FILE.json] [--threads N]
        [--model FOLDER [--pairs N] [--prompt TEXT]... [--image FILE]] [--size WxH] [--frames N]
        [--steps N]

Without ``--model`` a tiny random one is made: its block matrices are Gaussian with rare outliers
(one weight in a thousand, eight times as large) and it computes in fp32, so that all differences
are the format's. A random model says how formats compare, not what a video looks like.

``--pairs N`` is for the trained small model (penstock/assets/mini): N held-out pictures and prompts
of `training.evaluate`, every clip judged by `training.score`. What loses more than two points of a
hundred against the weights as stored is marked.

For each format the transformer is packed, and the whole model run:

- layer: 1 - cosine of a matrix's output on Gaussian inputs, the worst of all matrices;
- block: 1 - cosine of what a block adds to its input, the worst of all blocks;
- latents and frames: PSNR in dB over the range of the reference (frames: 255), of all clips
  together; and the latents' cosine;
- bytes a block;
- score: the share of clips that the judge finds right.

``--save`` keeps every clip's figures as they come: the same command after a kill goes on where it
stopped, and more formats or pairs can be asked for later. What penstock reads and does not write
is made by `benchmarks.foreign`. The last line on stdout is JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks import foreign
from benchmarks.quality_blocks import Outputs, outputs, worst
from benchmarks.quality_kept import Difference, Kept
from penstock.engine.engine import Engine
from penstock.engine.families.wan.tiny import write_tiny_model
from penstock.engine.files.locate import Files, locate
from penstock.engine.packs.firstuse import FirstUse
from penstock.engine.request.settings import Settings, resolve
from penstock.formats.formats import writable
from penstock.offload.layout import BlockLayout
from penstock.quant.policy import default_policy
from penstock.units import GIB

FAST = ("int8",)
"""Formats that a CPU also multiplies in 8 bits."""

MOST_LOST = 0.02
"""Of the score; a format that loses more is marked."""

REFERENCE = "as stored"

_WIDTHS = {"num_attention_heads": 2, "attention_head_dim": 128, "ffn_dim": 512, "num_layers": 4}
_TINY = Settings(
    prompt="a red circle moves", negative_prompt="", size="64x48", frames=9, steps=4, seed=3
)


@dataclass(frozen=True)
class Clip:
    """A video to make, and who says whether it is right (uint8 frames (n, h, w, 3))."""

    settings: Settings
    judge: Callable[[Tensor], bool] | None = None


@dataclass(frozen=True)
class Way:
    """A format and how it is multiplied."""

    format: str
    compute: str

    @property
    def name(self) -> str:
        """In the kept file."""
        return f"{self.format} {self.compute}"


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
    clips: int
    score: float | None
    lost: float | None

    @property
    def loses(self) -> bool:
        """Whether it costs more of the score than is allowed."""
        return self.lost is not None and self.lost > MOST_LOST


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


def ways(formats: Sequence[str]) -> Iterator[Way]:
    """The reference, then every format, and those that multiply in 8 bits also that way."""
    yield Way(REFERENCE, "exact")
    for name in formats:
        for compute in ("exact", "fast") if name in FAST else ("exact",):
            yield Way(name, compute)


class Runs:
    """Opens a model in each of its ways, and keeps what its clips and its blocks give.

    Args:
        model: a folder, or anything else that `penstock.engine.files.locate.locate` takes.
        clips: to make, each with a seed.
        kept: what is known already, and where packs may lie.
    """

    def __init__(self, model: Path, clips: Sequence[Clip], kept: Kept) -> None:
        self._model, self._clips, self._kept = model, clips, kept
        self._reference: Outputs | None = None

    def measure(self, formats: Sequence[str]) -> Iterator[Quality]:
        """The table, a row as soon as it is known."""
        chosen = list(ways(formats))
        for way in chosen:
            self._complete(way, chosen)
            yield self._row(way)

    def _complete(self, way: Way, chosen: Sequence[Way]) -> None:
        """Make what is missing of ``way``; of the reference also what others need of it."""
        missing = self._missing(way)
        if way.format == REFERENCE:
            wanted = {index for each in chosen for index in self._missing(each)}
            missing = sorted(i for i in wanted if self._kept.reference(i) is None)
        facts = self._kept.facts(way.name)
        if not missing and facts:
            return
        with self._opened(way) as engine:
            if not facts:
                self._kept.set_facts(way.name, self._facts(way, engine))
            for index in missing:
                self._make(way, engine, index)

    def _missing(self, way: Way) -> list[int]:
        return [i for i in range(len(self._clips)) if self._kept.clip(way.name, i) is None]

    @contextmanager
    def _opened(self, way: Way) -> Iterator[Engine]:
        files = self._files(way.format)
        with Engine.open(self._model, files=files, compute=way.compute, device="cpu") as engine:
            yield engine

    def _files(self, name: str) -> Files:
        """The transformer in another format, made once."""
        if name == REFERENCE:
            return Files()
        if name in foreign.ALL:
            return Files(transformer=foreign.write(self._model, name, self._kept.work))
        use = FirstUse.of(locate(self._model).streamed, name, self._kept.work)
        if not use.is_made:
            use.make(GIB, lambda nbytes: None)
        return Files(transformer=use.folder / "transformer")

    def _facts(self, way: Way, engine: Engine) -> dict[str, Any]:
        found, component = outputs(engine), engine.model.streamed
        if self._reference is None:
            if way.format == REFERENCE:
                self._reference = found
            else:
                with self._opened(Way(REFERENCE, "exact")) as reference:
                    self._reference = outputs(reference)
        return {
            "layer_error": worst(found.layers, self._reference.layers),
            "block_error": worst(found.updates, self._reference.updates),
            "block_bytes": sum(map(_stored_bytes, (component.blocks[0], component.cross[0]))),
        }

    def _make(self, way: Way, engine: Engine, index: int) -> None:
        clip = self._clips[index]
        result = engine.submit(resolve(clip.settings, engine.model)).result()
        made = {"latents": result.latents, "video": result.video}
        if way.format == REFERENCE:
            self._kept.set_reference(index, made)
        wanted = self._kept.reference(index)
        assert wanted is not None, "the reference comes first"
        record: dict[str, Any] = {
            key: asdict(Difference.of(made[key], wanted[key])) for key in made
        }
        if clip.judge is not None:
            record["right"] = clip.judge(result.video)
        self._kept.set_facts(way.name, {"path": result.report.compute_path})
        self._kept.add_clip(way.name, index, record)

    def _row(self, way: Way) -> Quality:
        facts = self._kept.facts(way.name)
        latents, frames = self._difference(way, "latents"), self._difference(way, "video")
        score, reference = self._score(way), self._score(Way(REFERENCE, "exact"))
        return Quality(
            format=way.format,
            compute=f"{way.compute} ({facts['path']})",
            layer_error=facts["layer_error"],
            block_error=facts["block_error"],
            latents_cosine=latents.cosine,
            latents_psnr=latents.psnr(),
            frames_psnr=frames.psnr(255.0),
            block_bytes=facts["block_bytes"],
            clips=len(self._clips),
            score=score,
            lost=None if score is None or reference is None else reference - score,
        )

    def _records(self, way: Way) -> list[dict[str, Any]]:
        found = [self._kept.clip(way.name, index) for index in range(len(self._clips))]
        return [record for record in found if record is not None]

    def _difference(self, way: Way, key: str) -> Difference:
        return Difference.total(Difference(**record[key]) for record in self._records(way))

    def _score(self, way: Way) -> float | None:
        rights = [record["right"] for record in self._records(way) if "right" in record]
        return sum(rights) / len(rights) if rights else None


def _stored_bytes(layout: BlockLayout) -> int:
    return sum(place.nbytes for place in layout.places.values())


def held_out(count: int, folder: Path, **given: object) -> list[Clip]:
    """``count`` pictures and prompts that training has not seen, with their judges; the pictures
    are written to ``folder``.

    Args:
        given: settings that replace the model's own defaults.
    """
    from PIL import Image

    from training.clips import render
    from training.evaluate import Pair, make_pairs
    from training.score import judge

    def judged(pair: Pair) -> Callable[[Tensor], bool]:
        return lambda video: judge((video.float() / 255).numpy(), pair.scene, pair.motion).right

    folder.mkdir(parents=True, exist_ok=True)
    clips = []
    for index, pair in enumerate(make_pairs("test", count)):
        image, picture = folder / f"{index}.png", render(pair.scene, frames=1)[0]
        Image.fromarray((picture * 255).round().astype("uint8")).save(image)
        settings = Settings(prompt=pair.prompt, image=image, seed=index)
        clips.append(Clip(_with(settings, given), judged(pair)))
    return clips


_HEAD = (
    "format", "compute", "layer", "block", "lat. cos", "lat. dB", "frames dB", "bytes", "score",
)  # fmt: skip


def line(row: Quality) -> str:
    """A row for people."""
    score = "" if row.score is None else f"{row.score:.3f}"
    mark = f"  loses {100 * row.lost:.1f} points" if row.loses and row.lost is not None else ""
    return (
        f"{row.format:<12} {row.compute:<16} {row.layer_error:>9.2e} {row.block_error:>9.2e} "
        f"{row.latents_cosine:>9.6f} {row.latents_psnr:>8.2f} {row.frames_psnr:>9.2f} "
        f"{row.block_bytes:>12,} {score:>7}{mark}"
    )


def arguments() -> argparse.Namespace:
    """Of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path)
    parser.add_argument("--formats", default=",".join((*writable(), *foreign.ALL)))
    parser.add_argument("--pairs", type=int, help="held-out pictures and prompts, judged")
    parser.add_argument("--save", type=Path, help="keep what was found; go on from it")
    parser.add_argument("--prompt", action="append")
    parser.add_argument("--image", type=Path)
    parser.add_argument("--size")
    parser.add_argument("--frames", type=int)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    if options.pairs is not None and options.model is None:
        parser.error("--pairs needs the --model that was trained for them")
    return options


def main() -> None:
    """Measure and print."""
    options = arguments()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as scratch:
        model = options.model or write_model(Path(scratch) / "model")
        clips = chosen_clips(options, Path(scratch))
        kept = Kept(options.save or Path(scratch) / "kept.json", recipe(options, model, clips))
        rows = show(Runs(model, clips, kept).measure(options.formats.split(",")))
        shutil.rmtree(kept.work, ignore_errors=True)
    facts = {"machine": platform.machine(), "torch": torch.__version__, "clips": len(clips)}
    print(
        json.dumps(
            facts
            | {"model": str(options.model or "tiny, random"), "rows": [_plain(row) for row in rows]}
        )
    )


def show(rows: Iterator[Quality]) -> list[Quality]:
    """Print rows as they come."""
    print("{:<12} {:<16} {:>9} {:>9} {:>9} {:>8} {:>9} {:>12} {:>7}".format(*_HEAD))
    shown = []
    for row in rows:
        shown.append(row)
        print(line(row), flush=True)
    return shown


def chosen_clips(options: argparse.Namespace, scratch: Path) -> list[Clip]:
    """What the command line asks for."""
    given = {name: getattr(options, name) for name in ("size", "frames", "steps")}
    if options.pairs is not None:
        return held_out(options.pairs, scratch / "pictures", **given)
    base = _TINY if options.model is None else Settings(prompt=_TINY.prompt, seed=_TINY.seed)
    given |= {"image": options.image}
    return [
        Clip(_with(base, given | {"prompt": prompt})) for prompt in options.prompt or [base.prompt]
    ]


def _with(settings: Settings, given: dict[str, Any]) -> Settings:
    named = {name: value for name, value in given.items() if value is not None}
    return Settings(**(asdict(settings) | named))


def recipe(options: argparse.Namespace, model: Path, clips: Sequence[Clip]) -> dict[str, Any]:
    """What the figures hold for, but how many clips and which formats: the model's files, the
    settings, torch."""
    files = {
        path.name: [stamp.size, stamp.mtime_ns]
        for component in (locate(model).components() if options.model else ())
        for path, stamp in component.raw.stamps.items()
    }
    settings = asdict(clips[0].settings)
    pairs = options.pairs is not None
    own = ("prompt", "image", "seed") if pairs else ()
    return {
        "files": files,
        "settings": {
            key: None if value is None else str(value)
            for key, value in settings.items()
            if key not in own
        },
        "prompts": "held-out pairs" if pairs else [clip.settings.prompt for clip in clips],
        "torch": torch.__version__,
    }


def _plain(row: Quality) -> dict[str, object]:
    """For JSON, which has no infinity."""
    found = {key: None if value == math.inf else value for key, value in asdict(row).items()}
    return found | {"loses": row.loses}


if __name__ == "__main__":
    main()
