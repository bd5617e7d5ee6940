#!/usr/bin/env bash
# optimum-quanto 0.2.7 (torch 2.13.0): a row of zeros in a weight becomes a row of NaN under qfloat8
# (its scale is 0, and the row is divided by it); that output is NaN from then on, and a checkpoint
# saved so holds the NaN. Such rows are valid: layers that start at zero (adapters, control branches,
# gates), and pruned ones. qint8 and qint4 give 0, as one expects.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install -q torch==2.13.0 optimum-quanto==0.2.7
cat > "$place/seen.py" <<'PY'
import torch
from optimum import quanto
from torch import nn


def outputs(kind, dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 4, bias=False)).to(dtype)
    model[0].weight.data[2] = 0
    quanto.quantize(model, weights=kind)
    quanto.freeze(model)
    with torch.no_grad():
        return model(torch.ones(1, 64, dtype=dtype))[0].tolist()


for dtype in (torch.float32, torch.bfloat16, torch.float16):
    fp8, int8 = outputs(quanto.qfloat8, dtype), outputs(quanto.qint8, dtype)
    print(f"{dtype}: the output whose weights are zero is {fp8[2]} in fp8, {int8[2]} in int8")
    assert fp8[2] != fp8[2] and int8[2] == 0.0
    assert all(value == value for value in fp8[:2] + fp8[3:])
PY
"$place/venv/bin/python" -W ignore "$place/seen.py"
