"""What a job did, beside what its plan had promised."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from penstock.engine.media.video import Sound
from penstock.offload.stats import Flow
from penstock.profiles.options import Options


@dataclass(frozen=True)
class StepReport:
    """One denoising step: its seconds, and what passed the edges between the tiers meanwhile.

    On CUDA a step ends when it is issued: what the device had not finished counts to the next.
    """

    seconds: float
    flow: Flow


@dataclass(frozen=True)
class PhaseReport:
    """One phase: seconds, predicted and measured peaks (by the ledgers), bytes moved.

    Attributes:
        name: such as "denoise".
        seconds: that it took.
        units, unit: how many units of work were done, and what a unit is ("step", "layer", ...).
        predicted_vram_bytes, predicted_ram_bytes: peaks that the plan promised.
        measured_vram_bytes, measured_ram_bytes: peaks of the ledgers.
        read_bytes: weights read from disk.
        copied_bytes: weights copied from host memory to the device.
        stall_s: seconds in which the computation waited for weights.
        flow: bytes, seconds and stalls at each edge: disk -> host -> device -> computation.
        steps: the same step by step, where the phase has steps.
    """

    name: str
    seconds: float
    units: int
    unit: str
    predicted_vram_bytes: int
    measured_vram_bytes: int
    predicted_ram_bytes: int
    measured_ram_bytes: int
    read_bytes: int
    copied_bytes: int
    stall_s: float
    flow: Flow = Flow()
    steps: tuple[StepReport, ...] = ()


@dataclass(frozen=True)
class RunReport:
    """A finished job.

    Attributes:
        output: path of the video, or None where the frames were kept in memory.
        frames, width, height, fps: of the video; with what it goes on from, if that is in the file.
        seed: the seed that was used, also where the request left it open.
        seconds: from the job's turn to its end.
        vram_limit_bytes, ram_limit_bytes: the budgets.
        phases: in the order they ran.
        imports_s: seconds that the imports for it took, where its command did them: a phase of
            their own before the others, in which nothing is read or computed.
        allocated_vram_bytes: peak of the device's own allocator (0 where it has none: the CPU).
        weight_format: of the transformer's blocks.
        compute: "exact" or "fast", as asked.
        compute_path: how most of the blocks' matrices multiplied: "plain", "dequant", "fp8" or
            "int8".
        attention: what self-attention ran on: "sdpa" or "int8".
        residual: what the transformer's hidden states were kept in: "fp32", or "bf16" for the dtype
            that it computes in.
        notices: all that the user was told on the way.
        steered: ``on_step`` replaced the latents in some step: the request and the seed alone do
            not lead to this video.
        versions: of the packages that the result depends on.
        options: as they were asked for.
        computed_steps: of the denoising, from 0; a cache skipped the others. Empty where the job
            went on from finished latents.
        timesteps: what the transformer was told at each step, of 1000.
        on_cpu: the device is the CPU: what counts as VRAM lies in host memory too.
        process_peak_bytes: the most host memory that the process has had resident in all its life:
            buffers, interpreter, libraries, and what else it does.
        group_peak_bytes: likewise of its control group; None where there is none.
        sound_s: seconds of sound beside the video; 0: the model makes none.
    """

    output: str | None
    frames: int
    width: int
    height: int
    fps: float
    seed: int
    seconds: float
    vram_limit_bytes: int
    ram_limit_bytes: int
    allocated_vram_bytes: int
    weight_format: str
    compute: str
    compute_path: str
    attention: str
    phases: tuple[PhaseReport, ...]
    notices: tuple[str, ...]
    versions: dict[str, str]
    steered: bool = False
    residual: str = "bf16"
    options: Options = field(default_factory=Options)
    timesteps: tuple[float, ...] = ()
    computed_steps: tuple[int, ...] = ()
    imports_s: float = 0.0
    on_cpu: bool = True
    process_peak_bytes: int = 0
    group_peak_bytes: int | None = None
    sound_s: float = 0.0

    @property
    def beside_bytes(self) -> int:
        """What the process took besides what the ledgers held at most in a phase: the interpreter
        and libraries, where it has done nothing else."""
        held = max(
            phase.measured_ram_bytes + (phase.measured_vram_bytes if self.on_cpu else 0)
            for phase in self.phases
        )
        return max(0, self.process_peak_bytes - held)

    @property
    def peak_vram_bytes(self) -> int:
        """Highest peak of the device ledger over all phases."""
        return max(phase.measured_vram_bytes for phase in self.phases)

    @property
    def peak_ram_bytes(self) -> int:
        """Highest peak of the host ledger over all phases."""
        return max(phase.measured_ram_bytes for phase in self.phases)

    def to_json(self) -> dict[str, Any]:
        """Return plain values, ready for json.dumps.

        Raises:
            Nothing.
        """
        return asdict(self) | {
            "peak_vram_bytes": self.peak_vram_bytes,
            "peak_ram_bytes": self.peak_ram_bytes,
            "beside_bytes": self.beside_bytes,
        }


@dataclass(frozen=True)
class JobResult:
    """What a finished job hands over.

    Attributes:
        report: what it did, beside what was promised.
        latents: (1, z, t, h, w), fp32, on the CPU.
        video: uint8 (frames, height, width, 3), on the CPU.
        sound: what is heard with it; None: the model makes none.
    """

    report: RunReport
    latents: Tensor
    video: Tensor
    sound: Sound | None = None
