#!/usr/bin/env bash
# transformers 5.23.0 saves a CLIPVisionModel under bare names ("embeddings..."), where transformers 4
# (4.57.1 here) and every folder of Wan2.1 on the hub have "vision_model.embeddings...". 5 reads both;
# 4 reads none of its own in a file of 5, says so in a warning, and goes on with an encoder as it was
# drawn at random. A pipeline saved with 5 so makes another video in 4. The old names are read by both.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
for version in 4.57.1 5.23.0; do
    python3 -m venv "$place/$version"
    "$place/$version/bin/pip" install -q torch==2.13.0 transformers==$version numpy==2.2.6
done
cat > "$place/save.py" <<'PY'
import sys

import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionConfig, CLIPVisionModel

shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
model = CLIPVisionModel(
    CLIPVisionConfig(**shape, num_attention_heads=2, image_size=8, patch_size=4)
)
for folder, before in (("bare", ""), ("old", "vision_model.")):
    model.save_pretrained(f"{sys.argv[1]}/{folder}")
    path = f"{sys.argv[1]}/{folder}/model.safetensors"
    weights = load_file(path)
    assert not any(name.startswith("vision_model.") for name in weights), list(weights)[:3]
    save_file({before + name: value for name, value in weights.items()}, path, {"format": "pt"})
wanted = {"wanted": model(torch.ones(1, 3, 8, 8)).last_hidden_state.detach()}
save_file(wanted, f"{sys.argv[1]}/wanted.safetensors")
PY
cat > "$place/load.py" <<'PY'
import sys

import torch
import transformers
from safetensors.torch import load_file
from transformers import CLIPVisionModel

wanted = load_file(f"{sys.argv[1]}/wanted.safetensors")["wanted"]
same = {}
for folder in ("bare", "old"):
    model = CLIPVisionModel.from_pretrained(f"{sys.argv[1]}/{folder}")
    found = model(torch.ones(1, 3, 8, 8)).last_hidden_state
    same[folder] = torch.allclose(found, wanted, atol=1e-5)
print(transformers.__version__, "gives what was saved, by the names in the file:", same)
assert same == {"bare": transformers.__version__.startswith("5"), "old": True}, same
PY
"$place/5.23.0/bin/python" "$place/save.py" "$place"
for version in 4.57.1 5.23.0; do
    "$place/$version/bin/python" "$place/load.py" "$place" 2> /dev/null
done
