"""The text side, the image side and the transformer of the small model, and its folder."""

import json
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import UniPCMultistepScheduler, WanImageToVideoPipeline, WanTransformer3DModel
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from torch import Tensor, nn
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    PreTrainedTokenizerFast,
    UMT5Config,
    UMT5EncoderModel,
)

from training.clips import vocabulary
from training.settings import DIT_CONFIG, IMAGE_CONFIG, IMAGE_SIDE, TEXT_CONFIG

CONTEXT = 512
"""Text tokens behind the image tokens in the stock attention."""


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE in which every word of the grammar is one token; other words fall to bytes.

    Ids as T5 has them: pad 0, end of sentence 1, unknown 2.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=640,
        special_tokens=["<pad>", "</s>", "<unk>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(vocabulary(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=CONTEXT,
        padding_side="right",
        add_prefix_space=True,  # said again: transformers 4 takes it out otherwise
    )


def build_image_processor() -> CLIPImageProcessor:
    """Resizes the whole picture to the image encoder's square, without a crop."""
    side = {"height": IMAGE_SIDE, "width": IMAGE_SIDE}
    return CLIPImageProcessor(size=side, crop_size=side, do_center_crop=False)


class BiasedAttention:
    """Wan attention over a few text tokens, with an additive bias on their logits.

    The pipeline pads the text to 512 tokens with zeros, which all become the same key and value.
    One pad token whose logit is raised by the logarithm of their number gives the same softmax.
    """

    def __init__(self) -> None:
        self.text_bias: Tensor | None = None
        """(b, 1, 1, text tokens)."""

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Attend from ``hidden_states`` (b, n, d) to itself, or to image and text tokens."""
        context, image, bias = hidden_states, None, None
        if encoder_hidden_states is not None and self.text_bias is not None:
            bias = self.text_bias
            cut = encoder_hidden_states.shape[1] - bias.shape[-1]
            image, context = encoder_hidden_states[:, :cut], encoder_hidden_states[:, cut:]
        query = attn.norm_q(attn.to_q(hidden_states)).unflatten(2, (attn.heads, -1))
        key = attn.norm_k(attn.to_k(context)).unflatten(2, (attn.heads, -1))
        value = attn.to_v(context).unflatten(2, (attn.heads, -1)).transpose(1, 2)
        if rotary_emb is not None:
            query, key = _rotate(query, *rotary_emb), _rotate(key, *rotary_emb)
        query, key = query.transpose(1, 2), key.transpose(1, 2)
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        if image is not None:
            key = attn.norm_added_k(attn.add_k_proj(image)).unflatten(2, (attn.heads, -1))
            value = attn.add_v_proj(image).unflatten(2, (attn.heads, -1))
            out = out + F.scaled_dot_product_attention(
                query, key.transpose(1, 2), value.transpose(1, 2)
            )
        projected: Tensor = attn.to_out[0](out.transpose(1, 2).flatten(2))
        return projected


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding of ``x`` (b, n, heads, d)."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    c, s = cos[..., 0::2], sin[..., 1::2]
    return torch.stack([even * c - odd * s, even * s + odd * c], dim=-1).flatten(-2).type_as(x)


class MiniWan(nn.Module):
    """Transformer, text encoder and image encoder, trained together."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.transformer = WanTransformer3DModel(**DIT_CONFIG)
        self.text = UMT5EncoderModel(
            UMT5Config(**TEXT_CONFIG, vocab_size=tokens, pad_token_id=0, eos_token_id=1)
        )
        self.image = CLIPVisionModel(CLIPVisionConfig(**IMAGE_CONFIG))

    def use_biased_attention(self) -> BiasedAttention:
        """Put the training-only attention in place of the stock one."""
        processor = BiasedAttention()
        for block in self.transformer.blocks:
            block.attn1.set_processor(processor)
            block.attn2.set_processor(processor)
        return processor

    def encode_text(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings (b, n, d), zero behind the text, and the bias of their logits (b, 1, 1, n).

        ``ids`` (b, n) must hold at least one pad (0) a row.
        """
        mask = ids.ne(0)
        states = self.text(ids, mask.long()).last_hidden_state * mask[..., None]
        length = mask.sum(1, keepdim=True)
        slot = torch.arange(ids.shape[1], device=ids.device)[None]
        bias = torch.zeros(ids.shape, device=ids.device)
        bias = torch.where(slot == length, torch.log(CONTEXT - length.float()), bias)
        bias = bias.masked_fill(slot > length, -math.inf)
        return states, bias[:, None, None]

    def encode_image(self, pixels: Tensor) -> Tensor:
        """Penultimate states (b, 17, d) of pictures (b, 3, side, side)."""
        states: Tensor = self.image(pixel_values=pixels, output_hidden_states=True).hidden_states[
            -2
        ]
        return states


def pixels_for(processor: CLIPImageProcessor, frame: np.ndarray) -> Tensor:
    """The image encoder's input (3, side, side) for a frame (h, w, 3) in [0, 1]."""
    picture = Image.fromarray((frame * 255).round().astype(np.uint8))
    pixels: Tensor = processor(images=picture, return_tensors="pt")["pixel_values"][0]
    return pixels


def build_scheduler(shift: float) -> UniPCMultistepScheduler:
    """UniPC with flow prediction, as the Wan folders have it."""
    return UniPCMultistepScheduler(
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=shift,
        num_train_timesteps=1000,
        solver_order=2,
    )


def save_folder(
    folder: Path, model: MiniWan, vae: nn.Module, defaults: dict[str, float | int | str]
) -> None:
    """Write the diffusers folder: autoencoder in fp32, the rest in fp16."""
    pipeline = WanImageToVideoPipeline(
        tokenizer=build_tokenizer(),
        text_encoder=model.text.half(),
        vae=vae,
        scheduler=build_scheduler(float(defaults["shift"])),
        image_processor=build_image_processor(),
        image_encoder=model.image.half(),
        transformer=model.transformer.half(),
    )
    pipeline.save_pretrained(folder, safe_serialization=True)
    _name_as_released(folder / "image_encoder" / "model.safetensors")
    (folder / "defaults.json").write_text(json.dumps(defaults, indent=2) + "\n")


def _name_as_released(path: Path) -> None:
    """Put "vision_model." before the names of an image encoder, as in Wan's own folders.

    transformers 5 writes them without, and reads both; 4 takes these for none of its own, and
    leaves the encoder as it was drawn.
    """
    weights = load_file(path)
    save_file(
        {f"vision_model.{name}": tensor for name, tensor in weights.items()}, path, {"format": "pt"}
    )
