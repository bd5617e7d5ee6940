import functools
import html

import pytest
import torch
from diffusers import WanPipeline
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers.processors import TemplateProcessing
from transformers import UMT5Config, UMT5EncoderModel

from penstock.engine.families.wan.tiny import write_tiny_model
from penstock.engine.families.wan.umt5 import clean_prompt, embed, encode_layers, finish
from penstock.engine.files.tokenizer import TOKENS, Tokenizer
from penstock.errors import CheckpointError, RequestError
from tests.versions import TRANSFORMERS_4, needs_sdpa_in_umt5

PROMPTS = ("a cat &amp; a dog run", "blurry, low quality")


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("t2v"), image_to_video=False)


@pytest.fixture(scope="module")
def pipeline(model_folder):
    return WanPipeline.from_pretrained(model_folder)


@pytest.fixture(scope="module")
def tokenizer(model_folder):
    return Tokenizer(model_folder / "tokenizer")


def tokenise(tokenizer, text, max_tokens=TOKENS):
    (prompt,) = tokenizer.tokenise([clean_prompt(text)], max_tokens)
    return prompt


def run(encoder, prompts, dtype=torch.float32):
    """Our path over a bound encoder: what the engine will do with streamed blocks."""
    with torch.no_grad():
        table = encoder.shared.weight
        hidden = embed(prompts, lambda rows: table[rows], dtype=dtype)
        lengths = [prompt.length for prompt in prompts]
        encode_layers(enumerate(encoder.encoder.block), hidden, lengths)
        norm = encoder.encoder.final_layer_norm
        return [finish(norm, states, n) for states, n in zip(hidden, lengths, strict=True)]


def perturb(encoder):
    """Norm weights and biases of a fresh model are all alike: make each one count."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, weight in encoder.named_parameters():
            scale = 1.0 if "relative_attention_bias" in name else 0.2
            weight.add_(scale * torch.randn_like(weight))
    return encoder.eval()


@pytest.mark.parametrize("texts", [PROMPTS, ("x" * 700, ""), ("ab " * 255, "one")])
def test_embeddings_equal_the_pipelines_bit_for_bit(pipeline, tokenizer, texts):
    needs_sdpa_in_umt5()
    perturb(pipeline.text_encoder)
    prompts = [tokenise(tokenizer, text) for text in texts]
    ours = run(pipeline.text_encoder, prompts)
    for text, states in zip(texts, ours, strict=True):
        with torch.no_grad():
            theirs = pipeline._get_t5_prompt_embeds(text, max_sequence_length=TOKENS, device="cpu")
        assert states.shape == (1, TOKENS, 48)
        assert torch.equal(states, theirs)
        assert states.abs().max() > 0.1


@functools.cache
def encoder_of(dtype):
    torch.manual_seed(3)
    config = UMT5Config(vocab_size=64, d_model=40, d_kv=8, d_ff=72, num_layers=2, num_heads=6)
    return perturb(UMT5EncoderModel(config)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("length", [1, 7, 40])
def test_hidden_states_equal_transformers_in_each_type(dtype, length):
    encoder = encoder_of(dtype)
    ids = torch.randint(2, 64, (1, 40), generator=torch.Generator().manual_seed(5))
    mask = (torch.arange(40) < length).long()[None]
    with torch.no_grad():
        theirs = encoder(ids, mask).last_hidden_state
        hidden = [encoder.shared.weight[ids[0]][None]]
        encode_layers(enumerate(encoder.encoder.block), hidden, [length])
        ours = finish(encoder.encoder.final_layer_norm, hidden[0], length)
    assert ours.dtype == theirs.dtype
    if TRANSFORMERS_4:  # it forms the scores by itself: up to 0.1 apart in bf16, 1e-5 in fp32
        bound = 1e-4 if dtype == torch.float32 else 0.2
        torch.testing.assert_close(ours[:, :length], theirs[:, :length], rtol=0, atol=bound)
    else:
        assert torch.equal(ours[:, :length], theirs[:, :length])
    assert not ours[:, length:].any()


def test_fp32_output_projections_among_fp16_weights():
    needs_sdpa_in_umt5()
    torch.manual_seed(4)
    config = UMT5Config(vocab_size=64, d_model=40, d_kv=8, d_ff=72, num_layers=2, num_heads=6)
    encoder = perturb(UMT5EncoderModel(config)).half()
    for block in encoder.encoder.block:
        block.layer[-1].DenseReluDense.wo.float()
    ids = torch.arange(2, 22)[None]
    with torch.no_grad():
        theirs = encoder(ids, torch.ones_like(ids)).last_hidden_state
        hidden = encode_layers(enumerate(encoder.encoder.block), [encoder.shared.weight[ids]], [20])
    assert hidden[0].dtype == torch.float32
    assert torch.equal(finish(encoder.encoder.final_layer_norm, hidden[0], 20), theirs)


def test_a_replaced_linear_without_a_weight_serves():
    class Stored(torch.nn.Module):
        def __init__(self, linear):
            super().__init__()
            self.packed = linear.weight.detach().clone()

        def forward(self, states):
            return torch.nn.functional.linear(states, self.packed)

    encoder = encoder_of(torch.float32)
    ids = torch.arange(2, 22)[None]

    def ours():
        with torch.no_grad():
            blocks = enumerate(encoder.encoder.block)
            return encode_layers(blocks, [encoder.shared.weight[ids]], [20])[0]

    expected = ours()
    dense = encoder.encoder.block[0].layer[-1].DenseReluDense
    dense.wo = Stored(dense.wo)
    encoder_of.cache_clear()
    assert torch.equal(ours(), expected)


def test_overflow_in_fp16_is_clamped_as_in_transformers():
    needs_sdpa_in_umt5()
    encoder = encoder_of(torch.float16)
    encoder_of.cache_clear()
    huge = torch.full((1, 6, 40), 6e4, dtype=torch.float16)
    huge[0, 1::2, ::2] = -6e4
    with torch.no_grad():
        for block in encoder.encoder.block:
            block.layer[0].SelfAttention.v.weight.fill_(0.5)
            block.layer[0].SelfAttention.o.weight.fill_(10)
        attended = encoder.encoder.block[0].layer[0](huge * 1.0)[0]
        theirs = huge * 1.0
        for block in encoder.encoder.block:
            theirs = block(theirs, None)
        ours = encode_layers(enumerate(encoder.encoder.block), [huge * 1.0], [6])[0]
    assert attended.isinf().any()
    assert ours.isfinite().all()
    assert torch.equal(ours, theirs)


def test_a_module_in_training_mode_is_still_run_without_dropout():
    encoder = encoder_of(torch.float32)
    ids = torch.arange(2, 12)[None]

    def ours():
        with torch.no_grad():
            blocks = enumerate(encoder.encoder.block)
            return encode_layers(blocks, [encoder.shared.weight[ids]], [10])[0]

    expected = ours()
    encoder.train()
    try:
        assert torch.equal(ours(), expected)
    finally:
        encoder.eval()


def test_blocks_are_visited_once_for_all_prompts(pipeline, tokenizer):
    visits = []

    def stream():
        for index, block in enumerate(pipeline.text_encoder.encoder.block):
            visits.append(index)
            yield index, block

    hidden = [torch.randn(1, 16, 48), torch.randn(1, 16, 48)]
    with torch.no_grad():
        encode_layers(stream(), hidden, [16, 3])
    assert visits == [0, 1, 2]


def test_only_distinct_embedding_rows_are_read(tokenizer):
    prompts = [tokenise(tokenizer, text, 32) for text in ("abab", "bc")]
    table = torch.randn(128, 6)
    asked = []

    def read_rows(rows):
        asked.append(list(rows))
        return table[rows]

    vectors = embed(prompts, read_rows, dtype=torch.float32)
    assert len(asked) == 1
    assert asked[0] == sorted(set(prompts[0].ids) | set(prompts[1].ids))
    for prompt, states in zip(prompts, vectors, strict=True):
        assert torch.equal(states, table[list(prompt.ids)][None])


def test_tokens_equal_the_pipelines_and_the_cut_is_told(pipeline, tokenizer):
    text = "word " * 200 + "the end"
    prompt = tokenise(tokenizer, text, 64)
    theirs = pipeline.tokenizer(
        [clean_prompt(text)], padding="max_length", max_length=64, truncation=True
    )
    assert list(prompt.ids) == theirs.input_ids[0]
    assert prompt.length == 64 == sum(theirs.attention_mask[0])
    assert prompt.cut.endswith("word the end")
    kept = pipeline.tokenizer.decode(list(prompt.ids), skip_special_tokens=True)
    assert (kept + prompt.cut).replace(" ", "") == text.replace(" ", "")


def test_a_prompt_that_just_fits_is_not_cut(pipeline, tokenizer):
    just = tokenise(tokenizer, "abc", 7)  # a space before each of three letters, and the end mark
    assert len(pipeline.tokenizer("abc").input_ids) <= 7
    assert (just.cut, just.ids[just.length - 1]) == ("", 1)
    length = just.length
    assert tokenise(tokenizer, "abc", length).cut == ""
    assert tokenise(tokenizer, "abc", length - 1).cut == "c"


def test_an_empty_negative_prompt_is_an_end_mark(tokenizer):
    empty = tokenise(tokenizer, "", 8)
    assert (empty.ids, empty.length, empty.cut) == ((1,) + (0,) * 7, 1, "")


def test_a_tokenizer_that_finds_nothing_is_refused(tmp_path, pipeline):
    blank = Backend.from_str(pipeline.tokenizer.backend_tokenizer.to_str())
    blank.post_processor = TemplateProcessing(single="$A", pair="$A $B", special_tokens=[])
    blank.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(RequestError, match="no tokens"):
        tokenise(Tokenizer(tmp_path), "", 8)


@given(st.text(max_size=80))
def test_cleaning_equals_diffusers(text):
    for raw in (text, html.escape(text), html.escape(html.escape(text))):
        assert clean_prompt(raw) == prompt_clean(raw)


@pytest.mark.parametrize(
    "raw", ["  a\u3000b\u00a0\n c ", "schÃ¶n", "&amp;lt;b&amp;gt;", "a\x1cb\x85c"]
)
def test_cleaning_known_cases(raw):
    assert clean_prompt(raw) == prompt_clean(raw)


def test_a_missing_tokenizer_is_told(tmp_path):
    with pytest.raises(CheckpointError, match="no usable tokenizer"):
        tokenise(Tokenizer(tmp_path / "nothing"), "text")
