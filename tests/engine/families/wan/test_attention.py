"""Attention's backends, and the trial that one in 8 bits must pass."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from penstock.engine.attention import probe as attention_probe
from penstock.engine.attention.kernels import attention, int8_attention, self_attention_of
from penstock.engine.attention.probe import MIN_COSINE, AttentionReport, probe_int8
from penstock.engine.families.wan import forward
from tests import fake_kitchen
from tests.tiny_transformer import inputs, tiny_transformer


def tried(dtype: torch.dtype = torch.float32, heads: int = 8, width: int = 128) -> AttentionReport:
    return probe_int8("cpu", dtype, heads, width)


def test_torchs_own_is_the_default_and_looks_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "comfy_kitchen", None)  # an import of it would raise
    assert self_attention_of("sdpa") is attention
    with pytest.raises(ImportError):
        self_attention_of("int8")


def test_layouts_go_there_and_back(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_kitchen.install(monkeypatch, F.scaled_dot_product_attention)
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, tokens, 3, 8, generator=draw) for tokens in (5, 7, 7))
    found = self_attention_of("int8")(q, k, v)
    assert torch.equal(found, attention(q, k, v))
    assert found.shape == (1, 5, 24) and found.is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("heads", "width"), [(40, 128), (4, 24), (2, 12)])
def test_a_right_kernel_passes(
    heads: int, width: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_kitchen.install(monkeypatch)
    report = tried(dtype, heads, width)
    assert report.works and not report.reason
    assert report.cosine is not None and MIN_COSINE < 0.998 < report.cosine < 1


def test_the_trial_is_what_a_job_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model's heads and dtype, large tiles, last ones partly filled, and outliers in the
    keys."""
    asked: list[tuple[Tensor, Tensor, Tensor]] = []

    def kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        asked.append((q, k, v))
        return fake_kitchen.quantising(q, k, v)

    fake_kitchen.install(monkeypatch, kernel)
    assert tried(torch.bfloat16, 40, 128).works and tried(torch.bfloat16, 2, 128).works
    (q, k, v), (few, _, _) = asked
    assert {x.dtype for x in (q, k, v)} == {torch.bfloat16}
    assert q.shape[1] == 4 and few.shape[1] == 2 and q.shape[3] == 128
    assert k.shape == v.shape and k.shape[2] > 1024 and k.shape[2] % 64 and q.shape[2] % 64
    largest = k.float().std(dim=2)[0].sort(dim=1).values
    assert bool((largest[:, -4:] > 5 * largest[:, :-4].amax(dim=1, keepdim=True)).all())


def one_head_wrong(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    found = fake_kitchen.quantising(q, k, v)
    found[:, -1] = found[:, -1].roll(1, dims=1)
    return found


def one_not_finite(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    found = fake_kitchen.quantising(q, k, v)
    found[0, 0, 0, 0] = float("nan")
    return found


def raising(error: Exception) -> fake_kitchen.Kernel:
    def kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        raise error

    return kernel


@pytest.mark.parametrize(
    ("kernel", "told"),
    [
        (one_not_finite, "the result is not finite"),
        (one_head_wrong, "cosine "),
        (lambda q, k, v: torch.zeros_like(q), "cosine 0.0000, at least 0.99 wanted"),
        (lambda q, k, v: q[:, :, 1:], "a result of shape (1, 199, 512), not (1, 200, 512)"),
        (raising(RuntimeError("no kernel image\nmore")), "no kernel image"),
        (raising(ValueError("head_dim must be in [1, 256]")), "head_dim must be in [1, 256]"),
        (raising(TypeError("q, k, and v must be")), "q, k, and v must be"),
        (raising(AttributeError("module has no sage_sdpa")), "module has no sage_sdpa"),
        (raising(OSError("libcudart.so.12")), "libcudart.so.12"),
    ],
)
def test_what_does_not_work_is_told(
    kernel: fake_kitchen.Kernel, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_kitchen.install(monkeypatch, kernel)
    report = tried()
    assert not report.works and report.reason.startswith(told)
    assert "\n" not in report.reason


def test_what_is_not_there_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "comfy_kitchen", None)
    report = tried()
    assert not report.works and "the extra 'fast' of penstock" in report.reason
    fake_kitchen.install(monkeypatch, available=False)
    assert tried() == AttentionReport(False, None, "it needs a CUDA device")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    told = attention_probe._not_there(torch.device("cuda"))
    assert "sm70; sm75 or newer is needed" in told


def test_only_self_attention_is_in_8_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        asked.append(k.shape[2])
        return fake_kitchen.quantising(q, k, v)

    fake_kitchen.install(monkeypatch, kernel)
    model = tiny_transformer(image_dim=6)
    latents, text, image = inputs(model, (2, 8, 8), torch.float32)
    context = forward.prepare_context(model, text, image)
    cross = [forward.cross_kv(block.attn2, context) for block in model.blocks]
    step = forward.step_modulation(model, torch.tensor([7]), torch.float32)[0]
    rope = forward.rope_tables(model, (2, 8, 8), latents.device)
    sdpa, int8 = (
        forward.denoise_forward(
            model, enumerate(model.blocks), latents, [cross], step, rope, 20, attend
        )[0]
        for attend in (attention, int8_attention())
    )
    assert asked == [32] * 4  # two blocks, two chunks of 32 tokens; never the text's 512
    cosine = F.cosine_similarity(sdpa.flatten(), int8.flatten(), dim=0)
    assert 0.999 < cosine < 1 and not torch.equal(sdpa, int8)
