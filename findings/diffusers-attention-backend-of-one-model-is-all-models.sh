#!/usr/bin/env bash
# diffusers 0.42.1 (torch 2.13.0): `model.set_attention_backend(...)` is a method of one model, but
# it sets the process's active backend besides: every other model, loaded before or after, computes
# with it too, and gives other values. `model.reset_attention_backend()` does not put it back. Who
# compares two backends in one process, or sets one for the first of two transformers, must use the
# context manager `diffusers.attention_backend`, which restores what was.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install -q torch==2.13.0 diffusers==0.42.1 transformers==5.23.0 accelerate==1.15.0
cat > "$place/seen.py" <<'PY'
import torch
from diffusers import WanTransformer3DModel


def made(seed):
    torch.manual_seed(seed)
    return WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16,
        freq_dim=16, ffn_dim=32, num_layers=2, rope_max_seq_len=32,
    ).eval()


mine, another = made(0), made(1)
latents, text = torch.randn(1, 4, 2, 8, 8), torch.randn(1, 5, 16)


@torch.no_grad()
def changed():
    found = mine(latents, torch.tensor([900]), text, return_dict=False)[0]
    return not torch.equal(found, before)


with torch.no_grad():
    before = mine(latents, torch.tensor([900]), text, return_dict=False)[0]
seen = {"nothing was set": changed()}
another.set_attention_backend("_native_math")
seen["another model's backend was set"] = changed()
another.reset_attention_backend()
seen["another model's backend was reset"] = changed()
for when, differs in seen.items():
    print(f"{when}: this model's output {'changed' if differs else 'is the same'}")
assert list(seen.values()) == [False, True, True], seen
PY
"$place/venv/bin/python" "$place/seen.py"
