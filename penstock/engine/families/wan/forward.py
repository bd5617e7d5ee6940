"""The Wan transformer's forward pass in little memory: free functions over diffusers' modules.

`diffusers.WanTransformer3DModel` gives structure and weights; this file gives the order of the
work. In a block the keys and values of all tokens come first. Then each chunk of tokens goes
through self-attention, cross-attention and feed-forward, and is updated in place: nothing else
needs its old value. What does not change from step to step is computed once: the context and its
cross-attention keys and values a prompt, the time embedding a schedule.

Operations and roundings are those of diffusers' forward: with one chunk over all tokens the result
is the same bit for bit. With a ``residual`` of fp32 beside 16-bit weights, the hidden states
between operations, the time embedding and the head are fp32, as in the makers' own forward: what a
block adds is not rounded away, and the error does not grow with the number of blocks. The memory it
takes is stated by `penstock.engine.families.wan.cost.transformer`, which follows this file line by
line: change both together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from penstock.engine.attention.kernels import Attention, attention
from penstock.engine.families.wan.cost.transformer import TEXT_TOKENS, WIDE_ROWS
from penstock.errors import UsageError

NAG_GROWTH, NAG_SHARE = 2.5, 0.25
"""Of normalized attention guidance: tau and alpha, as its authors have them for Wan2.1, beside a
scale of 11."""


@dataclass(frozen=True)
class Context:
    """What a branch is conditioned on: text (1, 512, d), image (1, n, d) or None."""

    text: Tensor
    image: Tensor | None


@dataclass(frozen=True)
class CrossKV:
    """Keys and values of one block's cross-attention, each (1, tokens, heads, head width).

    Attributes:
        k_away, v_away: of the negative prompt, where attention goes away from it.
        away_scale: how far (`away_from`).
    """

    k: Tensor
    v: Tensor
    k_img: Tensor | None = None
    v_img: Tensor | None = None
    k_away: Tensor | None = None
    v_away: Tensor | None = None
    away_scale: float = 1.0

    def contrasted(self, other: CrossKV, scale: float) -> CrossKV:
        """Return these, going away from what ``other`` holds of its text."""
        return replace(self, k_away=other.k, v_away=other.v, away_scale=scale)


class CrossByBlock(Protocol):
    """The `CrossKV` of one branch by block index: a list, or something that fetches them."""

    def __getitem__(self, block: int, /) -> CrossKV: ...


@dataclass(frozen=True, eq=False)
class StepModulation:
    """The time embedding of one step.

    Attributes:
        temb: (1, d), for the head.
        projection: (1, 6, d), for the blocks.
        still: that of the first tokens, where those are at another timestep than the others.
        still_tokens: how many these are.
    """

    temb: Tensor
    projection: Tensor
    still: StepModulation | None = None
    still_tokens: int = 0

    def of(self, part: slice) -> StepModulation:
        """Return that of these tokens, which are all on one side of ``still_tokens``."""
        return self.still if self.still is not None and part.start < self.still_tokens else self


@dataclass(frozen=True)
class Rope:
    """Rotary angles of all tokens: ``cos`` and ``sin``, each (1, n, 1, head width / 2)."""

    cos: Tensor
    sin: Tensor


@torch.no_grad()
def prepare_context(model: Any, text: Tensor, image: Tensor | None) -> Context:
    """Project encoder states to the transformer's width.

    Args:
        model: the transformer, with ``condition_embedder``'s text and image embedders bound.
        text: (1, 512, text_dim), in the compute dtype.
        image: (1, n, image_dim), in the compute dtype, of two pictures one after the other where
            the model has places for them; None for a text-to-video model.

    Raises:
        UsageError: not 512 text tokens, or an image where the model takes none, or none where it
            takes one.
    """
    embedder = model.condition_embedder
    _check_context(embedder, text, image)
    return Context(
        text=embedder.text_embedder(text),
        image=None if image is None else _image_context(embedder.image_embedder, image),
    )


def _image_context(embedder: Any, image: Tensor) -> Tensor:
    """Lay two pictures in two rows, which diffusers' embedder joins itself."""
    if embedder.pos_embed is not None:
        image = torch.unflatten(image, 1, (2, -1))[0]  # (1, 2n, d) -> (2, n, d)
    context: Tensor = embedder(image)
    return context


def _check_context(embedder: Any, text: Tensor, image: Tensor | None) -> None:
    wants_image = embedder.image_embedder is not None
    if text.shape[1] != TEXT_TOKENS:
        raise UsageError(
            "the text must be padded or cut to the context's length",
            expected=f"{TEXT_TOKENS} tokens",
            found=f"{text.shape[1]}",
        )
    if wants_image != (image is not None):
        raise UsageError(
            "the image conditioning does not match the model",
            expected="image states" if wants_image else "no image states",
            found="none" if wants_image else "image states",
            remedy="Use an image-to-video model exactly when there is an image",
        )


@torch.no_grad()
def cross_kv(attn2: Any, context: Context, same_image: CrossKV | None = None) -> CrossKV:
    """Return the keys and values of one block's cross-attention: the same for all steps.

    Args:
        attn2: the block's cross-attention, with the weights of
            `penstock.engine.families.wan.structure.CROSS_KV_NAMES` bound.
        context: of the branch.
        same_image: this block's result for another branch with the same image, whose image keys and
            values are then shared instead of computed again.
    """
    heads = (attn2.heads, -1)
    k = attn2.norm_k(attn2.to_k(context.text)).unflatten(2, heads)
    v = attn2.to_v(context.text).unflatten(2, heads)
    if context.image is None:
        return CrossKV(k, v)
    if same_image is not None:
        return CrossKV(k, v, same_image.k_img, same_image.v_img)
    k_img = attn2.norm_added_k(attn2.add_k_proj(context.image)).unflatten(2, heads)
    v_img = attn2.add_v_proj(context.image).unflatten(2, heads)
    return CrossKV(k, v, k_img, v_img)


@torch.no_grad()
def step_modulation(
    model: Any, timesteps: Tensor, dtype: torch.dtype, residual: torch.dtype | None = None
) -> list[StepModulation]:
    """Return the time embedding of all steps, one by one: a batch would round differently.

    Args:
        model: the transformer, with ``condition_embedder``'s time embedder and projection bound.
        timesteps: (steps,), in the scheduler's dtype, on the model's device.
        dtype: the compute dtype.
        residual: of the hidden states; None: the compute dtype.
    """
    embedder = model.condition_embedder
    if residual not in (None, dtype):
        return _wide_modulation(embedder, timesteps, dtype)
    weight_dtype = embedder.time_embedder.linear_1.weight.dtype
    steps = []
    for timestep in timesteps[:, None]:  # each (1,)
        angles = embedder.timesteps_proj(timestep).to(weight_dtype)  # (1,) -> (1, freq_dim)
        temb = embedder.time_embedder(angles).to(dtype)
        projection = embedder.time_proj(embedder.act_fn(temb)).unflatten(1, (6, -1))
        steps.append(StepModulation(temb, projection))
    return steps


def _wide_modulation(embedder: Any, timesteps: Tensor, dtype: torch.dtype) -> list[StepModulation]:
    """Return `step_modulation` in fp32, whatever its weights are in."""
    two = embedder.time_embedder
    angles = [embedder.timesteps_proj(timestep).float() for timestep in timesteps[:, None]]
    inner = [embedder.act_fn(x) for x in _wide(two.linear_1, angles, dtype)]
    tembs = _wide(two.linear_2, inner, dtype)
    projections = _wide(embedder.time_proj, [embedder.act_fn(temb) for temb in tembs], dtype)
    pairs = zip(tembs, projections, strict=True)
    return [StepModulation(temb, torch.unflatten(rows, 1, (6, -1))) for temb, rows in pairs]


def _wide(layer: Any, inputs: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Return a linear layer of each of the fp32 ``inputs`` (1, width), in fp32. Its weight is cast
    by some rows at a time, for all inputs; one that bears a LoRA computes in ``dtype``."""
    if not isinstance(layer, nn.Linear):
        return [layer(x.to(dtype)).float() for x in inputs]
    results = [x.new_empty(1, layer.out_features) for x in inputs]
    for part in _chunks(layer.out_features, WIDE_ROWS):
        weight, bias = layer.weight[part].float(), layer.bias[part].float()
        for x, result in zip(inputs, results, strict=True):
            result[:, part] = F.linear(x, weight, bias)
        del weight, bias  # before the next rows are cast
    return results


@torch.no_grad()
def rope_tables(model: Any, latent: Sequence[int], device: torch.device) -> Rope:
    """Return the rotary angles of a latent grid.

    diffusers keeps each angle twice, for the two elements it turns; one is enough here.

    Args:
        model: the transformer; ``rope`` holds the angles of each position along each axis.
        latent: latent frames, height and width.
        device: where the tables shall be.
    """
    grid = tuple(size // patch for size, patch in zip(latent, model.config.patch_size, strict=True))
    widths = [model.rope.t_dim // 2, model.rope.h_dim // 2, model.rope.w_dim // 2]

    def spread(freqs: Tensor) -> Tensor:
        axes = torch.split(freqs[:, ::2].to(device), widths, dim=1)
        shaped = []
        for axis, table in enumerate(axes):
            ones = [1, 1, 1]
            ones[axis] = grid[axis]
            shaped.append(table[: grid[axis]].view(*ones, -1).expand(*grid, -1))
        return torch.cat(shaped, dim=-1).flatten(0, 2)[
            None, :, None
        ]  # (f, h, w, r) -> (1, n, 1, r)

    return Rope(spread(model.rope.freqs_cos), spread(model.rope.freqs_sin))


@torch.no_grad()
def embed(model: Any, latents: Tensor, residual: torch.dtype | None = None) -> Tensor:
    """Return the patches of the model input: (1, in_channels, t, h, w) -> (1, n, d), contiguous, in
    ``residual`` (None: as the latents are)."""
    patches: Tensor = model.patch_embedding(latents)  # (1, d, f, h, w)
    tokens = patches.flatten(2).transpose(1, 2)
    if residual in (None, tokens.dtype):
        return tokens.contiguous()
    return torch.empty(tokens.shape, dtype=residual, device=tokens.device).copy_(tokens)


class SelfKV:
    """Room for one block's self-attention keys and values, reused by all blocks and branches.

    Args:
        hidden: (1, n, d).
        heads: of the model.
        dtype: the compute dtype; None: that of ``hidden``.
    """

    def __init__(self, hidden: Tensor, heads: int, dtype: torch.dtype | None = None) -> None:
        room = torch.empty_like(hidden, dtype=dtype)
        self.k = torch.unflatten(room, 2, (heads, -1))  # (1, n, heads, width)
        self.v = torch.empty_like(self.k)

    @property
    def dtype(self) -> torch.dtype:
        """The compute dtype."""
        return self.k.dtype


@torch.no_grad()
def block_forward(
    block: Any,
    hidden: Tensor,
    modulation: StepModulation,
    cross: CrossKV,
    rope: Rope,
    kv: SelfKV,
    chunk_tokens: int,
    attend: Attention = attention,
) -> None:
    """Run one transformer block, in place on ``hidden``.

    Args:
        block: a `WanTransformerBlock`, its weights bound; those of
            `penstock.engine.families.wan.structure.CROSS_KV_NAMES` need not be.
        hidden: (1, n, d), in the compute dtype or in fp32.
        modulation: of the step.
        cross: of this block and branch.
        rope: of the latent grid.
        kv: room to work in, in the compute dtype; its content is lost.
        chunk_tokens: tokens that go through the block together.
        attend: of the self-attention.
    """
    every = {each: _rows(block, each) for each in (modulation, modulation.still) if each}
    parts = list(_chunks(hidden.shape[1], chunk_tokens, modulation.still_tokens))
    # Two passes over the chunks: every query attends to the keys of all tokens, which must be those
    # of the hidden states before any chunk is changed in place.
    for part in parts:
        shift, scale, *_ = every[modulation.of(part)]
        _write_kv(block, hidden[:, part], scale, shift, rope, kv, part)
    for part in parts:
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = every[modulation.of(part)]
        chunk = hidden[:, part]
        chunk.add_(
            _gated(_self_attention(block, chunk, scale, shift, rope, kv, part, attend), gate)
        )
        # No gate here, as in the makers' block: cross-attention is added as it is.
        chunk.add_(_cross_attention(block, chunk, cross, kv.dtype))
        chunk.add_(_gated(_feed_forward(block, chunk, ffn_scale, ffn_shift, kv.dtype), ffn_gate))


def _rows(block: Any, modulation: StepModulation) -> tuple[Tensor, ...]:
    """Return the shift, scale and gate of the attention, then of the feed-forward, (1, 1, d) each;
    what is multiplied by is one and the scale."""
    table = block.scale_shift_table + modulation.projection.float()
    shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = table.chunk(6, dim=1)
    return shift, 1 + scale, gate, ffn_shift, 1 + ffn_scale, ffn_gate


def _chunks(tokens: int, chunk_tokens: int, cut: int = 0) -> Iterator[slice]:
    """Yield runs of at most ``chunk_tokens``, none of which lies on both sides of ``cut``."""
    for first, last in ((0, cut), (cut, tokens)):
        for start in range(first, last, chunk_tokens):
            yield slice(start, min(start + chunk_tokens, last))


def _modulated(
    norm: Any, chunk: Tensor, scale: Tensor, shift: Tensor, dtype: torch.dtype
) -> Tensor:
    """Apply layer norm, scale and shift in fp32: (1, c, d) -> (1, c, d) in ``dtype``."""
    normed: Tensor = norm(chunk.float())
    return normed.mul_(scale).add_(shift).to(dtype)


def _gated(update: Tensor, gate: Tensor) -> Tensor:
    """Return ``update * gate`` in fp32; ``update`` is used up."""
    return update.mul_(gate) if update.dtype == gate.dtype else update * gate


def _write_kv(
    block: Any, chunk: Tensor, scale: Tensor, shift: Tensor, rope: Rope, kv: SelfKV, part: slice
) -> None:
    attn = block.attn1
    x = _modulated(block.norm1, chunk, scale, shift, kv.dtype)
    kv.v[:, part] = attn.to_v(x).unflatten(2, (attn.heads, -1))
    # x (1, c, d) goes before the norm makes its fp32 copies, beside which it would be the peak.
    k = attn.to_k(x)
    del x
    k = attn.norm_k(k)
    _rotate(k.unflatten(2, (attn.heads, -1)), rope, part, out=kv.k[:, part])


def _self_attention(
    block: Any,
    chunk: Tensor,
    scale: Tensor,
    shift: Tensor,
    rope: Rope,
    kv: SelfKV,
    part: slice,
    attend: Attention,
) -> Tensor:
    attn = block.attn1
    q = attn.to_q(_modulated(block.norm1, chunk, scale, shift, kv.dtype))
    q = attn.norm_q(q).unflatten(2, (attn.heads, -1))
    q = _rotate(q, rope, part, out=torch.empty_like(q))
    q = attend(q, kv.k, kv.v)
    update: Tensor = attn.to_out[0](q)
    return update


def _rotate(x: Tensor, rope: Rope, part: slice, out: Tensor) -> Tensor:
    """Turn neighbouring pairs of (1, c, heads, head width) by the angles of their tokens."""
    cos, sin = rope.cos[:, part], rope.sin[:, part]
    x1, x2 = torch.unflatten(x, -1, (-1, 2)).unbind(-1)
    # Pairs (2i, 2i + 1) turn together; halves of a head would be another model's rotation.
    out[..., 0::2] = (x1 * cos).sub_(x2 * sin)
    out[..., 1::2] = (x1 * sin).add_(x2 * cos)
    return out


def _cross_attention(block: Any, chunk: Tensor, cross: CrossKV, dtype: torch.dtype) -> Tensor:
    attn = block.attn2
    q = attn.to_q(block.norm2(chunk.float()).to(dtype))
    q = attn.norm_q(q).unflatten(2, (attn.heads, -1))
    out = attention(q, cross.k, cross.v)
    if cross.k_away is not None and cross.v_away is not None:
        out = away_from(out, attention(q, cross.k_away, cross.v_away), cross.away_scale)
    if cross.k_img is not None and cross.v_img is not None:
        out.add_(attention(q, cross.k_img, cross.v_img))
    del q
    update: Tensor = attn.to_out[0](out)
    return update


def away_from(towards: Tensor, away: Tensor, scale: float) -> Tensor:
    """Compute normalized attention guidance: attention to the prompt, led away from the negative
    prompt's.

    What lies ``scale`` times as far from ``away`` as ``towards`` is, but at most `NAG_GROWTH` times
    as large as ``towards`` by the sum of magnitudes of each token; `NAG_SHARE` of that, and the
    rest of ``towards``. Source: "Normalized Attention Guidance", arXiv:2505.21179.

    Args:
        towards, away: (1, c, d), both used up.
    """
    size = _magnitude(towards)
    # away + scale * (towards - away), in the memory of ``away``.
    led = away.mul_(1 - scale).add_(towards, alpha=scale)
    growth = _magnitude(led).div_(size.clamp_(min=torch.finfo(size.dtype).tiny))
    led.mul_(growth.reciprocal_().mul_(NAG_GROWTH).clamp_(max=1.0).mul_(NAG_SHARE))
    return led.add_(towards, alpha=1 - NAG_SHARE)


def _magnitude(states: Tensor) -> Tensor:
    """Return the sum of magnitudes of each token, fp32: (1, c, d) -> (1, c, 1)."""
    total: Tensor = torch.linalg.vector_norm(states, 1, dim=-1, keepdim=True, dtype=torch.float32)
    return total


def _feed_forward(
    block: Any, chunk: Tensor, scale: Tensor, shift: Tensor, dtype: torch.dtype
) -> Tensor:
    gelu, _, down = block.ffn.net
    x = gelu.proj(_modulated(block.norm3, chunk, scale, shift, dtype))
    # In place: x (1, c, ffn) is the widest tensor of a block, and a copy of it the peak.
    torch.ops.aten.gelu_(x, approximate=gelu.approximate)
    update: Tensor = down(x)
    return update


@torch.no_grad()
def head(
    model: Any,
    hidden: Tensor,
    temb: Tensor | StepModulation,
    latent: Sequence[int],
    chunk_tokens: int,
) -> Tensor:
    """Apply the final norm and projection, back to latents.

    Args:
        model: the transformer, with ``proj_out`` and its ``scale_shift_table`` bound.
        hidden: (1, n, d).
        temb: (1, d), of the step; or the whole modulation, where tokens differ in it.
        latent: latent frames, height and width.
        chunk_tokens: tokens that are projected together.

    Returns:
        (1, out_channels, t, h, w), in the dtype of ``hidden``.
    """
    step = temb if isinstance(temb, StepModulation) else StepModulation(temb, temb)
    tokens = hidden.shape[1]
    project, dtype = _projection(model.proj_out, hidden.dtype)
    patches = hidden.new_empty(1, tokens, model.proj_out.out_features)
    for part in _chunks(tokens, chunk_tokens, step.still_tokens):
        row = step.of(part).temb
        shift, scale = (model.scale_shift_table + row.unsqueeze(1)).chunk(2, dim=1)
        scale = 1 + scale
        patches[:, part] = project(_modulated(model.norm_out, hidden[:, part], scale, shift, dtype))
    return _unpatchify(patches, latent, model.config.patch_size)


def _projection(layer: Any, dtype: torch.dtype) -> tuple[Callable[[Tensor], Tensor], torch.dtype]:
    """Return how ``layer`` is applied, and to what: in ``dtype``, its weights cast; or, where it
    bears a LoRA, as it is."""
    if not isinstance(layer, nn.Linear):
        return layer, layer.bias.dtype
    if layer.weight.dtype == dtype:
        return layer, dtype
    weight, bias = layer.weight.to(dtype), layer.bias.to(dtype)
    return lambda x: F.linear(x, weight, bias), dtype


def _unpatchify(patches: Tensor, latent: Sequence[int], patch: Sequence[int]) -> Tensor:
    f, h, w = (size // p for size, p in zip(latent, patch, strict=True))
    x = patches.view(1, f, h, w, *patch, -1)  # (1, n, pt*ph*pw*c) -> (1, f, h, w, pt, ph, pw, c)
    return x.permute(0, 7, 1, 4, 2, 5, 3, 6).reshape(1, -1, *latent)


def denoise_forward(
    model: Any,
    blocks: Iterable[tuple[int, Any]],
    latents: Tensor,
    branches: Sequence[CrossByBlock],
    modulation: StepModulation,
    rope: Rope,
    chunk_tokens: int,
    attend: Attention = attention,
    residual: torch.dtype | None = None,
) -> list[Tensor]:
    """Run the whole transformer, all branches in one visit of each block.

    The branches go through a block one after another, never as a batch: each result is that of a
    pass of its own.

    Args:
        model: the transformer; ``patch_embedding``, ``proj_out``, ``scale_shift_table`` bound.
        blocks: index and module of each block in order, its weights bound while it is the current.
        latents: (1, in_channels, t, h, w), the model input, the same for all branches.
        branches: for each branch (conditional, unconditional) its `CrossKV` by block index, looked
            up when the block needs it and let go after it.
        modulation: of the step.
        rope: of the latent grid.
        chunk_tokens: tokens that go through a block together.
        attend: of the self-attention; what is attended to across (few keys) is torch's own.
        residual: of the hidden states; None: the compute dtype.

    Returns:
        For each branch (1, out_channels, t, h, w), in the dtype of the hidden states.
    """
    hidden = embed_branches(model, latents, len(branches), residual)
    grid = latents.shape[2:]
    return list(
        through_blocks(
            model, blocks, hidden, grid, branches, modulation, rope, chunk_tokens, attend,
            latents.dtype,
        )
    )  # fmt: skip


def through_blocks(
    model: Any,
    blocks: Iterable[tuple[int, Any]],
    hidden: list[Tensor],
    latent: Sequence[int],
    branches: Sequence[CrossByBlock],
    modulation: StepModulation,
    rope: Rope,
    chunk_tokens: int,
    attend: Attention,
    dtype: torch.dtype,
) -> Iterator[Tensor]:
    """Yield the predictions of hidden states that share a visit of each block, one after another as
    they are asked for: each takes the place of its hidden states.

    Args:
        hidden: (1, n, d) each, of any windows and branches; used up.
        latent: latent frames, height and width of each of them.
        branches: what each of them attends to; looked up once a block where it is one object.
        dtype: the compute dtype.
        model, blocks, modulation, rope, chunk_tokens, attend: as for `denoise_forward`.
    """
    kv = SelfKV(hidden[0], model.config.num_attention_heads, dtype)
    _run_blocks(blocks, hidden, branches, modulation, rope, kv, chunk_tokens, attend)
    del kv
    while hidden:
        yield head(model, hidden.pop(0), modulation, latent, chunk_tokens)


def embed_branches(
    model: Any, latents: Tensor, branches: int, residual: torch.dtype | None
) -> list[Tensor]:
    """Return the hidden states of one model input for each of its branches."""
    first = embed(model, latents, residual)
    return [first, *(first.clone() for _ in range(branches - 1))]


def _run_blocks(
    blocks: Iterable[tuple[int, Any]],
    hidden: Sequence[Tensor],
    branches: Sequence[CrossByBlock],
    modulation: StepModulation,
    rope: Rope,
    kv: SelfKV,
    chunk_tokens: int,
    attend: Attention,
) -> None:
    alike = _alike(hidden, branches)
    for index, block in blocks:
        for cross, states in alike:
            found = cross[index]
            for state in states:
                block_forward(block, state, modulation, found, rope, kv, chunk_tokens, attend)
            del found  # before the next is fetched


def _alike(
    hidden: Sequence[Tensor], branches: Sequence[CrossByBlock]
) -> list[tuple[CrossByBlock, list[Tensor]]]:
    """Return the hidden states of each branch, which attend to the same."""
    found: dict[int, tuple[CrossByBlock, list[Tensor]]] = {}
    for state, branch in zip(hidden, branches, strict=True):
        found.setdefault(id(branch), (branch, []))[1].append(state)
    return list(found.values())
