#!/usr/bin/env bash
# diffusers 0.42.1 (torch 2.13.0): TaylorSeerCacheConfig says that it hooks all attention-like modules
# where no names are given. On WanTransformer3DModel it hooks none: its default patterns end in "attn"
# and are matched against whole names, and Wan's attentions are called attn1 and attn2. Nothing is
# skipped, nothing is said. With the names given it skips as expected.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install -q torch==2.13.0 diffusers==0.42.1 transformers==5.23.0 accelerate==1.15.0
cat > "$place/seen.py" <<'PY'
import torch
from diffusers import TaylorSeerCacheConfig, WanTransformer3DModel


def computed(config, steps=12):
    """How often the first self-attention is computed in so many denoising steps."""
    torch.manual_seed(0)
    model = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16,
        freq_dim=16, ffn_dim=32, num_layers=2, rope_max_seq_len=32,
    ).eval()
    calls = []
    model.blocks[0].attn1.to_q.register_forward_pre_hook(lambda *_: calls.append(1))
    model.enable_cache(config)
    latents, text = torch.randn(1, 4, 2, 8, 8), torch.randn(1, 5, 16)
    with torch.no_grad():
        for step in range(steps):
            with model.cache_context("cond"):
                model(latents, torch.tensor([900 - 10 * step]), text, return_dict=False)
    return len(calls)


default = computed(TaylorSeerCacheConfig())
named = computed(TaylorSeerCacheConfig(cache_identifiers=[r"blocks\.\d+\.attn[12]"]))
print(f"self-attention computed in 12 steps: {default} with the defaults, {named} with names")
assert default == 12 and named < 8, (default, named)
PY
"$place/venv/bin/python" "$place/seen.py"
