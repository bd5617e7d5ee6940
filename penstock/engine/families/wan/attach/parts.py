"""The parts of a Wan pipeline as diffusers calls them, run by penstock under a budget.

Each stands in the place of a model of diffusers or transformers: it has no weights, answers what a
pipeline asks of the model (config, dtype, device), and computes what its forward would.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from penstock.engine.attach.endless import EndlessStream
from penstock.engine.attach.part import Part, desk_visits, refuse_arguments
from penstock.engine.families.wan import clip as pictures
from penstock.engine.families.wan import forward as dit
from penstock.engine.families.wan import umt5 as prompts
from penstock.engine.families.wan.cost.transformer import TEXT_TOKENS
from penstock.engine.families.wan.model import model_of
from penstock.engine.files.tokenizer import TOKENS, TokenisedPrompt
from penstock.engine.model.component import Component
from penstock.errors import UsageError
from penstock.profiles.manifest import VideoShape


class TextPart(Part):
    """`transformers.UMT5EncoderModel`: every call is one pass over its blocks."""

    @property
    def component(self) -> Component:
        """Its files."""
        return model_of(self.desk).text

    @torch.no_grad()
    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **more: Any) -> Any:
        """Map token ids (b, n) and their mask (b, n) to hidden states (b, n, d).

        Raises:
            UsageError: more than 512 tokens, a mask that is not ones and then zeros, or an
                argument that has no meaning here.
        """
        from transformers.modeling_outputs import BaseModelOutput

        more.pop("return_dict", None)
        refuse_arguments(self, more, "Detach the pipeline for this.")
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        lengths = [int(length) for length in mask.sum(1)]
        self._check(input_ids, mask, lengths)
        tokenised = [
            TokenisedPrompt(tuple(ids.tolist()), length, "")
            for ids, length in zip(input_ids, lengths, strict=True)
        ]
        states = [self._encode(each) for each in tokenised]
        return BaseModelOutput(last_hidden_state=torch.cat(states).to(input_ids.device))

    def _check(self, ids: Tensor, mask: Tensor, lengths: list[int]) -> None:
        first = torch.arange(ids.shape[1], device=mask.device)[None] < mask.sum(1, keepdim=True)
        if ids.shape[1] > TOKENS or not torch.equal(mask.bool(), first) or 0 in lengths:
            raise UsageError(
                "the text encoder of an attached pipeline takes padded prompts",
                expected=f"up to {TOKENS} tokens, padded at their end",
                found=f"{ids.shape[1]} tokens, {lengths} of them not padding",
            )

    def _encode(self, prompt: TokenisedPrompt) -> Tensor:
        component, desk, phase = self.component, self.desk, self.desk.plan()["text"]
        with desk.phase(phase):
            hidden = prompts.embed(
                [prompt],
                lambda rows: component.read_rows("shared.weight", rows),
                dtype=component.dtype,
                device=desk.device,
            )
            with desk.stream(component.blocks, phase.stream) as stream:
                blocks = desk_visits(desk, stream, component)
                hidden = prompts.encode_layers(blocks, hidden, [prompt.length])
            with desk.rest(component) as module:
                states: Tensor = module.encoder.final_layer_norm(hidden[0])
                return states.to(self.device)


class _Penultimate:
    """Hidden states of which Wan uses, and penstock computes, the last but one."""

    def __init__(self, states: Tensor, count: int) -> None:
        self._states, self._count = states, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Tensor:
        if index not in (-2, self._count - 2):
            raise UsageError(
                "the image encoder of an attached pipeline gives hidden_states[-2] alone",
                expected="-2",
                found=str(index),
                remedy="Detach the pipeline for the others.",
            )
        return self._states


class ImagePart(Part):
    """`transformers.CLIPVisionModel`, as far as Wan is conditioned on it."""

    @property
    def component(self) -> Component:
        """Its files."""
        component = model_of(self.desk).image
        assert component is not None
        return component

    @torch.no_grad()
    def forward(self, pixel_values: Tensor, output_hidden_states: bool = False, **more: Any) -> Any:
        """Map pixels (b, 3, s, s) to ``hidden_states``, whose entry -2 is (b, n, d)."""
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        more.pop("return_dict", None)
        refuse_arguments(self, more, "Detach the pipeline for this.")
        states = torch.cat([self._encode(pixels[None]) for pixels in pixel_values])
        kept: Any = _Penultimate(states.to(pixel_values.device), len(self.component.blocks) + 2)
        return BaseModelOutputWithPooling(hidden_states=kept)

    def _encode(self, pixels: Tensor) -> Tensor:
        component, desk = self.component, self.desk
        phase = desk.plan()["image"]
        with desk.phase(phase):
            with desk.rest(component) as module:
                hidden = pictures.embed_pixels(
                    module.embeddings, module.pre_layrnorm, pixels.to(desk.device)
                )
            with desk.stream(component.blocks, phase.stream) as stream:
                blocks = desk_visits(desk, stream, component)
                return pictures.encode_layers(blocks, hidden).to(self.device)


@dataclass(frozen=True)
class _Sample:
    """One entry of a batch on its way through the blocks."""

    hidden: Tensor
    modulation: dit.StepModulation
    context: dit.Context


class TransformerPart(Part):
    """`diffusers.WanTransformer3DModel`: every call is one pass over its blocks.

    The entries of a batch go through a block one after the other, each with the result of a call
    of its own. What streams stays open from call to call, until another part is called or the
    pipeline's call ends.
    """

    @property
    def component(self) -> Component:
        """Its files."""
        return model_of(self.desk).transformer

    def cache_context(self, name: str, **_: Any) -> AbstractContextManager[None]:
        """Nothing is cached from step to step."""
        return nullcontext()

    @torch.no_grad()
    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_image: Tensor | None = None,
        return_dict: bool = True,
        attention_kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Map latents (b, c, t, h, w), timesteps (b,), text (b, n, d) and image states (b,
        m, e) to the prediction (b, c', t, h, w).

        Raises:
            OverBudget: no plan fits for latents of that size.
            UsageError: an argument that is not supported.
        """
        from diffusers.models.modeling_outputs import Transformer2DModelOutput

        refuse_arguments(
            self, {"attention_kwargs": attention_kwargs}, "Fuse LoRAs before attaching."
        )
        count = len(hidden_states)
        images = _for_each(encoder_hidden_states_image, count)
        if timestep.ndim != 1:
            raise UsageError(
                "a timestep for each token is Wan 2.2's", expected="one a sample",
                found=f"a timestep of shape {list(timestep.shape)}",
            )  # fmt: skip
        shape = self._shape(hidden_states)
        phase = self.desk.plan(shape)["denoise"]
        model, stream = self.desk.hold(("denoise", shape), lambda stack: self._open(stack, shape))
        rope = dit.rope_tables(model, hidden_states.shape[2:], self.desk.device)
        made = []
        for at in range(count):
            text = encoder_hidden_states[at]
            sample = self._sample(model, hidden_states[at], timestep[at], text, images[at])
            kv = dit.SelfKV(sample.hidden, model.config.num_attention_heads)
            for _, block in desk_visits(self.desk, stream, self.component):
                cross = dit.cross_kv(block.attn2, sample.context)
                dit.block_forward(
                    block, sample.hidden, sample.modulation, cross, rope, kv, phase.chunk_tokens
                )
            del kv
            out = dit.head(
                model, sample.hidden, sample.modulation.temb, hidden_states.shape[2:],
                phase.chunk_tokens,
            )  # fmt: skip
            made.append(out.to(hidden_states.device))
        output = torch.cat(made)
        return Transformer2DModelOutput(sample=output) if return_dict else (output,)

    def _shape(self, latents: Tensor) -> VideoShape:
        spec = model_of(self.desk).manifest.vae
        frames, height, width = latents.shape[2:]
        factor = spec.spatial_factor
        return VideoShape(width * factor, height * factor, (frames - 1) * spec.temporal_factor + 1)

    def _open(self, stack: ExitStack, shape: VideoShape) -> tuple[Any, EndlessStream]:
        phase, desk = self.desk.plan(shape)["denoise"], self.desk
        stack.enter_context(
            desk.device_ledger.reserve("denoise: activations", desk.denoise_bytes(shape))
        )
        stack.enter_context(desk.host_ledger.reserve("denoise: host work", phase.ram_work_bytes))
        stack.enter_context(desk.scratch(phase))
        model = stack.enter_context(desk.rest(self.component))
        return model, stack.enter_context(desk.stream(desk.whole_blocks, phase.stream))

    def _sample(
        self, model: Any, latents: Tensor, timestep: Tensor, text: Tensor, image: Tensor | None
    ) -> _Sample:
        device, dtype = self.desk.device, self.dtype
        return _Sample(
            dit.embed(model, latents[None].to(device, dtype)),
            dit.step_modulation(model, timestep[None].to(device), dtype)[0],
            _context(
                model,
                text[None].to(device, dtype),
                None if image is None else image[None].to(device, dtype),
            ),
        )


def _for_each(image: Tensor | None, count: int) -> list[Tensor | None]:
    """Return the image states of each sample; one picture serves all."""
    if image is None:
        return [None] * count
    if len(image) not in (1, count):
        raise UsageError(
            "image states and latents differ in number",
            expected=f"1 or {count}",
            found=str(len(image)),
        )
    return list(image.expand(count, -1, -1))


def _context(model: Any, text: Tensor, image: Tensor | None) -> dit.Context:
    """Return encoder states at the transformer's width, divided as diffusers' attention divides
    them: the last 512 rows are text, whatever they are; without an image all rows are."""
    embedder = model.condition_embedder
    if (embedder.image_embedder is None) != (image is None):
        raise UsageError(
            "the image conditioning does not match the model",
            expected="no image states" if image is not None else "image states",
        )
    states = embedder.text_embedder(text)
    if image is None:
        return dit.Context(states, None)
    joined = torch.cat([embedder.image_embedder(image), states], dim=1)
    cut = joined.shape[1] - TEXT_TOKENS
    if cut <= 0:
        raise UsageError(
            "too few text tokens for a model that is conditioned on a picture",
            expected=f"max_sequence_length={TEXT_TOKENS}",
            found=f"{text.shape[1]} text and {image.shape[1]} image tokens",
        )
    return dit.Context(joined[:, cut:], joined[:, :cut])
