"""The phases of a job with MiniMax-H3, in order."""

from __future__ import annotations

from collections.abc import Iterator

from penstock.engine.families.minimax_h3.denoise_plan import DenoisePacked
from penstock.engine.families.minimax_h3.sound import cost as sound
from penstock.engine.families.minimax_h3.terms import (
    H3Case,
    latents_bytes,
    pictures_of,
    sound_bytes,
)
from penstock.engine.families.minimax_h3.text import cost as text
from penstock.engine.families.minimax_h3.video_vae import cost as video
from penstock.errors import RequestError
from penstock.profiles.phases import Mux, Step


def steps(case: H3Case) -> Iterator[Step]:
    """Yield the groups of phases of a job, in the order in which they run.

    Raises:
        RequestError: what is asked for, the model cannot do.
    """
    check_asked(case)
    yield from text.steps(case)
    if pictures_of(case):
        yield video.encode_step(case)
    yield DenoisePacked(case)
    yield video.decode_step(case)
    yield sound.sound_step(case)
    held = (("latents", latents_bytes(case)), ("sound", sound_bytes(case)))
    yield Mux(case, case.workload.shape, held)


def check_asked(case: H3Case) -> None:
    """Refuse what other models can do and this one cannot.

    Raises:
        RequestError: names it, and what it can do instead.
    """
    work, noise = case.workload, case.workload.noise
    guided = work.guided or bool(work.guided_high)
    refused = (
        (work.steps < 2, "one step computes nothing",
         "2 steps or more: the last noise level is not computed",
         str(work.steps), "Give --steps 2 or more; N steps are N - 1 forward passes"),
        (guided, "MiniMax-H3 runs without guidance: it is distilled", "a guidance scale of 1",
         "a larger one", "Leave --cfg out"),
        (work.contrasted, "MiniMax-H3 has no cross-attention for --nag", "no --nag", "one",
         "Leave --nag out"),
        (work.windows is not None, "MiniMax-H3 has no context windows", "no --window", "windows",
         "Leave --window out"),
        (work.continued, "MiniMax-H3 cannot continue a video yet", "no --continue", "one",
         "Give its last frame with --image"),
        (noise.sampler != "euler" or noise.distilled, "MiniMax-H3 has its own noise levels",
         "euler", noise.sampler + (" with distilled levels" if noise.distilled else ""),
         "Leave --sampler and --distilled out"),
    )  # fmt: skip
    for wrong, what, expected, found, remedy in refused:
        if wrong:
            raise RequestError(what, expected=expected, found=found, remedy=remedy)
