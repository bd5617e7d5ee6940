"""Built-in descriptions of true models: what their headers would say, without any file.

The numbers are those of the published configs (Wan-AI/Wan2.1-I2V-14B-720P-Diffusers); a test
compares the bytes with the classes of diffusers and transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
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

_DIM, _FFN, _TEXT, _IMAGE, _FREQ = 5120, 13824, 4096, 1280, 256
_CHANNELS, _OUT, _PATCH = 36, 16, 4
_LAYERS = 40

_STREAMED = (*((_DIM, _DIM),) * 6, (_FFN, _DIM), (_DIM, _FFN))
"""Matrices of a block: self-attention q, k, v, o; cross-attention q, o; feed-forward."""

_CROSS = ((_DIM, _DIM),) * 4
"""Cross-attention K and V of text and image, which leave the stream."""


def wan21_i2v_14b(weight_format: str) -> WanManifest:
    """Wan2.1 image-to-video 14B, all in bf16 but the blocks' matrices in ``weight_format``.

    Raises:
        ProfileError: no such format.
    """
    stored = get_format(weight_format)
    return WanManifest(
        transformer=_transformer(stored),
        text=TextSpec(Weights(8192, (385_896_448,) * 24, _ITEM), 4096, 64, 10240, 24, 64),
        vae=VaeSpec(
            encoder=Weights(107_196_416, (), _ITEM),
            decoder=Weights(146_591_744, (), _ITEM),
            base_dim=96,
            z_dim=16,
            dim_mult=(1, 2, 4, 4),
            num_res_blocks=2,
            temporal_downsample=(False, True, True),
        ),
        # 31 of 32 layers: the model is conditioned on the output of the last but one.
        image=ImageSpec(Weights(2_179_072, (39_358_464,) * 31, _ITEM), 1280, 5120, 31, 16, 224, 14),
    )


def _transformer(stored: QuantFormat) -> TransformerSpec:
    return TransformerSpec(
        weights=Weights(
            rest_bytes=_run(_plain(_rest_elements())),
            block_bytes=(_run((*_matrices(stored, _STREAMED), *_plain(_block_elements()))),)
            * _LAYERS,
            itemsize=_ITEM,
        ),
        cross_block_bytes=(_run((*_matrices(stored, _CROSS), *_plain((_DIM,) * 6))),) * _LAYERS,
        num_layers=_LAYERS,
        num_attention_heads=40,
        attention_head_dim=128,
        ffn_dim=_FFN,
        in_channels=_CHANNELS,
        out_channels=_OUT,
        text_dim=_TEXT,
        freq_dim=_FREQ,
        patch_size=(1, 2, 2),
        image_dim=_IMAGE,
        storage=_storage(stored),
    )


def _storage(stored: QuantFormat) -> Storage:
    """What computing with the matrices of a block takes, all of them in ``stored``."""
    sizes = [rows * columns * _ITEM for rows, columns in _STREAMED]
    if stored.plain:
        cast = sum(sizes) + sum(rows * columns * _ITEM for rows, columns in _CROSS)
        return Storage(stored.name, cast_bytes=0 if stored == get_format("bf16") else cast)
    return Storage(
        format=stored.name,
        scratch_bytes=max(sizes),
        workspace_bytes=max(stored.workspace_bytes(shape, "cuda") for shape in _STREAMED),
        decoded_bytes=sum(sizes),
    )


def _matrices(stored: QuantFormat, shapes: tuple[Shape, ...]) -> Iterator[int]:
    for shape in shapes:
        yield from map(spec_bytes, stored.storage(shape, _TAG).values())


def _plain(elements: tuple[int, ...]) -> Iterator[int]:
    for count in elements:
        yield count * _ITEM


def _run(tensors: Iterable[int]) -> int:
    """One aligned run of tensors, as `penstock.offload.layout` lays them out."""
    return align_up(sum(align_up(count, TENSOR_ALIGNMENT) for count in tensors), PAGE_BYTES)


def _block_elements() -> tuple[int, ...]:
    """The modulation table; biases of eight linears; q and k norms; norm2."""
    biases = (*(_DIM,) * 6, _FFN, _DIM)
    return (6 * _DIM, *biases, *(_DIM,) * 3, _DIM, _DIM)


def _rest_elements() -> tuple[int, ...]:
    """All that is not in a block: embedders with their biases, modulation and head."""
    linears = (
        (_DIM, _CHANNELS * _PATCH),
        (_DIM, _FREQ),
        (_DIM, _DIM),
        (6 * _DIM, _DIM),
        (_DIM, _TEXT),
        (_DIM, _DIM),
        (_IMAGE, _IMAGE),
        (_DIM, _IMAGE),
        (_OUT * _PATCH, _DIM),
    )
    weights = tuple(rows * columns for rows, columns in linears)
    biases = tuple(rows for rows, _ in linears)
    return (2 * _DIM, *weights, *biases, _IMAGE, _IMAGE, _DIM, _DIM)


BUILTIN: Mapping[str, Callable[[str], WanManifest]] = MappingProxyType(
    {"wan2.1-i2v-14b": wan21_i2v_14b}
)
