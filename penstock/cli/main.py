"""The command line: parse, call, print. No logic lives here."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Callable, MutableMapping
from contextlib import ExitStack
from dataclasses import dataclass
from enum import Enum
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer

from penstock._version import __version__
from penstock.cli.batch import batch
from penstock.cli.bench import bench
from penstock.cli.files import (
    Loras,
    LoraStrict,
    Model,
    Part,
    Second,
    Tokenizer,
    cache_app,
    inspect,
    pack,
    refusals_shown,
    reported,
    verify,
)
from penstock.cli.first import first_steps
from penstock.cli.foreign import (
    Activations,
    Arguments,
    Given,
    Manner,
    generate_foreign,
    is_foreign,
    own_only,
    plan_foreign,
    resume_foreign,
)
from penstock.cli.kept import job_folder
from penstock.cli.layout import wrap
from penstock.cli.log import Level, logged
from penstock.cli.memory import MemoryHelp, memory_told
from penstock.cli.options import NOTHING, with_options
from penstock.cli.paths import path_option
from penstock.cli.serve import serve
from penstock.cli.stopping import Stopping
from penstock.cli.terminal import ENDLESS, Screen, keep_going, say, warn
from penstock.profiles.options import Options

app = typer.Typer(
    name="penstock",
    help="Run video models far larger than the card, inside a byte budget you choose.",
    invoke_without_command=True,
    pretty_exceptions_enable=False,
)
jobs_app = typer.Typer(help="List and remove saved jobs.")
app.add_typer(jobs_app, name="jobs")
app.add_typer(cache_app, name="cache")


for command in (inspect, pack, verify, bench, serve):
    app.command()(command)
app.command(cls=MemoryHelp)(batch)


class SamplerName(str, Enum):
    """Samplers by the name that users know."""

    UNIPC = "unipc"
    DPMPP = "dpm++"
    EULER = "euler"
    LCM = "lcm"


class ClipCrop(str, Enum):
    """What the image encoder sees of the picture."""

    SQUASH = "squash"
    CENTER = "center"


class FitName(str, Enum):
    """What is done with a picture of another aspect than the video's."""

    CROP = "crop"
    PAD = "pad"
    STRETCH = "stretch"


Steps = Annotated[
    int | None, typer.Option(help="Number of denoising steps (the model's own, such as 40).")
]
Guidance = Annotated[
    str | None,
    typer.Option(
        metavar="SCALE",
        help="Guidance scale (CFG); 1 turns it off. With two transformers "
        "LOW,HIGH: at low noise, at high noise.",
    ),
]
Nag = Annotated[
    float | None,
    typer.Option(
        metavar="SCALE",
        help="Normalized attention guidance: apply the negative prompt at --cfg 1; try 11 (off).",
    ),
]
Interval = Annotated[
    str | None,
    typer.Option(
        metavar="A,B",
        help="Guidance at noise levels from A to B (0 to 1) only: fewer forward passes (all).",
    ),
]
Shift = Annotated[
    float | None,
    typer.Option(help="Flow shift of the noise schedule (the model's own, such as 5)."),
]
Sampler = Annotated[
    SamplerName | None,
    typer.Option(metavar="NAME", help="Sampler: unipc, dpm++, euler or lcm (the model's own)."),
]
Json = Annotated[bool, typer.Option("--json", help="Print the report as one JSON object.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks.")]
Distilled = Annotated[
    bool,
    typer.Option(
        "--distilled",
        help="Settings of a distilled model or LoRA: 4 steps, no guidance, shift "
        "5, its noise levels.",
    ),
]
Window = Annotated[
    int | None,
    typer.Option(
        help="Frames of each context window of a long video (81 above 121); 0: no windows."
    ),
]
Overlap = Annotated[
    int | None, typer.Option(help="Frames shared by neighbouring windows, 16 to 30 (16).")
]
Force = Annotated[bool, typer.Option("--force", help="Overwrite an existing output file.")]
Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="Print notes and errors only, no progress.")
]
NoPreview = Annotated[
    bool, typer.Option("--no-preview", help="Do not draw a preview on the terminal.")
]


def _print_version(wanted: bool) -> None:
    if wanted:
        say(__version__)
        raise typer.Exit


@app.callback()
def main_options(
    context: typer.Context,
    log_level: Annotated[
        Level | None,
        typer.Option(help="Log to stderr what is decided: info, or debug for all of it."),
    ] = None,
    log_file: Annotated[
        Path | None, path_option("Log to this file instead, for a bug report (level: debug).")
    ] = None,
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version and exit.", callback=_print_version, is_eager=True
        ),
    ] = False,
) -> None:
    """Run video models far larger than the card, inside a byte budget you choose."""
    with reported(debug=False):
        context.with_resource(logged(log_level, log_file))
    if context.invoked_subcommand is None:
        say(first_steps(Screen().width))
        raise typer.Exit(2)  # as any command that is called without what it needs


@app.command(cls=MemoryHelp)
@with_options()
def generate(
    output: Annotated[Path, path_option("Path of the mp4 to write.", "--output", "-o")],
    prompt: Annotated[
        str, typer.Option(help="Text prompt (with --continue: that video's prompt).")
    ] = "",
    continues: Annotated[
        Path | None,
        path_option("Continue this video from its last frame, with its settings.", "--continue"),
    ] = None,
    model: Model = None,
    transformer: Part = None,
    transformer_2: Second = None,
    text_encoder: Part = None,
    vae: Part = None,
    image_encoder: Part = None,
    audio_vae: Part = None,
    tokenizer: Tokenizer = None,
    image: Annotated[Path | None, path_option("Start image, the first frame.")] = None,
    last_image: Annotated[
        Path | None, path_option("End image, the last frame, for models that take one.")
    ] = None,
    negative: Annotated[str | None, typer.Option(help="Negative prompt.")] = None,
    size: Annotated[
        str | None, typer.Option(help="Size of the video in pixels, such as 1280x720.")
    ] = None,
    max_area: Annotated[
        str | None,
        typer.Option(
            help="Keep the image's aspect ratio within 720p, 480p or WxH; not with --size."
        ),
    ] = None,
    frames: Annotated[
        int | None, typer.Option(help="Number of frames (the model's own, such as 81).")
    ] = None,
    steps: Steps = None,
    cfg: Guidance = None,
    nag: Nag = None,
    cfg_interval: Interval = None,
    shift: Shift = None,
    seed: Annotated[
        int | None, typer.Option(help="Seed of the noise (random if absent or -1).")
    ] = None,
    sampler: Sampler = None,
    distilled: Distilled = False,
    fps: Annotated[
        float | None,
        typer.Option(help="Frames per second of the file, such as 23.976 (the model's own)."),
    ] = None,
    fit: Annotated[
        FitName | None,
        typer.Option(
            metavar="HOW",
            help="Fit an image of another aspect ratio than --size: crop, pad or stretch (crop).",
        ),
    ] = None,
    clip_crop: Annotated[
        ClipCrop | None,
        typer.Option(
            metavar="HOW",
            help="CLIP sees all of the image squeezed to a square, or its centre: squash or center"
            " (squash).",
        ),
    ] = None,
    window: Window = None,
    overlap: Overlap = None,
    lora: Loras = None,
    lora_strict: LoraStrict = False,
    arguments: Arguments = None,
    activations: Activations = None,
    options: Options = NOTHING,
    force: Force = False,
    no_metadata: Annotated[
        bool, typer.Option("--no-metadata", help="Do not store prompt and settings in the file.")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
    no_preview: NoPreview = False,
    job: Annotated[
        Path | None,
        path_option("Folder for the state of the job (in the data directory)."),
    ] = None,
    resume_same: Annotated[
        bool | None,
        typer.Option(
            "--resume/--no-resume",
            help="Resume an unfinished identical job without asking, or never.",
        ),
    ] = None,
    debug: Debug = False,
) -> None:
    """Generate a video from a prompt, and from an image where the model takes one."""
    if is_foreign(model):
        given = Given(
            arguments or [], prompt or None, image, negative, size, frames, steps, cfg, seed, fps,
            options, activations,
        )  # fmt: skip
        strange = {
            "--transformer": transformer, "--transformer-2": transformer_2,
            "--text-encoder": text_encoder, "--vae": vae, "--image-encoder": image_encoder,
            "--audio-vae": audio_vae, "--tokenizer": tokenizer, "--last-image": last_image,
            "--max-area": max_area,
            "--shift": shift, "--sampler": sampler, "--distilled": distilled or None, "--fit": fit,
            "--clip-crop": clip_crop, "--lora": lora or None,
            "--continue": continues, "--window": window,
            "--overlap": overlap, "--nag": nag,
            "--cfg-interval": cfg_interval,
        }  # fmt: skip
        generate_foreign(
            Path(str(model)), given, strange, output, Manner(force, as_json, quiet, debug),
            job, resume_same,
        )  # fmt: skip
        return
    own_only(arguments, activations, debug)
    from penstock.engine.files.locate import Files
    from penstock.engine.lora.file import as_loras
    from penstock.engine.request.settings import Settings

    files = Files(
        transformer, text_encoder, vae, image_encoder, tokenizer, transformer_2, audio_vae
    )  # fmt: skip
    settings = Settings(
        prompt=prompt,
        image=image,
        last_image=last_image,
        negative_prompt=negative,
        size=size,
        max_area=max_area,
        frames=frames,
        steps=steps,
        guidance_scale=cfg,
        nag_scale=nag,
        cfg_interval=cfg_interval,
        shift=shift,
        seed=seed,
        sampler=None if sampler is None else sampler.value,
        fps=fps,
        fit=None if fit is None else fit.value,
        distilled=distilled,
        clip_crop=None if clip_crop is None else clip_crop.value,
        window=window,
        overlap=overlap,
    )
    with reported(debug), Stopping() as stop, ExitStack() as stack:
        if continues is not None:
            settings = _continued(settings, continues, stack)
        loras = as_loras(lora or [], strict=lora_strict)
        opening = {"files": files, "loras": loras, "options": options}
        _generate(
            model, opening, settings, output, force, not no_metadata,
            Shown(as_json, quiet, no_preview), stop,
            lambda engine, request, plan: _job_folder(engine, request, plan, job, resume_same),
        )  # fmt: skip


@app.command(cls=MemoryHelp)
@with_options(
    ("vram", "ram", "device", "profile"),
    profile="Profile to use instead of the job's own; its budgets apply again.",
)
def resume(
    job: Annotated[
        str | None, typer.Argument(help="Folder or name of the job (the only unfinished one).")
    ] = None,
    output: Annotated[
        Path | None,
        path_option("Path of the mp4 to write instead of the job's own.", "--output", "-o"),
    ] = None,
    lora: Loras = None,
    options: Options = NOTHING,
    allow_nonidentical: Annotated[
        bool,
        typer.Option(
            "--allow-nonidentical", help="Resume even if the result will not be bit-identical."
        ),
    ] = False,
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
    no_preview: NoPreview = False,
    debug: Debug = False,
) -> None:
    """Resume a job that was stopped, failed or killed."""
    from penstock.engine.run.jobs import find_job, is_of_pipeline, opening_of
    from penstock.engine.store.journal import read_record

    shown = Shown(as_json, quiet, no_preview)
    with reported(debug), Stopping() as stop:
        folder = find_job(job)
        if is_of_pipeline(read_record(folder)):
            resume_foreign(
                folder, output, options, {"--lora": lora or None}, allow_nonidentical, stop,
                Manner(force, as_json, quiet, debug),
            )  # fmt: skip
            return
        from penstock.engine.engine import Engine

        with Engine.reopen(opening_of(folder, options, lora or [])) as engine:
            running = engine.resume(
                folder, output, force=force, allow_nonidentical=allow_nonidentical,
                preview_every=shown.preview_every,
            )  # fmt: skip
            _watch(running, running.plan, shown, stop)


@jobs_app.callback(invoke_without_command=True)
def jobs(
    context: typer.Context,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the jobs as one JSON list.")
    ] = False,
) -> None:
    """List the jobs: state, step, age and size."""
    from penstock.cli.listed import jobs_table
    from penstock.engine.run.jobs import list_jobs

    if context.invoked_subcommand is not None:
        return
    with reported(False):
        found = list_jobs()
    if as_json:
        say(json.dumps([info.to_json() for info in found]))
    else:
        say(jobs_table(found, Screen().row_width))


@jobs_app.command("rm")
def remove(
    job: Annotated[str, typer.Argument(help="Folder or name of the job.")],
    debug: Debug = False,
) -> None:
    """Remove a job and its saved state; its video stays."""
    from penstock.engine.run.jobs import find_job, remove_job

    with reported(debug):
        folder = find_job(job)
        remove_job(folder)
    say(f"removed {folder.name}")


@app.command(cls=MemoryHelp)
@with_options()
def demo(
    output: Annotated[Path, path_option("Path of the mp4 to write.", "--output", "-o")] = Path(
        "demo.mp4"
    ),
    prompt: Annotated[str | None, typer.Option(help="Text prompt.")] = None,
    image: Annotated[Path | None, path_option("Start image, the first frame.")] = None,
    options: Options = NOTHING,
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
    no_preview: NoPreview = False,
    debug: Debug = False,
) -> None:
    """Generate a small video, and a sheet of its frames, with the bundled model."""
    from penstock.engine.media.sheet import sheet_beside, write_contact_sheet
    from penstock.engine.media.video import check_no_input
    from penstock.engine.request.demo import MINI, demo_settings

    with reported(debug):
        sheet = sheet_beside(output, overwrite=force)
        check_no_input(sheet, [] if image is None else [image])
        settings, opening = demo_settings(prompt, image), {"options": options}
        with Stopping() as stop:
            shown = Shown(as_json, quiet, no_preview)
            report = _generate(MINI, opening, settings, output, force, True, shown, stop)
        write_contact_sheet(Path(report.output), sheet, scale=2)
        if not quiet:
            Screen(stderr=True).print(f"its frames: {sheet}", soft_wrap=True)


@app.command(cls=MemoryHelp)
@with_options(ram="RAM budget; with --card, that machine's RAM in all.")
def plan(
    model: Model = None,
    transformer: Part = None,
    transformer_2: Second = None,
    text_encoder: Part = None,
    vae: Part = None,
    image_encoder: Part = None,
    audio_vae: Part = None,
    tokenizer: Tokenizer = None,
    synthetic: Annotated[
        str | None,
        typer.Option(
            help="Plan a built-in description, no files needed: wan2.1-i2v-14b, "
            "wan2.1-t2v-14b and others."
        ),
    ] = None,
    image: Annotated[
        Path | None, path_option("Start image, for its size and aspect ratio.")
    ] = None,
    size: Annotated[
        str | None, typer.Option(help="Size of the video in pixels, such as 1280x720.")
    ] = None,
    max_area: Annotated[
        str | None, typer.Option(help="Area of the video: 720p, 480p or WxH; not with --size.")
    ] = None,
    frames: Annotated[
        int | None, typer.Option(help="Number of frames (the model's own, such as 81).")
    ] = None,
    steps: Steps = None,
    cfg: Guidance = None,
    nag: Nag = None,
    cfg_interval: Interval = None,
    shift: Shift = None,
    sampler: Sampler = None,
    distilled: Distilled = False,
    window: Window = None,
    overlap: Overlap = None,
    lora: Loras = None,
    lora_strict: LoraStrict = False,
    arguments: Arguments = None,
    activations: Activations = None,
    options: Options = NOTHING,
    card: Annotated[
        str | None, typer.Option(help='Plan for another machine, such as "RTX 3060 12GB".')
    ] = None,
    disk: Annotated[
        str | None,
        typer.Option(
            help="Disk of that machine: nvme5, nvme4, nvme3, sata, hdd, or a rate such as 3.5GB/s."
        ),
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Predict memory and time of a job from headers alone, without loading weights."""
    if is_foreign(model):
        given = Given(
            arguments or [], None, image, None, size, frames, steps, cfg, None, None, options,
            activations,
        )  # fmt: skip
        strange = {
            "--transformer": transformer, "--text-encoder": text_encoder, "--vae": vae,
            "--image-encoder": image_encoder, "--audio-vae": audio_vae, "--tokenizer": tokenizer,
            "--max-area": max_area,
            "--shift": shift, "--sampler": sampler, "--distilled": distilled or None,
            "--lora": lora or None, "--card": card, "--disk": disk, "--synthetic": synthetic,
            "--window": window, "--overlap": overlap, "--nag": nag,
            "--cfg-interval": cfg_interval,
        }  # fmt: skip
        plan_foreign(Path(str(model)), given, strange, as_json, debug)
        return
    own_only(arguments, activations, debug)
    from penstock.cli.plan_view import plan_view
    from penstock.engine.alternatives import alternatives
    from penstock.engine.files.locate import Files
    from penstock.engine.lora.file import as_loras
    from penstock.engine.prepared import Prepared, machine_of
    from penstock.engine.request.generation import noise_of, workload_of
    from penstock.engine.request.settings import Settings, resolve

    settings = Settings(
        prompt="a plan", image=image, size=size, max_area=max_area, frames=frames, steps=steps,
        guidance_scale=cfg, nag_scale=nag, cfg_interval=cfg_interval, shift=shift,
        distilled=distilled,
        sampler=None if sampler is None else sampler.value, window=window, overlap=overlap,
    )  # fmt: skip
    with reported(debug):
        options, machine = machine_of(options, card, disk)
        prepared = Prepared.open(
            model,
            files=Files(
                transformer, text_encoder, vae, image_encoder, tokenizer, transformer_2, audio_vae
            ),  # fmt: skip
            loras=as_loras(lora or [], strict=lora_strict),
            options=options,
            synthetic=synthetic,
            machine=machine,
        )
        request = resolve(settings, prepared.about)
        with refusals_shown(prepared.hardware.name, as_json or debug):
            found = prepared.plan(workload_of(request, saved=True))
        told = prepared.about.official.timesteps(
            request.video_shape, request.steps, noise_of(request)
        )
        faster = alternatives(prepared, settings, found)
    if as_json:
        others = [each.to_json() for each in faster]
        say(json.dumps(found.to_json() | {"timesteps": told, "alternatives": others}))
    else:
        besides = memory_told(found) if card is None else None
        screen = Screen()
        screen.print(plan_view(found, screen.width, besides, faster), soft_wrap=True)


profiles_app = typer.Typer(
    help="List memory budgets and policies by name.", invoke_without_command=True
)
app.add_typer(profiles_app, name="profiles")


@profiles_app.callback()
def profiles(context: typer.Context) -> None:
    """List the profiles."""
    from penstock.cli.plan_view import profiles_view

    if context.invoked_subcommand is None:
        with reported(debug=False):
            screen = Screen()
            screen.print(profiles_view(screen.width), soft_wrap=True)


@profiles_app.command("show")
def profiles_show(
    name: Annotated[str, typer.Argument(help="Profile name, or path of a .toml file.")],
) -> None:
    """Show the values of a profile."""
    from penstock.cli.plan_view import profile_view
    from penstock.profiles.profile import load

    with reported(debug=False):
        screen = Screen()
        screen.print(profile_view(load(name), screen.width), soft_wrap=True)


@app.command()
def doctor(
    device: Annotated[str, typer.Option(help="Device to examine: auto, cuda or cpu.")] = "auto",
    folder: Annotated[
        Path | None,
        path_option("Any folder on the disk that holds the models: its read rate is measured."),
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Check this machine, measure its rates, and keep them for plans."""
    from penstock.cli.plan_view import findings_view
    from penstock.engine.machine.doctor import examine

    with reported(debug):
        found = examine(device, folder)
    if as_json:
        say(json.dumps(found.to_json()))
        return
    rows = [(each.topic, each.found, each.remedy) for each in found.findings]
    screen = Screen()
    screen.print(findings_view(found.machine, rows, screen.width), soft_wrap=True)
    if found.stored_in is not None:
        screen.print("\n".join(wrap(f"rates are kept in {found.stored_in}", screen.width)))


def _continued(settings: Any, video: Path, stack: ExitStack) -> Any:
    """Return ``settings`` to go on from ``video``; its last frame lies in a file until ``stack``
    ends."""
    from PIL import Image

    from penstock.engine.media.seam import Clip
    from penstock.engine.request.settings import going_on

    clip = Clip.open(video)
    folder = stack.enter_context(TemporaryDirectory(prefix="penstock-"))
    frame = Path(folder) / "last.png"
    Image.fromarray(clip.last).save(frame)
    return going_on(settings, clip, frame)


@dataclass(frozen=True)
class Shown:
    """What of a running job a person wants to see, and how."""

    as_json: bool
    quiet: bool
    no_preview: bool

    @property
    def preview_every(self) -> int | None:
        """Steps from one preview to the next; None: nobody would see them."""
        from penstock.cli.live import shows_pictures

        wanted = not (self.quiet or self.no_preview)
        return 1 if wanted and shows_pictures(Screen(stderr=True)) else None


JobFolder = Callable[[Any, Any, Any], tuple[Path, bool]]
"""Given engine, request and plan: the job's folder, and whether to resume the job in it."""


def _generate(
    model: Path | str | None,
    opening: dict[str, Any],
    settings: Any,
    output: Path,
    force: bool,
    metadata: bool,
    shown: Shown,
    stop: Stopping,
    job_folder: JobFolder | None = None,
) -> Any:
    """Make a video with an engine that is opened with ``opening``; what cannot fit is refused
    before anything heavy is imported."""
    from penstock.engine.prepared import Prepared
    from penstock.engine.request.settings import resolve

    prepared = Prepared.open(model, **opening)
    request = resolve(settings, prepared.model)
    plan = prepared.plan(request, saved=job_folder is not None)
    _name_faster(prepared, settings, plan)

    importing = time.perf_counter()
    from penstock.engine.engine import Engine

    with Engine(prepared, imports_s=time.perf_counter() - importing) as engine:
        folder, resumes = (None, False) if job_folder is None else job_folder(engine, request, plan)
        if resumes and folder is not None:
            job = engine.resume(folder, output, force=force, preview_every=shown.preview_every)
        else:
            job = engine.submit(
                request, output, force=force, metadata=metadata, job_dir=folder,
                preview_every=shown.preview_every,
            )  # fmt: skip
        return _watch(job, plan, shown, stop)


def _name_faster(prepared: Any, settings: Any, plan: Any) -> None:
    """Name what would be the fastest, before a long job."""
    from penstock.cli.plan_view import faster_told
    from penstock.engine.alternatives import LONG_S, alternatives

    if plan.seconds > LONG_S:
        for best in alternatives(prepared, settings, plan)[:1]:
            Screen(stderr=True).print(f"note: {faster_told(best)}", soft_wrap=True)


def _watch(job: Any, plan: Any, shown: Shown, stop: Stopping) -> Any:
    """Show a job until it ends, and its report, which is returned."""
    from penstock.cli.progress import Display, plan_summary, report_summary
    from penstock.engine.machine.memory import keep_overhead

    stop.at(job.cancel)
    console = Screen(stderr=True)
    fit = partial(wrap, width=console.width if console.is_terminal else ENDLESS)
    if not shown.quiet:
        lines = (row for line in plan_summary(plan).splitlines() for row in fit(line))
        console.print("\n".join(lines), soft_wrap=True)
    with Display(console, plan, quiet=shown.quiet) as display:
        for event in job.events():
            display.show(event)
    report = job.result().report
    keep_overhead("cpu" if report.on_cpu else "cuda", report.beside_bytes)
    if not shown.quiet:
        console.print("\n".join(fit(report_summary(report))), soft_wrap=True)
    if shown.as_json:
        planned = plan.to_json() | {"timesteps": report.timesteps}
        say(json.dumps({"plan": planned, "report": report.to_json()}))
    return report


def _job_folder(
    engine: Any, request: Any, plan: Any, folder: Path | None, resumes: bool | None
) -> tuple[Path, bool]:
    """Return where the job is kept, and whether an unfinished identical one there is continued."""
    from penstock.engine.run.stored import request_values

    return job_folder(request_values(request, engine.model.opening, plan), folder, resumes)


def prefer_pages(environ: MutableMapping[str, str]) -> None:
    """Ask torch's CUDA allocator for segments that grow and shrink by pages, where the platform has
    them and the user has not said otherwise: a budget is then not spent on holes between tensors.

    The command's own process only; what embeds penstock keeps its allocator as it set it.
    """
    names = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")  # before torch 2.9, and since
    if sys.platform == "linux" and not any(name in environ for name in names):
        environ.update(dict.fromkeys(names, "expandable_segments:True"))


def main() -> None:
    """Entry point of the ``penstock`` command."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    for library in ("DIFFUSERS", "TRANSFORMERS"):  # they set their own level when they are imported
        os.environ.setdefault(f"{library}_VERBOSITY", "error")
    prefer_pages(os.environ)
    keep_going()
    try:
        app()
    except OSError as error:  # of stdout: the disk that an answer goes to is full, for one
        warn(f"error: {error}")
        raise SystemExit(1) from error


if __name__ == "__main__":
    main()
