"""Memory and arithmetic of the diffusion transformer, in closed form and without torch.

Bytes are those of activations: everything that is alive beside the weights. They follow
`penstock.engine.families.wan.forward` operation by operation, so that a plan's figure is never
below what a run takes; the comments name the moment that is the peak. What a quantised linear
layer needs to
unpack its weight is not an activation and not counted here, nor is a kernel's own workspace.

Every function takes the compute dtype's itemsize from ``spec.weights.itemsize``: 4 or 2 bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from penstock.engine.families.wan.spec import TransformerSpec
from penstock.profiles.attention_bytes import attending_items

TEXT_TOKENS = 512
"""Text tokens of Wan's context, a constant in diffusers' attention processor too."""

WIDE_ROWS = 512
"""Rows of a matrix outside the blocks that are cast to fp32 at a time, where the hidden states are
fp32 beside 16-bit weights."""

FP32_BYTES = 4
UNIPC_HISTORY = 3
"""Latents that diffusers' UniPC of order 2 keeps: two model outputs and the last sample."""
SAMPLER_TEMPORARIES = 9
"""Latents alive at once inside a sampler's step, guidance included (measured, tested)."""


@dataclass(frozen=True)
class PeakBytes:
    """What is alive at the peak of a phase.

    Attributes:
        stage: the part of the phase in which the peak lies.
        items: bytes by name.
    """

    stage: str
    items: tuple[tuple[str, int], ...]

    @property
    def total_bytes(self) -> int:
        """The peak."""
        return sum(count for _, count in self.items)

    def __getitem__(self, name: str) -> int:
        return dict(self.items)[name]

    @property
    def told(self) -> tuple[tuple[str, int], ...]:
        """The items by the names that people read in plans and refusals."""
        return tuple((_WORDS.get(name, name), count) for name, count in self.items)


_WORDS: Mapping[str, str] = MappingProxyType(
    {
        "block_modulation": "a block's modulation",
        "cat": "latents and condition, joined",
        "chunk": "activations of a chunk",
        "cross_kv": "cross-attention K/V",
        "encoder_states": "encoder states",
        "fused": "predictions of the windows, joined",
        "model_input": "the transformer's input",
        "outputs": "predictions",
        "rope": "rotary embeddings",
        "self_kv": "self-attention K/V",
    }
)


@dataclass(frozen=True)
class Flops:
    """Floating-point operations of one forward pass, a multiply-add being two."""

    linear: int
    self_attention: int
    cross_attention: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.linear + self.self_attention + self.cross_attention


@dataclass(frozen=True)
class DenoiseCase:
    """What the bytes of the denoising phase depend on, beside the model.

    Attributes:
        latent: latent frames, height and width, of a window of the video.
        chunk_tokens: tokens that go through a block together.
        branches: forward passes a window and step: 2 with guidance, else 1.
        visit_branches: how many of them, of all windows, go through a block in one visit.
        steps: of the schedule.
        image_tokens: of the image encoder; 0 for a text-to-video model.
        text_tokens: length of the text context.
        history_latents: latents that the scheduler keeps between steps.
        cross_kv_on_device: all cross-attention K/V stay on the device; else they are fetched from
            elsewhere for one block and branch at a time.
        fused_norms: an RMS norm is one kernel, which makes its result and no more.
        attention: of `penstock.profiles.attending.BACKENDS`.
        residual: "fp32" keeps the hidden states, the time embedding and the head in fp32; "bf16" in
            the compute dtype.
        windows: that a step denoises.
        frames: latent frames of the whole video, where that is more than a window.
        cached_latents: of the latents' size, which a step cache keeps between steps.
        contrasted: each branch attends to a negative prompt as well.
        still: the first latent frame is given: its tokens are at another timestep than the others.
    """

    latent: tuple[int, int, int]
    chunk_tokens: int
    branches: int
    visit_branches: int
    steps: int
    image_tokens: int
    text_tokens: int = TEXT_TOKENS
    history_latents: int = UNIPC_HISTORY
    cross_kv_on_device: bool = True
    fused_norms: bool = False
    attention: str = "sdpa"
    residual: str = "bf16"
    windows: int = 1
    frames: int = 0
    cached_latents: int = 0
    contrasted: bool = False
    still: bool = False

    @property
    def branch_text_tokens(self) -> int:
        """Text tokens that one branch attends to."""
        return self.text_tokens * (2 if self.contrasted else 1)

    @property
    def rows(self) -> int:
        """Timesteps of a step."""
        return 2 if self.still else 1

    @property
    def whole(self) -> tuple[int, int, int]:
        """Latent frames, height and width of the video."""
        return max(self.frames, self.latent[0]), *self.latent[1:]

    @property
    def passes(self) -> int:
        """Visits of each block in a step."""
        return -(-self.windows * self.branches // self.visit_branches)


def grid_tokens(spec: TransformerSpec, latent: tuple[int, int, int]) -> int:
    """Return the tokens of a latent grid."""
    count = 1
    for size, patch in zip(latent, spec.patch_size, strict=True):
        count *= size // patch
    return count


def denoise_bytes(spec: TransformerSpec, case: DenoiseCase) -> PeakBytes:
    """Return the peak of the denoising phase: what stays through it and its largest stage."""
    held = {
        "latents": sampler_state_bytes(spec, case),
        "model_input": spec.in_channels * _volume(case.latent) * spec.weights.itemsize,
        "rope": _rope_bytes(spec, case),
        "modulation": modulation_bytes(spec, case),
        "cross_kv": _cross_kv_held_bytes(spec, case),
        "lora": _lora_bytes(spec, case),
        "fused": _fused_bytes(spec, case),
    }
    stages = {
        "input": {"cat": spec.in_channels * _volume(case.latent) * FP32_BYTES},
        "embed": _embed_stage(spec, case),
        "blocks": _block_stage(spec, case),
        "head": _head_stage(spec, case),
        "sampler": _sampler_stage(spec, case),
    }
    stage = max(stages, key=lambda name: sum(stages[name].values()))
    return PeakBytes(stage, tuple({**held, **stages[stage]}.items()))


def context_bytes(spec: TransformerSpec, case: DenoiseCase) -> PeakBytes:
    """Return the peak of the phase that computes time embedding, contexts and cross-attention
    K/V."""
    d, e = spec.inner_dim, spec.weights.itemsize
    text, image = case.text_tokens, case.image_tokens
    states = case.branches * text * spec.text_dim + image * (spec.image_dim or 0)
    held = {
        "encoder_states": states * e,
        "contexts": case.branches * (text + image) * d * e,
        "modulation": modulation_bytes(spec, case),
    }
    # While the last block's keys are being normalised, what follows is not there yet: their own
    # values, and after the only branch's text also the image's keys and values.
    after_text = text + image if case.branches == 1 else text
    kept = cross_kv_bytes(spec, case)
    if not case.cross_kv_on_device:
        kept //= spec.num_layers  # each block's leave before the next
    normalising = max(
        0,
        _rms_norm_bytes(spec, text, case.fused_norms) - 2 * after_text * d * e,
        _rms_norm_bytes(spec, image, case.fused_norms) - 2 * image * d * e,
    )
    stages = {
        "embedders": {"embedders": _embedder_bytes(spec, case)},
        "cross_kv": {"cross_kv": kept, "normalising": normalising},
        "steps": {
            "cross_kv": kept,
            "embedders": _embedder_rows_bytes(spec) + _wide_rows_bytes(spec, case),
        },
    }
    held["lora"] = max(text, image) * spec.lora.rank * e
    stage = max(stages, key=lambda name: sum(stages[name].values()))
    return PeakBytes(stage, tuple({**held, **stages[stage]}.items()))


def cross_kv_bytes(spec: TransformerSpec, case: DenoiseCase) -> int:
    """Return the cross-attention keys and values of all blocks; the image's serve all branches."""
    tokens = case.branches * case.branch_text_tokens + case.image_tokens
    return 2 * spec.num_layers * tokens * spec.inner_dim * spec.weights.itemsize


def _cross_kv_held_bytes(spec: TransformerSpec, case: DenoiseCase) -> int:
    """Return all of them, or those of one block and branch."""
    if case.cross_kv_on_device:
        return cross_kv_bytes(spec, case)
    tokens = case.branch_text_tokens + case.image_tokens
    return 2 * tokens * spec.inner_dim * spec.weights.itemsize


def modulation_bytes(spec: TransformerSpec, case: DenoiseCase) -> int:
    """Return the time embedding of all steps: one row for the head and six for the blocks."""
    rows = case.steps + case.rows - 1
    return rows * 7 * spec.inner_dim * _residual_itemsize(spec, case)


def sampler_state_bytes(spec: TransformerSpec, case: DenoiseCase) -> int:
    """Return the sample, the scheduler's history, what a step cache keeps and the image
    conditioning, in fp32."""
    condition = spec.in_channels - spec.out_channels
    channels = (1 + case.history_latents + case.cached_latents) * spec.out_channels + condition
    given = spec.out_channels * _volume((1, *case.latent[1:])) if case.still else 0
    return (channels * _volume(case.whole) + given) * FP32_BYTES


def _fused_bytes(spec: TransformerSpec, case: DenoiseCase) -> int:
    """Return the windows' predictions together, in fp32; one window's is taken as it is."""
    return 0 if case.windows == 1 else spec.out_channels * _volume(case.whole) * FP32_BYTES


def denoise_flops(
    spec: TransformerSpec, tokens: int, image_tokens: int, text_tokens: int = TEXT_TOKENS
) -> Flops:
    """Return the arithmetic of one forward pass of one branch, as `denoise_forward` does it.

    The two scores-and-values products of attention count 4 n m d each block; norms, rotations and
    activations are left out.
    """
    d, layers = spec.inner_dim, spec.num_layers
    patch = 1
    for size in spec.patch_size:
        patch *= size
    block = 6 * d * d + 2 * d * spec.ffn_dim  # q, k, v, o; cross q, o; up, down
    ends = patch * d * (spec.in_channels + spec.out_channels)
    return Flops(
        linear=2 * tokens * (layers * block + spec.lora.elements + ends),
        self_attention=4 * layers * tokens * tokens * d,
        cross_attention=4 * layers * tokens * (text_tokens + image_tokens) * d,
    )


def context_flops(spec: TransformerSpec, case: DenoiseCase) -> int:
    """Return the arithmetic before denoising: embedders, time embedding and cross-attention K/V."""
    d, image_dim = spec.inner_dim, spec.image_dim or 0
    texts = case.branches * case.text_tokens
    blocks = spec.num_layers * (texts + case.image_tokens) * 2 * d * d
    text = texts * (spec.text_dim + d) * d
    image = case.branches * case.image_tokens * (image_dim + d) * image_dim
    time = case.steps * (spec.freq_dim + 7 * d) * d
    return 2 * (blocks + text + image + time)


def _volume(latent: tuple[int, int, int]) -> int:
    t, h, w = latent
    return t * h * w


def _upcast(itemsize: int) -> int:
    """Return the bytes an element of the fp32 copy that a norm makes of its input."""
    return 0 if itemsize == FP32_BYTES else FP32_BYTES


def _rope_bytes(spec: TransformerSpec, case: DenoiseCase) -> int:
    """Return the cosine and sine of half a head's width for each token, in fp32."""
    return grid_tokens(spec, case.latent) * spec.attention_head_dim * FP32_BYTES


def _residual_itemsize(spec: TransformerSpec, case: DenoiseCase) -> int:
    """Return the bytes an element of the hidden states, the time embedding and the predictions."""
    return FP32_BYTES if case.residual == "fp32" else spec.weights.itemsize


def _is_wide(spec: TransformerSpec, case: DenoiseCase) -> bool:
    """Return whether the hidden states are wider than what is computed with."""
    return _residual_itemsize(spec, case) > spec.weights.itemsize


def _tokens_bytes(spec: TransformerSpec, case: DenoiseCase) -> int:
    """Return all tokens in the compute dtype."""
    return grid_tokens(spec, case.latent) * spec.inner_dim * spec.weights.itemsize


def _hidden_bytes(spec: TransformerSpec, case: DenoiseCase) -> int:
    return grid_tokens(spec, case.latent) * spec.inner_dim * _residual_itemsize(spec, case)


def _output_bytes(spec: TransformerSpec, case: DenoiseCase) -> int:
    return spec.out_channels * _volume(case.latent) * _residual_itemsize(spec, case)


def _earlier_outputs_bytes(spec: TransformerSpec, case: DenoiseCase) -> int:
    """Return the predictions of the branches that went before, while the last ones are under way;
    of windows, those of one alone, which wait for its last branch."""
    if case.windows > 1:
        waiting = case.visit_branches % case.branches and case.branches - 1
        return waiting * _output_bytes(spec, case)
    last_visit = (case.branches - 1) % case.visit_branches + 1
    return (case.branches - last_visit) * _output_bytes(spec, case)


def _embed_stage(spec: TransformerSpec, case: DenoiseCase) -> Mapping[str, int]:
    """Return the convolution's output beside its transposed copy, or all branches' copies."""
    hidden = _hidden_bytes(spec, case)
    return {
        "hidden": max(_tokens_bytes(spec, case) + hidden, case.visit_branches * hidden),
        "outputs": _earlier_outputs_bytes(spec, case),
    }


def _block_stage(spec: TransformerSpec, case: DenoiseCase) -> Mapping[str, int]:
    chunk = min(case.chunk_tokens, grid_tokens(spec, case.latent))
    largest = max(
        _layer_norm_bytes(spec, case, chunk),
        _rms_norm_bytes(spec, chunk, case.fused_norms),
        _rotation_bytes(spec, chunk),
        _attention_bytes(spec, chunk, case),
        _feed_forward_bytes(spec, chunk),
    )
    attending = attending_items(
        case.attention,
        spec.num_attention_heads,
        spec.attention_head_dim,
        chunk,
        grid_tokens(spec, case.latent),
        spec.weights.itemsize,
    )
    return {
        "hidden": case.visit_branches * _hidden_bytes(spec, case),
        "self_kv": 2 * _tokens_bytes(spec, case),
        "outputs": _earlier_outputs_bytes(spec, case),
        "block_modulation": case.rows * _block_modulation_bytes(spec),
        **max({"chunk": largest}, attending, key=lambda moment: sum(moment.values())),
    }


def _block_modulation_bytes(spec: TransformerSpec) -> int:
    """Return six fp32 rows and two scales; their fp32 operand, then a norm's fp32 weight and
    bias."""
    return (6 + 2 + 6) * spec.inner_dim * FP32_BYTES


def _layer_norm_bytes(spec: TransformerSpec, case: DenoiseCase, tokens: int) -> int:
    """Return the fp32 output beside the fp32 copy of its input, or beside its own in the compute
    dtype; and two fp32 statistics a token."""
    e = spec.weights.itemsize
    beside = e if _is_wide(spec, case) else _upcast(e)
    return tokens * ((beside + FP32_BYTES) * spec.inner_dim + 2 * FP32_BYTES)


def _wide_rows_bytes(spec: TransformerSpec, case: DenoiseCase) -> int:
    """Return the rows of the time embedding's matrices in fp32 beside all steps' angles and inner
    rows, which are all there before the projections are."""
    if not _is_wide(spec, case):
        return 0
    rows = (min(WIDE_ROWS, 6 * spec.inner_dim) * (spec.inner_dim + 1)) * FP32_BYTES
    return rows + case.steps * (spec.freq_dim + 3 * spec.inner_dim) * FP32_BYTES


def _rms_norm_bytes(spec: TransformerSpec, tokens: int, fused: bool) -> int:
    """Return the input, its fp32 copy, and two fp32 products at once, as torch composes it on the
    CPU; ``fused``, input and result. A statistic or two a token."""
    e = spec.weights.itemsize
    width = (2 * e if fused else e + _upcast(e) + 2 * FP32_BYTES) * spec.inner_dim
    return tokens * (width + 2 * FP32_BYTES)


def _rotation_bytes(spec: TransformerSpec, tokens: int) -> int:
    """Return queries before and after, and the fp32 products of half their elements, twice."""
    return tokens * spec.inner_dim * (2 * spec.weights.itemsize + FP32_BYTES)


def _attention_bytes(spec: TransformerSpec, tokens: int, case: DenoiseCase) -> int:
    """Count queries, the result over the text (or all tokens), the one over the image, and one fp32
    sum a head; later the result, its projection and the gated fp32 product. Contrasted: queries,
    both results over texts, and an fp32 copy of one of them for its norm, with the norms of
    both."""
    e = spec.weights.itemsize
    results = 3 if case.image_tokens else 2
    attending = results * e * spec.inner_dim + FP32_BYTES * spec.num_attention_heads
    if case.contrasted:
        attending = max(attending, (3 * e + FP32_BYTES) * spec.inner_dim + 4 * FP32_BYTES)
    return tokens * max(attending, (e + FP32_BYTES) * spec.inner_dim)


def _feed_forward_bytes(spec: TransformerSpec, tokens: int) -> int:
    """Return the wide activations beside the block's width, before and after."""
    return tokens * (spec.inner_dim + spec.ffn_dim) * spec.weights.itemsize


def _lora_bytes(spec: TransformerSpec, case: DenoiseCase) -> int:
    """Return a chunk's activations between the two matrices of a low-rank pair, one pair at a
    time."""
    chunk = min(case.chunk_tokens, grid_tokens(spec, case.latent))
    return chunk * spec.lora.rank * spec.weights.itemsize


def _head_stage(spec: TransformerSpec, case: DenoiseCase) -> Mapping[str, int]:
    """Count the head: hidden states go and outputs come one branch at a time; each is projected,
    then unpatched."""
    hidden, output = _hidden_bytes(spec, case), _output_bytes(spec, case)
    chunk = min(case.chunk_tokens, grid_tokens(spec, case.latent))
    patch_row = output // grid_tokens(spec, case.latent)
    e, wide = spec.weights.itemsize, _is_wide(spec, case)
    norming = chunk * (_upcast(e) * (not wide) + FP32_BYTES) * spec.inner_dim
    projecting = chunk * (spec.inner_dim * _residual_itemsize(spec, case) + patch_row)
    work = output + max(output, norming + 2 * chunk * FP32_BYTES, projecting)
    # The tables' rows; and, cast, the projection's.
    rows = (6 + wide * (patch_row // FP32_BYTES)) * (spec.inner_dim + wide) * FP32_BYTES
    visit = case.visit_branches
    most = visit if case.windows == 1 else case.branches - 1
    moments = (((visit - done) * hidden, min(done, most) * output) for done in range(visit))
    states, results = max(moments, key=sum)
    outputs = results + _earlier_outputs_bytes(spec, case)
    return {"hidden": states, "outputs": outputs, "head": work + rows}


def _sampler_stage(spec: TransformerSpec, case: DenoiseCase) -> Mapping[str, int]:
    latent = spec.out_channels * _volume(case.whole) * FP32_BYTES
    return {
        "outputs": case.branches * _output_bytes(spec, case) if case.windows == 1 else 0,
        "sampler": SAMPLER_TEMPORARIES * latent,
        # What is foretold, beside what is still there of the step before
        "foretold": latent if case.cached_latents else 0,
    }


def _embedder_bytes(spec: TransformerSpec, case: DenoiseCase) -> int:
    """Return the text's two activations at once, or the image's: three of its own width, the sum
    with its places and, at the last norm, its context in fp32 twice."""
    d, e = spec.inner_dim, spec.weights.itemsize
    text = 2 * case.text_tokens * d * e
    own = (3 * max(e, FP32_BYTES) + (e if spec.pos_embed else 0)) * (spec.image_dim or 0)
    image = case.image_tokens * (own + (e + 2 * FP32_BYTES) * d + 2 * FP32_BYTES)
    return max(text, image) + _embedder_rows_bytes(spec)


def _embedder_rows_bytes(spec: TransformerSpec) -> int:
    """Return fp32 copies of norm weights, and the rows of one step's time embedding."""
    wide = max(spec.inner_dim, spec.image_dim or 0)
    return (2 * wide + 4 * spec.inner_dim + 6 * spec.freq_dim) * FP32_BYTES
