"""What the planner knows of a model: the numbers in its configs and the bytes in its headers.

Plain values, free of torch, made from a folder's headers (`penstock.engine.model.files`) or from a
built-in description. Names follow the configs of diffusers and transformers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

SCRATCH = "dequantisation scratch"
"""Label of the buffer that matrices are decoded into, in plans."""

ComputePath = Literal["plain", "dequant", "fp8", "int8", "nvfp4", "mxfp8"]
"""How matrices multiply: as they are, decoded first, or in 8 bits."""


@dataclass(frozen=True)
class Weights:
    """Bytes of one component as they are held in memory.

    Attributes:
        rest_bytes: all that is not in a block: one aligned run, and what is cast or decoded of it.
        block_bytes: one entry a block, each an aligned run.
        itemsize: bytes of one activation element (the compute dtype), 2 or 4.
    """

    rest_bytes: int
    block_bytes: tuple[int, ...]
    itemsize: int

    @property
    def total_bytes(self) -> int:
        """Bytes of the whole component."""
        return self.rest_bytes + sum(self.block_bytes)


@dataclass(frozen=True)
class Storage:
    """How the matrices of a network's blocks are stored, where that is not the compute dtype.

    Attributes:
        format: its name.
        scratch_bytes: the largest matrix in the compute dtype: each is decoded there before use.
        workspace_bytes: what decoding takes besides, for a moment.
        decoded_bytes: written when all matrices of a block are decoded once.
        eight_bit_bytes: temporaries of 8-bit matrix products, where some layers compute so.
        cast_bytes: other tensors of a block that are cast or decoded for a visit.
        path: of most matrices, as a device was found to allow; None: the planner's rates decide.
    """

    format: str = "bf16"
    scratch_bytes: int = 0
    workspace_bytes: int = 0
    decoded_bytes: int = 0
    eight_bit_bytes: int = 0
    cast_bytes: int = 0
    path: ComputePath | None = None

    @property
    def items(self) -> tuple[tuple[str, int], ...]:
        """``(label, bytes)`` of all that computing with the stored matrices takes besides them."""
        named = (
            (SCRATCH, self.scratch_bytes),
            ("dequantisation workspace", self.workspace_bytes),
            ("8-bit workspace", self.eight_bit_bytes),
            ("cast tensors", self.cast_bytes),
        )
        return tuple((label, count) for label, count in named if count)


@dataclass(frozen=True)
class LoraSpec:
    """LoRAs beside the weights of the DiT; their bytes are in its `Weights`.

    Attributes:
        rank: the largest: activations of a token between the two matrices of a pair.
        elements: of the matrices that each token meets in one pass over all blocks.
    """

    rank: int = 0
    elements: int = 0


class Factors(Protocol):
    """How much smaller latents are than the video."""

    @property
    def spatial_factor(self) -> int:
        """Pixels a latent, each way."""

    @property
    def temporal_factor(self) -> int:
        """Frames a latent frame (after the first)."""


@dataclass(frozen=True)
class VideoShape:
    """Size of a video in pixels and frames, and what follows from it."""

    width: int
    height: int
    frames: int

    def latent(self, vae: Factors) -> tuple[int, int, int]:
        """Return the latent frames, height and width."""
        return (
            (self.frames - 1) // vae.temporal_factor + 1,
            self.height // vae.spatial_factor,
            self.width // vae.spatial_factor,
        )


@dataclass(frozen=True)
class Picture:
    """The picture a video starts from, as the header of its file describes it.

    Attributes:
        width, height: upright, in pixels.
        decode_bytes: the most host memory that decoding it takes, the decoded picture included.
    """

    width: int
    height: int
    decode_bytes: int


Wanted = Literal["none", "may", "must"]
"""Whether a model takes a picture: never, if there is one, or always."""


@dataclass(frozen=True)
class Pictures:
    """The pictures that a video may start from and end with."""

    first: Wanted
    last: Wanted = "none"


@dataclass(frozen=True)
class Prefetch:
    """Weights that may come before their own phase, where RAM has room.

    Attributes:
        stream: the phase whose first blocks are read during all phases before it.
        blocks_of: the network whose blocks these are.
        weights: the phase whose weights are read during the last step before it; "": those of none.
        weights_of: the network whose weights these are.
        then: the phase that goes on after ``stream`` with the blocks of another network, which are
            read from the last step of ``stream`` on; "": there is none.
        then_of: that network.
    """

    stream: str
    blocks_of: str
    weights: str
    weights_of: str
    then: str = ""
    then_of: str = ""

    @property
    def last_stream(self) -> str:
        """The phase in whose last step ``weights`` are read."""
        return self.then or self.stream


@dataclass(frozen=True)
class Heads:
    """Self-attention of the network that streams.

    Attributes:
        count, width: its heads, and channels of one.
        itemsize: bytes of an element that it computes in.
    """

    count: int
    width: int
    itemsize: int
