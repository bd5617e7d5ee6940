"""The phases of a job as the planner sees them: what each may be, in bytes and in seconds.

A phase (or a group of them, where what the first leaves behind lives on in the next) can name the
best of its shapes inside limits, and the smallest.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol

from penstock.profiles.cost import encoders, vae
from penstock.profiles.cost.runs import FIRST_FRAME
from penstock.profiles.cost.transformer import UNIPC_HISTORY
from penstock.profiles.manifest import ImageSpec, ModelManifest, VideoShape
from penstock.profiles.plan import Items, PhasePlan
from penstock.profiles.policy import Limits, Policy
from penstock.profiles.rates import Rates
from penstock.profiles.streams import Network, Pace, Stream, all_streams, staging_bytes
from penstock.profiles.tiling import TileGrid
from penstock.units import MIB

TILE_GRIDS = (
    (1, 1), (2, 1), (2, 2), (3, 2), (3, 3), (4, 3), (4, 4), (5, 4), (5, 5), (6, 6), (7, 7), (8, 8),
)  # fmt: skip
"""Rows and columns of VAE tiles that are tried; each costs more arithmetic than the one before."""

ENCODER_BYTES_PER_PIXEL = 240
"""Host memory of libx264's look-ahead and references, a pixel of one frame: measured on
noise, the worst picture, with two threads."""

ENCODER_BASE_BYTES = 16 * MIB

RESTORED = "restored state"
"""Item of the context's host memory: what a kept job reads before it goes on."""

KEPT_TILE_COPIES = 2
"""Of a decoded tile's pixels: the file's bytes and their tensor when it is read again; saving takes
one."""

OBJECTS = ("small objects", MIB)
"""Item of the host memory of every phase that computes: what is in no tensor of its own account,
such as scalars, indices and Python's objects (up to 0.7 MB was seen by `benchmarks.kept`)."""

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

HOLE_SHARES: Mapping[str, float] = MappingProxyType({"decode": 0.25, "encode": 0.4})
"""Of those tensors' bytes: 0.23 and 0.30 to 0.39 were measured likewise."""

TEXT_TOKENS = 512
_SINGLE = 4  # bytes of an fp32

Group = tuple[PhasePlan, ...]


@dataclass(frozen=True)
class Workload:
    """What is asked of the model: the video's shape, the steps, and whether CFG is on.

    Attributes:
        kept: the job is kept while it runs: host memory holds what is being saved or read again.
        changes: frames of the conditioning clip that differ from the one before, as
            `penstock.profiles.cost.runs.clip_runs` takes them; None: any may.
    """

    shape: VideoShape
    steps: int
    guided: bool
    kept: bool = False
    changes: tuple[int, ...] | None = FIRST_FRAME

    @property
    def branches(self) -> int:
        """Forward passes a step."""
        return 2 if self.guided else 1


@dataclass(frozen=True)
class Case:
    """Everything a phase is planned for."""

    manifest: ModelManifest
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
        """What a GPU's libraries take in a phase.

        Args:
            convolution_bytes: operands and result of the phase's largest convolution: cuDNN lays
                them out anew, channels last.
        """
        if self.device != "cuda":
            return ()
        return ((LIBRARIES, CUDA_LIBRARY_BYTES + convolution_bytes),)

    def holes(self, phase: str, tensor_bytes: int) -> Items:
        """What a GPU's allocator holds beside ``tensor_bytes`` of a phase of the VAE."""
        if self.device != "cuda":
            return ()
        return ((HOLES, int(HOLE_SHARES[phase] * tensor_bytes)),)

    @property
    def latent(self) -> tuple[int, int, int]:
        """Latent frames, height and width."""
        return self.workload.shape.latent(self.manifest.vae)

    @property
    def latent_volume(self) -> int:
        """Elements of one latent channel."""
        frames, height, width = self.latent
        return frames * height * width


class Step(Protocol):
    """A group of phases that is planned together."""

    @property
    def name(self) -> str:
        """Of its last phase."""

    def best(self, limits: Limits) -> Group | None:
        """The fastest shape inside ``limits``; ties go to fewer bytes. None: nothing fits."""

    def all_small(self, limits: Limits) -> Iterator[Group]:
        """Shapes among which are the smallest in VRAM and in RAM, fitting or not."""


def vram_bytes(group: Group) -> int:
    """Peak VRAM of a group."""
    return max(phase.vram_bytes for phase in group)


def ram_bytes(group: Group) -> int:
    """Peak host memory of a group."""
    return max(phase.ram_bytes for phase in group)


def both_bytes(group: Group) -> int:
    """Peak of VRAM and host memory together."""
    return max(phase.vram_bytes + phase.ram_bytes for phase in group)


def group_fits(group: Group, limits: Limits) -> bool:
    """Whether no phase of ``group`` passes a limit."""
    pinned = max(phase.pinned_bytes for phase in group)
    return (
        vram_bytes(group) <= limits.vram_bytes
        and ram_bytes(group) <= limits.ram_bytes
        and (limits.pinned_bytes is None or pinned <= limits.pinned_bytes)
        and (limits.both_bytes is None or both_bytes(group) <= limits.both_bytes)
    )


def loading_s(nbytes: int, rates: Rates) -> float:
    """Seconds to bring weights from disk to the device, one after the other."""
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
    case: Case
    network: Network
    rest_bytes: int
    work: Items
    ram_work: Items
    flops: float
    visits: int
    elements: int = 0
    rest_stays: bool = False

    @classmethod
    def text(cls, case: Case) -> OnePass:
        """The text encoder."""
        spec, branches = case.manifest.text, case.workload.branches
        work = encoders.text_bytes(spec, prompts=branches)
        return cls(
            "text",
            case,
            Network.of(spec.weights.block_bytes, resident=False),
            spec.weights.rest_bytes,
            (("activations", work), *spec.storage.items, *case.libraries()),
            (("encoder states", encoder_state_bytes(case)), OBJECTS),
            encoders.text_flops(spec, prompts=branches),
            visits=branches * spec.num_layers,
            elements=branches * spec.num_layers * TEXT_TOKENS * spec.d_model,
        )

    @classmethod
    def image(cls, case: Case, spec: ImageSpec) -> OnePass:
        """The image encoder."""
        layers = len(spec.weights.block_bytes)
        return cls(
            "image",
            case,
            Network.of(spec.weights.block_bytes, resident=False),
            spec.weights.rest_bytes,
            (
                ("activations", encoders.image_bytes(spec)),
                *spec.storage.items,
                *case.libraries(),
            ),
            (
                ("encoder states", encoder_state_bytes(case)),
                ("picture", picture_bytes(case)),
                OBJECTS,
            ),
            encoders.image_flops(spec),
            visits=layers,
            elements=layers * spec.tokens * spec.hidden_size,
        )

    def best(self, limits: Limits) -> Group | None:
        """As `Step`."""
        return best_of(self.all_small(limits), limits)

    def all_small(self, limits: Limits) -> Iterator[Group]:
        """As `Step`: all there is, one a ring size."""
        for phase in self.phases(limits):
            yield (phase,)

    def phases(self, limits: Limits) -> Iterator[PhasePlan]:
        """One shape a ring size."""
        rates, blocks = self.case.rates, self.network.choices[0]
        compute_s = (
            self.flops / rates.flops
            + self.visits * rates.overhead_s
            + self.elements * rates.element_s
        )
        loaded = blocks.copied_bytes + self.rest_bytes
        for stream in all_streams(self.network, Pace(compute_s, cycles=1), rates):
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
class Tiled:
    """One half of the VAE, over a grid of tiles.

    Attributes:
        name: "encode" or "decode".
    """

    name: str
    case: Case

    def best(self, limits: Limits) -> Group | None:
        """As `Step`: grids come from the fastest on, so the first that fits is the best."""
        return next((group for group in self.all_small(limits) if group_fits(group, limits)), None)

    def all_small(self, limits: Limits) -> Iterator[Group]:
        """As `Step`: all grids."""
        for grid in self._grids():
            yield (self._phase(grid, limits),)

    def _grids(self) -> Iterator[TileGrid]:
        _, height, width = self.case.latent
        fixed = self.case.policy.tiles
        wanted = TILE_GRIDS if fixed is None else (fixed,)
        seen: set[TileGrid] = set()
        for rows, columns in wanted:
            grid = TileGrid(min(rows, height), min(columns, width))
            if grid not in seen:
                seen.add(grid)
                yield grid

    def _phase(self, grid: TileGrid, limits: Limits) -> PhasePlan:
        rates, spec, latent = self.case.rates, self.case.manifest.vae, self.case.latent
        decoding, on_cpu = self.name == "decode", self.case.device == "cpu"
        weights = spec.decoder if decoding else spec.encoder
        of, size = (spec, latent, grid), weights.itemsize
        if decoding:
            found, work = vae.decode_bytes(*of, size, on_cpu=on_cpu), vae.decode_work(*of)
        else:
            changes = self.case.workload.changes
            found = vae.encode_bytes(*of, size, changes=changes, on_cpu=on_cpu)
            work = vae.encode_work(*of, changes=changes)
        held = (*found.ram, ("latents", latents_bytes(self.case)), OBJECTS) if decoding else (
            ("encoder states", encoder_state_bytes(self.case)),
            ("picture", picture_bytes(self.case)),
            ("condition", condition_bytes(self.case)),
            OBJECTS,
        )  # fmt: skip
        if decoding and self.case.workload.kept:
            held = (*held, ("kept tile", KEPT_TILE_COPIES * tile_bytes(self.case, grid)))
        room = limits.ram_bytes - sum(count for _, count in held)
        return PhasePlan(
            self.name,
            weights=((f"VAE {self.name}r", weights.rest_bytes),),
            work=(*found.device, *self._gpu_items(found, weights.rest_bytes)),
            ram_weights=(("weights staging", staging_bytes(weights.rest_bytes, room)),),
            ram_work=held,
            tiles=(grid.rows, grid.cols),
            read_bytes=weights.rest_bytes,
            copied_bytes=weights.rest_bytes,
            seconds=work.seconds(rates) + loading_s(weights.rest_bytes, rates),
        )

    def _gpu_items(self, found: vae.VaeBytes, weight_bytes: int) -> Items:
        libraries = self.case.libraries(found.convolution_bytes)
        tensors = weight_bytes + found.device_bytes + found.convolution_bytes
        return (*libraries, *self.case.holes(self.name, tensors))


@dataclass(frozen=True)
class Mux:
    """Frames into a file: host memory only."""

    case: Case
    name: str = "mux"

    def best(self, limits: Limits) -> Group | None:
        """As `Step`."""
        return best_of(self.all_small(limits), limits)

    def all_small(self, limits: Limits) -> Iterator[Group]:
        """As `Step`: there is one way."""
        shape = self.case.workload.shape
        pixels = shape.width * shape.height
        encoder = ENCODER_BASE_BYTES + ENCODER_BYTES_PER_PIXEL * pixels
        yield (
            PhasePlan(
                "mux",
                weights=(),
                work=(),
                ram_weights=(),
                ram_work=(
                    ("video frames", 3 * shape.frames * pixels),
                    ("latents", latents_bytes(self.case)),
                    ("video encoder", encoder),
                ),
                seconds=shape.frames * pixels / self.case.rates.video_pixels_per_s,
            ),
        )


def best_of(groups: Iterable[Group], limits: Limits) -> Group | None:
    """The fastest of those that fit; ties go to fewer bytes."""
    fitting = [group for group in groups if group_fits(group, limits)]
    return min(fitting, key=group_key, default=None)


def group_key(group: Group) -> tuple[float, int]:
    """Smaller is better."""
    return sum(phase.seconds for phase in group), vram_bytes(group) + ram_bytes(group)


def encoder_state_bytes(case: Case) -> int:
    """What the encoders leave for the transformer, in host memory."""
    manifest = case.manifest
    text = case.workload.branches * TEXT_TOKENS * manifest.text.d_model
    bytes_ = text * manifest.text.weights.itemsize
    if manifest.image is not None:
        image = manifest.image
        bytes_ += image.tokens * image.hidden_size * image.weights.itemsize
    return bytes_


def picture_bytes(case: Case) -> int:
    """The conditioning picture at the video's size: as bytes, and in fp32."""
    return 3 * case.workload.shape.width * case.workload.shape.height * (1 + _SINGLE)


def condition_bytes(case: Case) -> int:
    """Mask and latents of the picture, in fp32."""
    spec = case.manifest.transformer
    return (spec.in_channels - spec.out_channels) * case.latent_volume * _SINGLE


def latents_bytes(case: Case) -> int:
    """The latents, in fp32."""
    return case.manifest.vae.z_dim * case.latent_volume * _SINGLE


def saved_state_bytes(case: Case) -> int:
    """A copy of the sampler's state, which is written while the next step computes: the latents
    and UniPC's history, the longest of the solvers."""
    return (1 + UNIPC_HISTORY) * latents_bytes(case)


def restored_bytes(case: Case) -> int:
    """The most that reading a kept job takes: two generations of the sampler's state and the file
    of one; or the encoded prompt and picture, and their file."""
    conditions = encoder_state_bytes(case) + condition_bytes(case)
    return max(3 * saved_state_bytes(case), 2 * conditions)


def tile_bytes(case: Case, grid: TileGrid) -> int:
    """The pixels of the largest tile of the video."""
    _, height, width = case.latent
    rows, columns = -(-height // grid.rows), -(-width // grid.cols)
    factor = case.manifest.vae.spatial_factor
    return 3 * case.workload.shape.frames * rows * columns * factor**2
