"""Peak bytes of the text and the image encoder, on fake tensors (or on small real ones)."""

from contextlib import contextmanager

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import CLIPVisionConfig, UMT5Config
from transformers.models.clip.modeling_clip import CLIPEncoderLayer, CLIPVisionEmbeddings
from transformers.models.umt5.modeling_umt5 import UMT5Block, UMT5LayerNorm

from penstock.engine.families.wan import clip as image
from penstock.engine.families.wan import umt5 as text
from tests.meter import StorageMeter

TYPES = {2: torch.bfloat16, 4: torch.float32}


@contextmanager
def default_type(itemsize):
    before = torch.get_default_dtype()
    torch.set_default_dtype(TYPES[itemsize])
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def text_modules(spec, layers):
    config = UMT5Config(
        d_model=spec.d_model, d_kv=spec.d_kv, d_ff=spec.d_ff, num_heads=spec.num_heads
    )
    blocks = [UMT5Block(config, layer_idx=index) for index in range(layers)]
    return blocks, UMT5LayerNorm(spec.d_model)


def weights(*modules):
    return [weight for module in modules for weight in module.parameters()]


def run_text(spec, blocks, norm, rows, tokens, prompts, length):
    ids = [tuple(range(k * tokens, (k + 1) * tokens)) for k in range(prompts)]
    tokenised = [text.TokenisedPrompt(each, length, "") for each in ids]
    dtype = norm.weight.dtype
    hidden = text.embed(tokenised, lambda distinct: rows[torch.tensor(distinct)], dtype=dtype)
    text.encode_layers(enumerate(blocks), hidden, [length] * prompts)
    return [text.finish(norm, states, length) for states in hidden]


def measured_text_bytes(spec, itemsize, tokens, prompts, length, tensors=FakeTensorMode):
    with tensors(), default_type(itemsize), torch.inference_mode():
        blocks, norm = text_modules(spec, 2)
        rows = torch.empty(tokens * prompts, spec.d_model, dtype=torch.float32)
        with StorageMeter([*weights(*blocks, norm), rows]) as meter:
            run_text(spec, blocks, norm, rows, tokens, prompts, length)
    return meter.peak


def image_modules(spec, layers):
    config = CLIPVisionConfig(
        hidden_size=spec.hidden_size, intermediate_size=spec.intermediate_size,
        num_attention_heads=spec.num_attention_heads, image_size=spec.image_size,
        patch_size=spec.patch_size, hidden_act="gelu",
    )  # fmt: skip
    encoder_layers = [CLIPEncoderLayer(config) for _ in range(layers)]
    return CLIPVisionEmbeddings(config), torch.nn.LayerNorm(spec.hidden_size), encoder_layers


def run_image(spec, embeddings, norm, layers):
    pixels = torch.empty(1, 3, spec.image_size, spec.image_size, dtype=torch.float32)
    hidden = image.embed_pixels(embeddings, norm, pixels)
    return image.encode_layers(enumerate(layers), hidden)


def measured_image_bytes(spec, itemsize, tensors=FakeTensorMode):
    with tensors(), default_type(itemsize), torch.inference_mode():
        embeddings, norm, layers = image_modules(spec, 2)
        with StorageMeter(weights(embeddings, norm, *layers)) as meter:
            run_image(spec, embeddings, norm, layers)
    return meter.peak
