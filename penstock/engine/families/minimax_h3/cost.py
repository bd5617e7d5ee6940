"""Memory and arithmetic of the transformer, in closed form and without torch.

Bytes are those of activations: everything that is alive beside the weights. They follow
`penstock.engine.families.minimax_h3.forward` and `.tables` operation by operation; the comments
name the moments. What a quantised layer needs to unpack its weight is not counted here, nor is a
kernel's own workspace.
"""

from __future__ import annotations

from dataclasses import dataclass

from penstock.engine.families.minimax_h3.sizes import Latents
from penstock.engine.families.minimax_h3.spec import PackedSpec
from penstock.profiles.attention_bytes import attending_items

FP32_BYTES = 4
SAMPLER_TEMPORARIES = 6
"""Of the latents' size, alive at once inside a step of both schedules (measured, tested)."""
STATISTICS = 2
"""Fp32 values a row that a norm makes."""


@dataclass(frozen=True)
class PackedCase:
    """What the bytes of the denoising depend on, beside the model.

    Attributes:
        latents: sizes of what is denoised.
        text_rows: of the prompt, and of the pictures in it.
        pictures: that are given.
        chunk_rows: that go through a block together.
        fused_norms: a norm is one kernel, which makes its result and no more.
        cached: tensors of the latents' size that a step cache keeps.
        attention: of `penstock.profiles.attending.BACKENDS`.
    """

    latents: Latents
    text_rows: int
    pictures: int = 0
    chunk_rows: int = 1
    fused_norms: bool = False
    cached: int = 0
    attention: str = "sdpa"

    @property
    def given_rows(self) -> int:
        """Of given pictures."""
        return self.pictures * self.latents.frame_rows

    @property
    def rows(self) -> int:
        """Of the whole sequence."""
        sizes = self.latents
        return self.text_rows + self.given_rows + sizes.sound_rows + sizes.video_rows

    @property
    def timesteps(self) -> int:
        """The most distinct ones in a step."""
        return 3 if self.pictures else 2


def denoise_items(spec: PackedSpec, case: PackedCase) -> tuple[tuple[str, int], ...]:
    """Return the peak of the denoising: what stays through it, and its largest stage."""
    e, d = spec.weights.itemsize, spec.hidden_size
    chunk = min(case.chunk_rows, case.rows)
    given = case.given_rows * spec.video_width * FP32_BYTES
    held = {
        "latents": (1 + case.cached) * case.latents.elements * FP32_BYTES,
        "text": case.text_rows * d * e,
        "rotation": 4 * 3 * spec.rope_freq_dim * case.rows * e,
        "tables": spec.table_bytes(case.timesteps),
        "given pictures": given,
        "LoRA": chunk * spec.lora.rank * e,
    }
    rows_in = case.latents.elements * FP32_BYTES + given
    hidden = case.rows * d * e
    stages = {
        "embedding": {"rows": rows_in, "hidden": hidden, "projected": _projected(spec, case)},
        "blocks": {
            "rows": rows_in,
            "hidden": hidden,
            "keys and values": 2 * case.rows * spec.inner_dim * e,
            **_in_block(spec, case, chunk),
        },
        "heads": {"rows": rows_in, "hidden": hidden, "heads": _heads(spec, case, chunk)},
        "sampler": {"sampler": SAMPLER_TEMPORARIES * case.latents.elements * FP32_BYTES},
    }
    largest = max(stages.values(), key=lambda stage: sum(stage.values()))
    return tuple({**held, **largest}.items())


def _in_block(spec: PackedSpec, case: PackedCase, chunk: int) -> dict[str, int]:
    """Return the largest moment of a chunk in a block, attention by another kernel among them."""
    attending = attending_items(
        case.attention,
        spec.num_attention_heads,
        spec.attention_head_dim,
        chunk,
        case.rows,
        spec.weights.itemsize,
    )
    largest = {"chunk": _chunk(spec, case, chunk)}
    return max(largest, attending, key=lambda moment: sum(moment.values()))


def _projected(spec: PackedSpec, case: PackedCase) -> int:
    """Return the rows of the video in fp32, a chunk; or those of the sound, and once more as they
    are kept."""
    d, chunk = spec.hidden_size, min(case.chunk_rows, case.latents.video_rows + case.given_rows)
    sound = case.latents.sound_rows * d * (FP32_BYTES + spec.weights.itemsize)
    return max(chunk * d * FP32_BYTES, sound)


def _norm(spec: PackedSpec, case: PackedCase, rows: int, width: int) -> int:
    """Return what a norm makes, its result among it: on the CPU torch composes it of an fp32 copy
    and two fp32 products."""
    e = spec.weights.itemsize
    copy = 0 if e == FP32_BYTES else FP32_BYTES
    made = e if case.fused_norms else copy + 2 * FP32_BYTES
    return rows * (width * made + STATISTICS * FP32_BYTES * max(1, width // spec.hidden_size))


def _head_norm(spec: PackedSpec, case: PackedCase, rows: int) -> int:
    """Return queries or keys, and what norming each head makes of them."""
    e, inner = spec.weights.itemsize, spec.inner_dim
    copy = 0 if e == FP32_BYTES else FP32_BYTES
    made = e if case.fused_norms else copy + 2 * FP32_BYTES
    statistics = STATISTICS * FP32_BYTES * spec.num_attention_heads
    return rows * (inner * (e + made) + statistics)


def _chunk(spec: PackedSpec, case: PackedCase, rows: int) -> int:
    """Return the largest moment of a chunk in a block."""
    e, d, inner = spec.weights.itemsize, spec.hidden_size, spec.inner_dim
    turned = 2 * 3 * spec.rope_freq_dim * spec.num_attention_heads
    return max(
        _norm(spec, case, rows, d),
        rows * (d + inner) * e,  # normed, and its queries (or keys, or values)
        _head_norm(spec, case, rows),
        rows * (2 * inner + turned) * e,  # queries before and after turning, and two products
        rows * (2 * inner * e + FP32_BYTES * spec.num_attention_heads),  # attending
        rows * (inner + d) * e,  # attended, and its projection
        rows * (d + 3 * spec.ffn_dim) * e,  # normed; value and gate; the gate's activation
    )


def _heads(spec: PackedSpec, case: PackedCase, rows: int) -> int:
    """Return a chunk through the last norm, in fp32 and out of both heads; and what is kept of
    all."""
    d, e = spec.hidden_size, spec.weights.itemsize
    out = spec.video_width + spec.audio_in_channels
    wide = 0 if e == FP32_BYTES else FP32_BYTES
    kept = case.latents.elements * FP32_BYTES
    moments = (_norm(spec, case, rows, d), rows * d * (e + wide), rows * (d + out) * FP32_BYTES)
    return kept + max(moments)


def once_items(spec: PackedSpec, case: PackedCase, steps: int) -> tuple[tuple[str, int], ...]:
    """Return the peak of what is made once a job: the text's rows, and the tables of so many
    steps."""
    e, d, n = spec.weights.itemsize, spec.hidden_size, case.text_rows
    times = case.timesteps
    hidden = n * d * e
    waves = steps * times * spec.time_values
    stages = {
        "refining": {"states": n * spec.text_dim * e, "refined": 2 * hidden + _refined(spec, case)},
        "time": {"text": hidden, "waves": waves * FP32_BYTES},
        "tables": {"text": hidden, "one block's": 3 * spec.table_bytes(times) // spec.num_layers},
    }
    activated = steps * times * (spec.time_width + 2 * d) * spec.time_itemsize
    largest = max(stages.values(), key=lambda stage: sum(stage.values()))
    return (("activations", activated + sum(largest.values())),)


def _refined(spec: PackedSpec, case: PackedCase) -> int:
    """Return the largest moment of a refiner's block, beside its hidden states and what it
    normed."""
    e, d, inner, n = spec.weights.itemsize, spec.hidden_size, spec.inner_dim, case.text_rows
    return max(
        n * inner * e + _head_norm(spec, case, n),  # queries beside keys
        n * (4 * inner * e + FP32_BYTES * spec.num_attention_heads),  # attending
        n * (d + 3 * spec.ffn_dim) * e,  # normed; value and gate; the gate's activation
        _norm(spec, case, n, d),
    )


def once_flops(spec: PackedSpec, case: PackedCase, steps: int) -> int:
    """Return the arithmetic of what is made once."""
    d, inner, n = spec.hidden_size, spec.inner_dim, case.text_rows
    block = 4 * d * inner + 3 * d * spec.ffn_dim
    text = n * (d * spec.text_dim + spec.num_refiner_layers * block)
    tables = spec.table_bytes(case.timesteps) // spec.weights.itemsize * spec.time_width
    return 2 * (text + steps * tables)


@dataclass(frozen=True)
class PassFlops:
    """Floating-point operations of one forward pass, a multiply-add being two."""

    linear: int
    attention: int


def pass_flops(spec: PackedSpec, case: PackedCase) -> PassFlops:
    """Return the arithmetic of one forward pass."""
    d, inner, n = spec.hidden_size, spec.inner_dim, case.rows
    block = 4 * d * inner + 3 * d * spec.ffn_dim
    ends = d * (2 * spec.video_width + spec.audio_in_channels)
    return PassFlops(
        linear=2 * n * (spec.num_layers * block + spec.lora.elements + ends),
        attention=4 * spec.num_layers * n * n * inner,
    )
