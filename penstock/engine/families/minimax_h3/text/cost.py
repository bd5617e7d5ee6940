"""What the text encoder takes, in closed form, and its phases in a plan.

Bytes are those of live tensors other than weights at the worst moment of
`penstock.engine.families.minimax_h3.text.encode`: never under what is measured, and within 5 % of
it at the true shapes. FLOPs count a multiply-add as two.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from penstock.engine.families.minimax_h3.terms import (
    picture_tokens,
    pictures_of,
    state_bytes,
    text_rows,
)
from penstock.engine.families.minimax_h3.text.patches import grid
from penstock.engine.families.minimax_h3.text.spec import TextSpec, VisionSpec
from penstock.profiles.phases import OBJECTS, OnePass
from penstock.profiles.plan import Items
from penstock.profiles.streams import Network, Stream

if TYPE_CHECKING:
    from penstock.engine.families.minimax_h3.terms import H3Case
    from penstock.profiles.phases import Step

_SINGLE = 4  # bytes of an fp32: norms and turns are computed in it
_INDEX = 8  # bytes of an int64


def text_bytes(spec: TextSpec, tokens: int, seen: int = 0, itemsize: int | None = None) -> int:
    """Return the peak bytes of activations while ``tokens`` tokens are encoded, ``seen`` of which
    stand for pictures."""
    item = itemsize or spec.weights.itemsize
    states = tokens * spec.hidden_size * item
    waves = 2 * tokens * spec.head_dim * item
    features = _mergers(spec) * seen * spec.hidden_size * item
    held = states + waves + features + seen * _INDEX
    return held + max(
        # Rows as they were read, and the pictures'
        seen * spec.hidden_size * item + states + tokens * _INDEX,
        _waves(tokens, spec.head_dim),
        _norm(tokens, spec.hidden_size, item),
        _attention(spec, tokens, item),
        states + 2 * tokens * spec.intermediate_size * item,
        2 * seen * spec.hidden_size * item,
    )


def _waves(tokens: int, head: int) -> int:
    """Return the angles of three axes in fp32, their cosines and sines, and one of both put
    together."""
    return tokens * (3 * 3 * head // 2 + 2 * head) * _SINGLE + 12 * (tokens + 1) * _INDEX + 4 * head


def _mergers(spec: TextSpec) -> int:
    return 0 if spec.vision is None else spec.vision.mergers


def _norm(rows: int, width: int, item: int) -> int:
    """Return two copies in fp32; or one, what is made of it and the same scaled."""
    single = rows * width * _SINGLE
    made = rows * width * item
    return max(2 * single, single + (2 if item < _SINGLE else 1) * made) + 2 * rows * _SINGLE


def _attention(spec: TextSpec, tokens: int, item: int) -> int:
    normed = tokens * spec.hidden_size * item
    queries, keys = tokens * spec.queries * item, tokens * spec.keys * item
    projected = queries + 2 * keys
    head_norm = _norm(tokens * spec.num_attention_heads, spec.head_dim, item)
    # Turning: normed, times cosines, half of it negated, put together
    turned = projected + 3 * queries + queries // 2
    sums = tokens * spec.num_attention_heads * _SINGLE
    return max(
        normed + projected,
        projected + head_norm,
        turned,
        3 * queries + 2 * keys,  # keys and values repeated for each query
        4 * queries + sums,
        queries + normed,
    )


def text_flops(spec: TextSpec, tokens: int) -> int:
    """Return the FLOPs of encoding ``tokens`` tokens; of the scores above the diagonal none is
    computed."""
    width = spec.hidden_size
    linear = width * (2 * spec.queries + 2 * spec.keys + 3 * spec.intermediate_size)
    attention = tokens * spec.queries
    return 2 * len(spec.weights.block_bytes) * tokens * (linear + attention)


def vision_bytes(spec: VisionSpec, patches: tuple[int, ...], itemsize: int | None = None) -> int:
    """Return the peak bytes of activations while pictures of so many patches are seen, the pixel
    values included."""
    item = itemsize or spec.weights.itemsize
    every, largest = sum(patches), max(patches)
    width, head = spec.hidden_size, spec.hidden_size // spec.num_heads
    states = every * width * item
    held = every * spec.values * item + states
    waves = 2 * every * head * _SINGLE
    out, last = (count // spec.merged * spec.out_hidden_size * item for count in (every, largest))
    part = largest * width * item
    merging = max(3 * part, 2 * part + last) + out - last
    # The table of places: four rows a patch, and the same weighed in fp32
    places = 4 * largest * (width * (item + _SINGLE) + _INDEX + _SINGLE)
    wide = largest * width * _SINGLE
    turning = part + (3 if item == _SINGLE else 4) * wide - (wide // 2)
    looking = 4 * part + max(turning, 4 * part)
    thinking = part + 2 * largest * spec.intermediate_size * item
    return held + max(places, waves + spec.mergers * out + max(looking, thinking, merging))


def vision_flops(spec: VisionSpec, patches: tuple[int, ...]) -> int:
    """Return the FLOPs of seeing pictures of so many patches."""
    width, layers = spec.hidden_size, len(spec.weights.block_bytes)
    merged = width * spec.merged
    merger = merged * (merged + spec.out_hidden_size) * (1 + spec.mergers) // spec.merged
    linear = layers * width * (4 * width + 2 * spec.intermediate_size) + spec.values * width
    return sum(2 * count * (linear + merger + 2 * layers * count * width) for count in patches)


def steps(case: H3Case) -> Iterator[Step]:
    """Yield the phases "vision", where there are pictures, and "text"."""
    tower = case.manifest.text.vision
    if pictures_of(case) and tower is not None:
        yield vision_step(case, tower)
    yield text_step(case)


@dataclass(frozen=True)
class TowerPass(OnePass):
    """A network whose blocks are visited once, with its other weights beside them."""

    def _weights(self, stream: Stream) -> Items:
        return (("non-block weights", self.rest_bytes), *stream.device_items)


def vision_step(case: H3Case, spec: VisionSpec) -> OnePass:
    """Return the vision tower over the given pictures; what is outside its layers stays beside
    them."""
    shape = case.workload.shape
    down, across = grid(shape.height, shape.width)
    patches = (down * across,) * pictures_of(case)
    return TowerPass(
        "vision",
        case,
        Network.of(spec.weights.block_bytes, resident=False),
        spec.weights.rest_bytes,
        (("activations", vision_bytes(spec, patches)), *spec.storage.items, *case.libraries()),
        (
            ("pictures", picture_bytes(case) + _prepared_bytes(spec, patches)),
            ("picture features", feature_bytes(case)),
            OBJECTS,
        ),
        vision_flops(spec, patches),
        visits=len(patches) * len(spec.weights.block_bytes),
        elements=sum(patches) * spec.hidden_size * len(spec.weights.block_bytes),
    )


def text_step(case: H3Case) -> OnePass:
    """Return the language model's first layers over the prompt as it is planned for."""
    spec, tokens = case.manifest.text, text_rows(case)
    layers, seen = len(spec.weights.block_bytes), picture_tokens(case)
    return OnePass(
        "text",
        case,
        Network.of(spec.weights.block_bytes, resident=False),
        0,
        (("activations", text_bytes(spec, tokens, seen)), *spec.storage.items, *case.libraries()),
        (
            ("encoder states", 2 * state_bytes(case)),
            ("pictures", picture_bytes(case)),
            ("picture features", feature_bytes(case)),
            OBJECTS,
        ),
        text_flops(spec, tokens),
        visits=layers,
        elements=layers * tokens * spec.hidden_size,
    )


def picture_bytes(case: H3Case) -> int:
    """Return the given pictures at the video's size, in bytes."""
    shape = case.workload.shape
    return pictures_of(case) * 3 * shape.width * shape.height


def feature_bytes(case: H3Case) -> int:
    """Return what the vision tower leaves for the language model, in host memory."""
    spec = case.manifest.text
    sets = 1 + _mergers(spec) if pictures_of(case) else 0
    return sets * picture_tokens(case) * spec.hidden_size * spec.weights.itemsize


def _prepared_bytes(spec: VisionSpec, patches: tuple[int, ...]) -> int:
    """Return the patches of the pictures in fp32, and of one of them what its making takes: every
    pixel in fp64, in fp32 and normed, beside the patches that repeat it."""
    one = max(patches) * spec.values
    return (sum(patches) * spec.values + one) * _SINGLE + one // 2 * (2 * _SINGLE + _SINGLE)
