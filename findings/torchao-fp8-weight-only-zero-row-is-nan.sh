#!/usr/bin/env bash
# torchao 0.18.0 (torch 2.13.0): Float8WeightOnlyConfig gives a row of zeros the scale 0 and divides
# by it, so that the stored weight of that row is NaN and so is that output, from then on for good.
# Such rows are valid: layers that start at zero (adapters, control branches, gates), and pruned ones.
# Int8WeightOnlyConfig keeps its scale above zero and gives 0, as one expects. Nothing is said, and a
# checkpoint saved so holds the NaN.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install -q torch==2.13.0 torchao==0.18.0
cat > "$place/seen.py" <<'PY'
import torch
from torch import nn
from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_


def outputs(config, dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 4, bias=False)).to(dtype)
    model[0].weight.data[2] = 0
    quantize_(model, config)
    with torch.no_grad():
        return model(torch.ones(1, 64, dtype=dtype))[0].tolist()


for dtype in (torch.float32, torch.bfloat16, torch.float16):
    fp8, int8 = outputs(Float8WeightOnlyConfig(), dtype), outputs(Int8WeightOnlyConfig(), dtype)
    print(f"{dtype}: the output whose weights are zero is {fp8[2]} in fp8, {int8[2]} in int8")
    assert fp8[2] != fp8[2] and int8[2] == 0.0
    assert all(value == value for value in fp8[:2] + fp8[3:])
PY
"$place/venv/bin/python" -W ignore "$place/seen.py"
