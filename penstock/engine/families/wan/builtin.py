"""Built-in descriptions of true models: what their headers would say, without any file.

The numbers are those of the published configs (Wan-AI/Wan2.1-I2V-14B-720P-Diffusers); a test
compares the bytes with the classes of diffusers and transformers. Those of the others are Wan2.1's
``wan/configs``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType

from penstock.blocks import PAGE_BYTES, TENSOR_ALIGNMENT
from penstock.engine.families.wan.manifest import WanManifest
from penstock.engine.families.wan.spec import ImageSpec, TextSpec, TransformerSpec, VaeSpec
from penstock.formats.formats import QuantFormat, get_format, spec_bytes
from penstock.formats.rows import Shape
from penstock.formats.tags import ITEM_BYTES
from penstock.profiles.manifest import Storage, Weights
from penstock.units import align_up

_TAG = "BF16"
_ITEM = ITEM_BYTES[_TAG]

_TEXT, _IMAGE, _FREQ, _PATCH = 4096, 1280, 256, 4


@dataclass(frozen=True)
class _Dit:
    """A transformer by the numbers of its config."""

    dim: int
    ffn: int
    heads: int
    layers: int
    channels: int
    out: int = 16
    pictured: bool = False
    places: int = 0

    @property
    def streamed(self) -> tuple[Shape, ...]:
        """Matrices of a block: self-attention q, k, v, o; cross-attention q, o; feed-forward."""
        return (*((self.dim, self.dim),) * 6, (self.ffn, self.dim), (self.dim, self.ffn))

    @property
    def cross(self) -> tuple[Shape, ...]:
        """Cross-attention K and V of text and image, which leave the stream."""
        return ((self.dim, self.dim),) * (4 if self.pictured else 2)

    @property
    def cross_elements(self) -> tuple[int, ...]:
        """Biases of these, and norms of the keys."""
        return (self.dim,) * (6 if self.pictured else 3)

    @property
    def block_elements(self) -> tuple[int, ...]:
        """The modulation table; biases of eight linears; q and k norms; norm2."""
        biases = (*(self.dim,) * 6, self.ffn, self.dim)
        return (6 * self.dim, *biases, *(self.dim,) * 3, self.dim, self.dim)

    @property
    def rest_elements(self) -> tuple[int, ...]:
        """All that is not in a block: embedders with their biases, modulation and head."""
        dim = self.dim
        linears = [
            (dim, self.channels * _PATCH),
            (dim, _FREQ),
            (dim, dim),
            (6 * dim, dim),
            (dim, _TEXT),
            (dim, dim),
            (self.out * _PATCH, dim),
        ]
        if self.pictured:
            linears += [(_IMAGE, _IMAGE), (dim, _IMAGE)]
        weights = tuple(rows * columns for rows, columns in linears)
        biases = tuple(rows for rows, _ in linears)
        norms = (_IMAGE, _IMAGE, dim, dim) if self.pictured else ()
        places = (self.places * _IMAGE,) if self.places else ()
        return (2 * dim, *weights, *biases, *norms, *places)

    def spec(self, stored: QuantFormat) -> TransformerSpec:
        """Describe it in bf16 but the blocks' matrices."""
        block = (*_matrices(stored, self.streamed), *_plain(self.block_elements))
        cross = (*_matrices(stored, self.cross), *_plain(self.cross_elements))
        return TransformerSpec(
            weights=Weights(_run(_plain(self.rest_elements)), (_run(block),) * self.layers, _ITEM),
            cross_block_bytes=(_run(cross),) * self.layers,
            num_layers=self.layers,
            num_attention_heads=self.heads,
            attention_head_dim=self.dim // self.heads,
            ffn_dim=self.ffn,
            in_channels=self.channels,
            out_channels=self.out,
            text_dim=_TEXT,
            freq_dim=_FREQ,
            patch_size=(1, 2, 2),
            image_dim=_IMAGE if self.pictured else None,
            pos_embed=self.places,
            storage=self._storage(stored),
        )

    def _storage(self, stored: QuantFormat) -> Storage:
        """Return what computing with the matrices of a block takes, all of them in ``stored``."""
        sizes = [rows * columns * _ITEM for rows, columns in self.streamed]
        if stored.plain:
            cast = sum(sizes) + sum(rows * columns * _ITEM for rows, columns in self.cross)
            return Storage(stored.name, cast_bytes=0 if stored == get_format("bf16") else cast)
        return Storage(
            format=stored.name,
            scratch_bytes=max(sizes),
            workspace_bytes=max(stored.workspace_bytes(shape, "cuda") for shape in self.streamed),
            decoded_bytes=sum(sizes),
        )


_T2V_14B = _Dit(5120, 13824, 40, 40, 16)
_T2V_1_3B = _Dit(1536, 8960, 12, 30, 16)
_I2V_14B = _Dit(5120, 13824, 40, 40, 36, pictured=True)
_FLF2V_14B = _Dit(5120, 13824, 40, 40, 36, pictured=True, places=514)
_I2V_A14B = _Dit(5120, 13824, 40, 40, 36)
"""Each of the two; of T2V A14B they are as Wan2.1's."""
_TI2V_5B = _Dit(3072, 14336, 24, 30, 48, out=48)
_UMT5_XXL = TextSpec(Weights(8192, (385_896_448,) * 24, _ITEM), 4096, 64, 10240, 24, 64)
_VIT_H = ImageSpec(Weights(2_179_072, (39_358_464,) * 31, _ITEM), 1280, 5120, 31, 16, 224, 14)
"""31 of 32 layers: the model is conditioned on the output of the last but one."""
_VAE = VaeSpec(
    encoder=Weights(107_196_416, (), _ITEM),
    decoder=Weights(146_591_744, (), _ITEM),
    base_dim=96,
    z_dim=16,
    dim_mult=(1, 2, 4, 4),
    num_res_blocks=2,
    temporal_downsample=(False, True, True),
)


_VAE_48 = VaeSpec(
    encoder=Weights(299_274_240, (), _ITEM),
    decoder=Weights(1_110_106_112, (), _ITEM),
    base_dim=160,
    z_dim=48,
    dim_mult=(1, 2, 4, 4),
    num_res_blocks=2,
    temporal_downsample=(False, True, True),
    decoder_dim=256,
    residual=True,
    patch=2,
)


def _wan21(dit: _Dit, weight_format: str) -> WanManifest:
    """Return all in bf16 but the blocks' matrices in ``weight_format``.

    Raises:
        ProfileError: no such format.
    """
    return WanManifest(
        transformer=dit.spec(get_format(weight_format)),
        text=_UMT5_XXL,
        vae=_VAE,
        image=_VIT_H if dit.pictured else None,
    )


def _matrices(stored: QuantFormat, shapes: tuple[Shape, ...]) -> Iterator[int]:
    for shape in shapes:
        yield from map(spec_bytes, stored.storage(shape, _TAG).values())


def _plain(elements: tuple[int, ...]) -> Iterator[int]:
    for count in elements:
        yield count * _ITEM


def _run(tensors: Iterable[int]) -> int:
    """Return one aligned run of tensors, as `penstock.offload.layout` lays them out."""
    return align_up(sum(align_up(count, TENSOR_ALIGNMENT) for count in tensors), PAGE_BYTES)


def _wan22(dit: _Dit, weight_format: str) -> WanManifest:
    """Return the manifest of two transformers alike, stored as `_wan21`'s."""
    return replace(_wan21(dit, weight_format), second=dit.spec(get_format(weight_format)))


def _ti2v_5b(weight_format: str) -> WanManifest:
    """Wan2.2 TI2V 5B, stored as `_wan21`'s."""
    return replace(_wan21(_TI2V_5B, weight_format), vae=_VAE_48)


def wan21_i2v_14b(weight_format: str) -> WanManifest:
    """Wan2.1 image-to-video 14B.

    Raises:
        ProfileError: no such format.
    """
    return _wan21(_I2V_14B, weight_format)


BUILTIN: Mapping[str, Callable[[str], WanManifest]] = MappingProxyType(
    {
        "wan2.1-i2v-14b": wan21_i2v_14b,
        "wan2.1-t2v-14b": partial(_wan21, _T2V_14B),
        "wan2.1-t2v-1.3b": partial(_wan21, _T2V_1_3B),
        "wan2.1-flf2v-14b": partial(_wan21, _FLF2V_14B),
        "wan2.2-t2v-a14b": partial(_wan22, _T2V_14B),
        "wan2.2-i2v-a14b": partial(_wan22, _I2V_A14B),
        "wan2.2-ti2v-5b": _ti2v_5b,
    }
)
