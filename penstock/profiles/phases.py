"""The phases of a job as the planner sees them: what each may be, in bytes and in seconds.

A phase (or a group of them, where what the first leaves behind lives on in the next) can name the
best of its shapes inside limits, and the smallest.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from penstock.formats.formats import FORMATS
from penstock.profiles.manifest import (
    ComputePath,
    Heads,
    Picture,
    Pictures,
    Prefetch,
    Storage,
    VideoShape,
)
from penstock.profiles.plan import Items, PhasePlan
from penstock.profiles.policy import Limits, Policy
from penstock.profiles.rates import Rates
from penstock.profiles.streams import Network, Pace, Stream, all_streams, staging_bytes
from penstock.profiles.windows import Windows
from penstock.units import MIB

log = logging.getLogger(__name__)

ENCODER_BYTES_PER_PIXEL = 240
"""Host memory of libx264's look-ahead and references, a pixel of one frame: measured on
noise, the worst picture, with two threads."""

DECODER_BYTES_PER_PIXEL = 64
"""Host memory of FFmpeg's H.264 decoder, a pixel of a frame: up to 16 references and as many frames
in flight at 1.5 bytes (4:2:0), one frame in RGB, and what swscale takes."""

ENCODER_BASE_BYTES = 16 * MIB

EIGHT_BIT_WORKSPACE_BYTES = 128 * MIB
"""Temporaries of an 8-bit matrix product (`penstock.quant.compute.DEFAULT_CHUNK_BYTES`)."""

RESTORED = "restored state"
"""Item of the context's host memory: what a kept job reads before it goes on."""

OBJECTS = ("small objects", MIB)
"""Item of the host memory of every phase that computes: what is in no tensor of its own account,
such as scalars, indices and Python's objects (up to 0.7 MB was seen by `benchmarks.saved`)."""

LIBRARIES = "library workspaces"
"""Item of the device memory of every phase on a GPU: what cuBLAS and cuDNN ask torch's allocator
for besides operands and results, and what the allocator rounds up."""

CUDA_LIBRARY_BYTES = 64 * MIB
"""Of it, what does not depend on the phase. cuBLAS takes 32 MiB on Hopper and 8 elsewhere; torch's
allocator held up to 60 MiB more than the tensors of a denoising step (`benchmarks.gpu_suite`, on an
H200, segments growing by pages)."""

HOLES = "holes between tensors"
"""Item of the device memory of the VAE's phases on a GPU: what torch's allocator holds of them
beside their tensors, frames of many sizes that come and go."""


FIRST_FRAME = (0, 1)
"""Frames of a conditioning clip that differ from the one before, where it is a picture and then
empty frames."""

Group = tuple[PhasePlan, ...]


@dataclass(frozen=True)
class Noise:
    """What determines the noise levels of a job, beside its steps.

    Attributes:
        sampler: its name.
        shift: flow shift; None: the model's own for that size.
        distilled: levels that distilled models were trained at.
    """

    sampler: str = "unipc"
    shift: float | None = None
    distilled: bool = False


@dataclass(frozen=True)
class Workload:
    """What is asked of the model: the video's shape, the steps, and whether CFG is on.

    Attributes:
        saved: the job is saved while it runs: host memory holds what is being saved or read again.
        written: a file is made of the frames at the end.
        picture: that the video starts from; None: there is none, or none is known yet and it is
            taken to be as large as the video.
        last: that the video ends with, likewise.
        pictures: that are given, 0 to 2; None: those that the model must have.
        guided_high: whether CFG is on while there is much noise, for a model that has a transformer
            of its own for that; None: as ``guided``.
        guided_within: noise levels, the least and the most, of the steps at which CFG is on where
            it is; None: all.
        noise: of the steps.
        contrasted: the one pass of a step attends to a negative prompt as well.
        continued: it goes on from a video, whose frames come first in the file.
        windows: of frames, that the video is denoised in; None: all of it at once.
        changes: frames of the conditioning clip that may differ from the one before, the first
            among them; None: any may.
    """

    shape: VideoShape
    steps: int
    guided: bool
    saved: bool = False
    written: bool = True
    picture: Picture | None = None
    changes: tuple[int, ...] | None = FIRST_FRAME
    last: Picture | None = None
    pictures: int | None = None
    guided_high: bool | None = None
    guided_within: tuple[float, float] | None = None
    noise: Noise = Noise()
    contrasted: bool = False
    continued: bool = False
    windows: Windows | None = None

    @property
    def branches(self) -> int:
        """Forward passes a step."""
        return 2 if self.guided else 1

    def branches_of(self, *, first: bool) -> int:
        """Return the forward passes a step of the first phase that streams, or of another."""
        on = self.guided if self.guided_high is None or not first else self.guided_high
        return 2 if on else 1

    @property
    def fewest_branches(self) -> int:
        """Forward passes of any step, at least."""
        return self.branches if self.guided_within is None else 1

    @property
    def texts(self) -> int:
        """Prompts that are encoded: those of all branches of any step."""
        return 2 if self.guided or self.guided_high or self.contrasted else 1


M = TypeVar("M", covariant=True)


@dataclass(frozen=True)
class Case(Generic[M]):
    """Everything a phase is planned for."""

    manifest: M
    workload: Workload
    rates: Rates
    policy: Policy
    device: str
    fused_norms: bool = False

    @property
    def pins(self) -> bool:
        """Whether host buffers are page-locked."""
        return self.device == "cuda"

    def libraries(self, convolution_bytes: int = 0) -> Items:
        """Return what a GPU's libraries take in a phase.

        Args:
            convolution_bytes: operands and result of the phase's largest convolution: cuDNN lays
                them out anew, channels last.
        """
        if self.device != "cuda":
            return ()
        return ((LIBRARIES, CUDA_LIBRARY_BYTES + convolution_bytes),)

    def holes(self, share: float, tensor_bytes: int) -> Items:
        """Return what a GPU's allocator holds beside ``tensor_bytes`` of a phase: ``share`` of
        them."""
        if self.device != "cuda":
            return ()
        return ((HOLES, int(share * tensor_bytes)),)


class Step(Protocol):
    """A group of phases that is planned together."""

    @property
    def phases(self) -> tuple[str, ...]:
        """Their names, in order."""

    def best(self, limits: Limits) -> Group | None:
        """Return the fastest shape inside ``limits``; ties go to fewer bytes. None: nothing
        fits."""

    def all_small(self, limits: Limits) -> Iterator[Group]:
        """Return the shapes among which are the smallest in VRAM and in RAM, fitting or not."""


class Manifest(Protocol):
    """A model in the planner's terms: what a family states of it."""

    @property
    def storage(self) -> Storage:
        """How the matrices are stored that a pack may hold in another format."""

    @property
    def image_to_video(self) -> bool:
        """Whether a conditioning picture is needed."""

    @property
    def pictures(self) -> Pictures:
        """The pictures that are taken."""

    @property
    def heads(self) -> Heads:
        """What a trial of an attention is made with."""

    @property
    def prefetch(self) -> Prefetch:
        """What may be read before its phase."""

    def steps(self, case: Case[Any]) -> Iterator[Step]:
        """Return the groups of phases, in the order in which they run."""

    def smaller_shapes(self, shape: VideoShape) -> Iterator[VideoShape]:
        """Return legal videos with fewer tokens than ``shape``, the nearest first."""

    def undecided(self) -> Manifest:
        """Return this manifest for a machine that nobody asked which matrix products it has."""


def vram_bytes(group: Group) -> int:
    """Return the peak VRAM of a group."""
    return max(phase.vram_bytes for phase in group)


def ram_bytes(group: Group) -> int:
    """Return the peak host memory of a group."""
    return max(phase.ram_bytes for phase in group)


def both_bytes(group: Group) -> int:
    """Return the peak of VRAM and host memory together."""
    return max(phase.vram_bytes + phase.ram_bytes for phase in group)


def group_fits(group: Group, limits: Limits) -> bool:
    """Return whether no phase of ``group`` passes a limit."""
    pinned = max(phase.pinned_bytes for phase in group)
    return (
        vram_bytes(group) <= limits.vram_bytes
        and ram_bytes(group) <= limits.ram_bytes
        and (limits.pinned_bytes is None or pinned <= limits.pinned_bytes)
        and (limits.both_bytes is None or both_bytes(group) <= limits.both_bytes)
    )


def loading_s(nbytes: int, rates: Rates) -> float:
    """Return the seconds to bring weights from disk to the device, one after the other."""
    return nbytes / rates.read_bytes_per_s + nbytes / rates.copy_bytes_per_s


@dataclass(frozen=True)
class OnePass:
    """A network whose blocks are visited once: nothing is worth keeping.

    Its other weights are on the device before or after the blocks, not beside them.

    Attributes:
        rest_bytes: of those weights.
        visits: of a prompt or picture to a block: each takes what a chunk takes besides its tokens.
        elements: of the hidden states, all visits together, that are normed and activated.
        rest_stays: they are there already, and stay (the transformer's).
    """

    name: str
    case: Case[Any]
    network: Network
    rest_bytes: int
    work: Items
    ram_work: Items
    flops: float
    visits: int
    elements: int = 0
    rest_stays: bool = False

    @property
    def phases(self) -> tuple[str, ...]:
        """As `Step`."""
        return (self.name,)

    def best(self, limits: Limits) -> Group | None:
        """As `Step`."""
        return best_of(self.all_small(limits), limits)

    def all_small(self, limits: Limits) -> Iterator[Group]:
        """As `Step`: all there is, one a ring size."""
        for phase in self.shapes(limits):
            yield (phase,)

    def shapes(self, limits: Limits) -> Iterator[PhasePlan]:
        """Yield one shape a ring size."""
        rates, blocks = self.case.rates, self.network.choices[0]
        compute_s = (
            self.flops / rates.flops
            + self.visits * rates.overhead_s
            + self.elements * rates.element_s
        )
        loaded = blocks.copied_bytes + self.rest_bytes
        for stream in all_streams(self.network, Pace(compute_s, passes=1), rates):
            room = limits.ram_bytes - sum(count for _, count in self.ram_work)
            yield PhasePlan(
                self.name,
                weights=self._weights(stream),
                work=self.work,
                ram_weights=self._host(stream, room),
                ram_work=self.ram_work,
                stream=stream.plan,
                pinned_bytes=stream.pinned_bytes if self.case.pins else 0,
                read_bytes=loaded,
                copied_bytes=loaded,
                seconds=stream.timing.seconds + loading_s(self.rest_bytes, rates),
                bound=stream.timing.bound,
            )

    def _weights(self, stream: Stream) -> Items:
        rest = ("non-block weights", self.rest_bytes)
        if self.rest_stays:
            return (rest, *stream.device_items)
        return stream.device_items if stream.vram_bytes >= self.rest_bytes else (rest,)

    def _host(self, stream: Stream, room_bytes: int) -> Items:
        staged = 0 if self.rest_stays else staging_bytes(self.rest_bytes, room_bytes)
        return (
            stream.host_items(room_bytes) if stream.ram_bytes >= staged else (("staging", staged),)
        )


@dataclass(frozen=True)
class Mux:
    """Frames into a file: host memory only.

    Attributes:
        held: what else is in host memory meanwhile.
    """

    case: Case[Any]
    shape: VideoShape
    held: Items

    @property
    def phases(self) -> tuple[str, ...]:
        """As `Step`."""
        return ("mux",)

    def best(self, limits: Limits) -> Group | None:
        """As `Step`."""
        return best_of(self.all_small(limits), limits)

    def all_small(self, limits: Limits) -> Iterator[Group]:
        """As `Step`: there is one way."""
        shape = self.shape
        pixels = shape.width * shape.height
        encoder = ENCODER_BASE_BYTES + ENCODER_BYTES_PER_PIXEL * pixels
        decoder = DECODER_BYTES_PER_PIXEL * pixels if self.case.workload.continued else 0
        yield (
            PhasePlan(
                "mux",
                weights=(),
                work=(),
                ram_weights=(),
                ram_work=(
                    ("video frames", 3 * shape.frames * pixels),
                    *self.held,
                    ("video encoder", encoder),
                    *((("video decoder", decoder),) if decoder else ()),
                ),
                seconds=shape.frames * pixels / self.case.rates.video_pixels_per_s,
            ),
        )


def best_of(groups: Iterable[Group], limits: Limits) -> Group | None:
    """Return the fastest of those that fit; ties go to fewer bytes."""
    return min(fitting(groups, limits), key=group_key, default=None)


def fitting(groups: Iterable[Group], limits: Limits) -> Iterator[Group]:
    """Yield those of ``groups`` that fit, as they come."""
    for group in groups:
        if group_fits(group, limits):
            yield group
        else:
            log.debug("refused, does not fit: %s", group[-1])


def group_key(group: Group) -> tuple[float, int]:
    """Return the key of a group: smaller is better."""
    return sum(phase.seconds for phase in group), vram_bytes(group) + ram_bytes(group)


def compute_path(stored: Storage, policy: Policy, rates: Rates) -> ComputePath:
    """Return how most matrices of the blocks multiply: as the device was found to allow, or, for a
    machine that is only described, as its rates say."""
    if stored.path is not None:
        return stored.path
    eight_bit = FORMATS[stored.format].gemm if stored.format in FORMATS else None
    if policy.compute == "fast" and eight_bit and rates.product_flops(eight_bit):
        return eight_bit
    return "dequant" if stored.scratch_bytes else "plain"


@dataclass(frozen=True)
class MatrixProducts:
    """How the matrices of a network's blocks multiply, and what that takes besides their bytes.

    Attributes:
        stored: how they are stored.
        block_bytes: of the largest block.
        policy, rates: of the job and of the machine.
    """

    stored: Storage
    block_bytes: int
    policy: Policy
    rates: Rates

    @property
    def flops_per_s(self) -> float:
        """Of products of matrices."""
        path = compute_path(self.stored, self.policy, self.rates)
        return self.rates.product_flops(path) or self.rates.flops

    @property
    def _eight_bit(self) -> bool:
        return compute_path(self.stored, self.policy, self.rates) not in ("plain", "dequant")

    def items(self, stored: Storage | None = None) -> Items:
        """Return what they take in VRAM.

        Args:
            stored: of matrices that are stored otherwise than those of the blocks.
        """
        stored = stored or self.stored
        if stored.path is None and self._eight_bit:
            return (("8-bit workspace", EIGHT_BIT_WORKSPACE_BYTES),)
        return stored.items

    @property
    def decode_s(self) -> float:
        """Seconds to decode a block's matrices once: every chunk of a forward does."""
        decoded, memory_bytes_per_s = self.stored.decoded_bytes, self.rates.memory_bytes_per_s
        if self._eight_bit or not decoded or memory_bytes_per_s is None:
            return 0.0
        return (self.block_bytes + decoded) / memory_bytes_per_s
