"""The fast paths of training give the numbers of the stock model."""

import torch
from diffusers import AutoencoderKLWan

from training.models import CONTEXT, MiniWan, build_tokenizer
from training.settings import VAE_CONFIG
from training.wholeclip import decode_clip, encode_moments


def test_whole_clip_equals_chunked_autoencoder() -> None:
    torch.manual_seed(0)
    vae = AutoencoderKLWan(**VAE_CONFIG).eval()
    clip = torch.rand(1, 3, 9, 32, 48) * 2 - 1
    with torch.no_grad():
        moments = encode_moments(vae, clip)
        assert torch.allclose(moments, vae._encode(clip), atol=1e-5)
        frames = decode_clip(vae, moments[:, :16]).clamp(-1, 1)
        assert torch.allclose(frames, vae.decode(moments[:, :16]).sample, atol=1e-5)


def test_biased_pad_equals_512_tokens() -> None:
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    model = MiniWan(len(tokenizer)).eval()
    prompts = ["a red circle moves to the right, slowly", ""]
    short = tokenizer(prompts, padding="max_length", max_length=26, return_tensors="pt")
    latents, moment = torch.randn(2, 36, 2, 4, 4), torch.tensor([700.0, 300.0])
    with torch.no_grad():
        image = model.encode_image(torch.randn(2, 3, 32, 32))
        full = torch.zeros(2, CONTEXT, model.text.config.d_model)
        for row, ids in enumerate(short.input_ids):
            real = ids[ids != 0][None]
            states = model.text(real, torch.ones_like(real)).last_hidden_state
            full[row, : real.shape[1]] = states[0]
        stock = model.transformer(latents, moment, full, image, return_dict=False)[0]
        states, bias = model.encode_text(short.input_ids)
        model.use_biased_attention().text_bias = bias
        fast = model.transformer(latents, moment, states, image, return_dict=False)[0]
    assert torch.allclose(stock, fast, atol=2e-5)


def test_tokenizer_covers_the_grammar_and_takes_foreign_words() -> None:
    tokenizer = build_tokenizer()
    ids = tokenizer("a red circle moves to the right, slowly").input_ids
    assert ids[-1] == 1
    assert len(ids) == 10
    assert tokenizer("").input_ids == [1]
    foreign = tokenizer("Ein 木 zebra").input_ids
    assert tokenizer.unk_token_id not in foreign
    assert "木" in tokenizer.decode(foreign)
