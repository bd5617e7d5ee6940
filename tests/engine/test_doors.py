"""One model through every door: the same latents, bit for bit, wherever its parts lie."""

import pytest
import torch

from penstock.engine.engine import Engine
from penstock.engine.files.locate import Files, locate
from penstock.engine.packs.pack import pack
from penstock.engine.request.generation import GenerationRequest
from tests.engine import golden
from tests.engine.files.test_spm import train


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return golden.write_model(tmp_path_factory.mktemp("model") / "m", image_to_video=False)


def latents_of(model, files=None, **options):
    request = GenerationRequest(
        prompt="a cat", width=32, height=32, frames=5, steps=2, seed=3, guidance_scale=4.0
    )
    with Engine.open(model, files=files, device="cpu", **options) as engine:
        return engine.submit(request).result().latents


@pytest.fixture(scope="module")
def expected(model):
    return latents_of(model)


def single_files(model, folder, spelling="bf16"):
    """The parts of ``model`` as single files; the transformer in ``spelling``."""
    paths = {"tokenizer": model / "tokenizer"}
    for part in ("transformer", "text_encoder", "vae"):
        tensors = golden.load(model, part)
        names = golden.original_names(part, list(tensors))
        stored = golden.make(tensors, names, spelling if part == "transformer" else "bf16")
        paths[part] = stored.save(folder / f"{part}.safetensors")
    return Files(**paths)


def test_single_files_of_the_original_author(tmp_path, model, expected):
    files = single_files(model, tmp_path)
    assert torch.equal(latents_of(None, files), expected)


def test_a_pack_streams_to_the_same_latents(tmp_path, model, expected):
    pack(locate(model), "bf16", tmp_path / "p")
    assert torch.equal(latents_of(tmp_path / "p"), expected)


@pytest.mark.parametrize(
    "spelling, wanted",
    [("lightx2v int8", "int8"), ("lightx2v fp8", "fp8"), ("quanto int8", "quanto-int8")],
)
def test_quantised_files_and_their_packs_agree(tmp_path, model, expected, spelling, wanted):
    files = single_files(model, tmp_path, spelling)
    direct = latents_of(None, files)
    pack(locate(None, files), wanted, tmp_path / "p")
    assert torch.equal(latents_of(tmp_path / "p"), direct)
    assert not torch.equal(direct, expected)
    assert torch.nn.functional.cosine_similarity(
        direct.flatten().double(), expected.flatten().double(), dim=0
    ) > 0.99  # fmt: skip


@pytest.mark.parametrize("spelling", ["raw fp8", "everything fp8", "comfy old", "comfy int8"])
def test_other_spellings_run(tmp_path, model, expected, spelling):
    found = latents_of(None, single_files(model, tmp_path, spelling))
    assert found.isfinite().all()
    assert torch.nn.functional.cosine_similarity(
        found.flatten().double(), expected.flatten().double(), dim=0
    ) > 0.98  # fmt: skip


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
def test_gguf_runs(tmp_path, model, expected, kind):
    """Quantised transformer and text encoder, fp32 norms and biases, a quantised embedding."""
    tensors = golden.load(model, "transformer")
    names = golden.original_names("transformer", list(tensors))
    golden.write_gguf(tmp_path / "dit.gguf", tensors, names, kind, "wan")
    text = golden.load(model, "text_encoder")
    golden.write_gguf(tmp_path / "t5.gguf", text, golden.llama_names(list(text)), kind, "t5encoder")
    files = Files(
        transformer=tmp_path / "dit.gguf",
        text_encoder=tmp_path / "t5.gguf",
        tokenizer=model / "tokenizer",
    )
    found = latents_of(model, files)
    similar = torch.nn.functional.cosine_similarity(
        found.flatten().double(), expected.flatten().double(), dim=0
    )
    assert similar > {"Q8_0": 0.99, "Q4_0": 0.9}[kind]


def test_blocks_of_different_formats_stream_one_after_the_other(tmp_path, model, expected):
    """Block 0 quantised, block 1 plain: each block has the skeleton that its storage needs."""
    tensors = golden.load(model, "transformer")
    names = golden.original_names("transformer", list(tensors))
    mixed = golden.make(tensors, names, "lightx2v int8")
    plain = golden.make(tensors, names, "bf16")
    stored = golden.Stored()
    stored.file = {k: v for k, v in mixed.file.items() if not k.startswith("blocks.1.")}
    stored.file |= {k: v for k, v in plain.file.items() if k.startswith("blocks.1.")}
    path = stored.save(tmp_path / "x.safetensors")
    found = latents_of(model, Files(transformer=path))
    assert torch.nn.functional.cosine_similarity(
        found.flatten().double(), expected.flatten().double(), dim=0
    ) > 0.99  # fmt: skip


def test_the_embedded_tokenizer_is_used(tmp_path, model):
    files = single_files(model, tmp_path)
    tensors = golden.load(model, "text_encoder")
    stored = golden.make(tensors, {name: name for name in tensors}, "bf16")
    data = train(vocab_size=90, byte_fallback=False)
    stored.file["spiece_model"] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    path = stored.save(tmp_path / "umt5.safetensors")
    found = latents_of(None, Files(files.transformer, path, files.vae))
    assert found.isfinite().all()
