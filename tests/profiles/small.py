"""Small models, machines and workloads for property tests of the planner."""

from __future__ import annotations

from hypothesis import strategies as st

from penstock.engine.families.wan.manifest import WanManifest
from penstock.engine.families.wan.spec import ImageSpec, TextSpec, TransformerSpec, VaeSpec
from penstock.profiles.hardware import Hardware
from penstock.profiles.manifest import Storage, VideoShape, Weights
from penstock.profiles.phases import CUDA_LIBRARY_BYTES, Workload
from penstock.profiles.policy import Policy
from penstock.profiles.rates import Rates

PAGE = 4096


@st.composite
def weights(draw: st.DrawFn, most: int = 5, largest: int = 40) -> Weights:
    blocks = draw(st.integers(1, most))
    pages = st.integers(1, largest)
    sizes = draw(
        st.one_of(
            st.tuples(pages).map(lambda one: one * blocks),
            st.lists(pages, min_size=blocks, max_size=blocks),
        )
    )
    rest = draw(st.integers(1, 20)) * PAGE
    return Weights(rest, tuple(size * PAGE for size in sizes), draw(st.sampled_from([2, 4])))


@st.composite
def manifests(draw: st.DrawFn) -> WanManifest:
    dit, text = draw(weights(largest=1500)), draw(weights(3))
    pictured = draw(st.booleans())
    storage = draw(st.sampled_from([Storage(), Storage("int8", 900_000, 100, 30000)]))
    image = ImageSpec(draw(weights(3)), 16, 32, 3, 2, 8, 4) if pictured else None
    half = Weights(draw(st.integers(1, 30)) * PAGE, (), 2)
    return WanManifest(
        transformer=TransformerSpec(
            weights=dit,
            cross_block_bytes=tuple(max(PAGE, size // 2) for size in dit.block_bytes),
            num_layers=len(dit.block_bytes),
            num_attention_heads=draw(st.integers(1, 3)),
            attention_head_dim=12,
            ffn_dim=draw(st.integers(8, 64)),
            in_channels=36 if pictured else 16,
            out_channels=16,
            text_dim=8,
            freq_dim=16,
            patch_size=(1, 2, 2),
            image_dim=16 if pictured else None,
            storage=storage,
        ),
        text=TextSpec(text, 8, 4, 16, len(text.block_bytes), 1),
        vae=VaeSpec(half, half, 4, 16, (1, 2, 2, 2), 1, (False, True, True)),
        image=image,
    )


workloads = st.builds(
    lambda width, height, frames, *rest: Workload(
        VideoShape(16 * width, 16 * height, 4 * frames + 1), *rest
    ),
    st.integers(1, 5),
    st.integers(1, 5),
    st.integers(0, 3),
    st.integers(1, 8),
    st.booleans(),
    st.booleans(),
)

_rates = st.builds(
    Rates,
    flops=st.floats(1e8, 1e11),
    copy_bytes_per_s=st.floats(1e7, 1e10),
    read_bytes_per_s=st.floats(1e6, 1e10),
    attention_flops=st.sampled_from([None, 1e9]),
    int8_attention_flops=st.sampled_from([None, 3e8, 4e9]),
    conv_flops=st.sampled_from([None, 1e10]),
    conv_element_s=st.sampled_from([None, 1e-9]),
    conv_pixel_s=st.sampled_from([None, 1e-7]),
    conv_call_s=st.sampled_from([None, 1e-4]),
    eight_bit_flops=st.sampled_from([None, 1e11]),
    fp8_flops=st.sampled_from([None, 5e10]),
    memory_bytes_per_s=st.sampled_from([None, 1e9]),
    tiny_overhead_s=st.sampled_from([None, 1e-4]),
    tiny_key_s=st.sampled_from([None, 1e-9]),
)

machines = st.builds(
    lambda device, fused, vram, ram, rates: Hardware(
        device,
        "a machine",
        vram + (CUDA_LIBRARY_BYTES if device == "cuda" else 0),
        ram,
        rates,
        fused_norms=fused and device == "cuda",
    ),
    st.sampled_from(["cpu", "cuda"]),
    st.booleans(),
    st.integers(6 << 20, 32 << 20),
    st.integers(16 << 20, 40 << 20),
    _rates,
)

policies = st.one_of(
    st.just(Policy()),
    st.builds(
        Policy,
        branches=st.sampled_from([None, 1, 2]),
        chunk_tokens=st.sampled_from([None, 5]),
        tiles=st.sampled_from([None, (2, 2)]),
        cross_kv=st.sampled_from(["auto", "vram", "ram"]),
        compute=st.sampled_from(["exact", "fast"]),
        disk=st.sampled_from(["auto", "never"]),
        attention=st.sampled_from(["sdpa", "int8"]),
        residual=st.sampled_from(["auto", "bf16", "fp32"]),
    ),
)
