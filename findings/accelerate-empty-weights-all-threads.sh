#!/usr/bin/env bash
# accelerate 1.15.0 (torch 2.13.0): init_empty_weights() is a context manager, so one expects it to
# concern the code inside its "with". It replaces a method of torch.nn.Module itself instead, for the
# whole process: while one thread builds a skeleton, a module that any other thread builds gets its
# parameters on the meta device too, without values and without a word. A server or a UI that loads a
# model in a thread must not use it beside other threads; `torch.device("meta")` as a context is
# bound to its thread.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install -q torch==2.13.0 accelerate==1.15.0
cat > "$place/seen.py" <<'PY'
import threading

import torch
from accelerate import init_empty_weights
from torch import nn


def built_elsewhere_during(context):
    entered, built, found = threading.Event(), threading.Event(), []

    def other():
        entered.wait()
        found.append(nn.Linear(2, 2).weight.device.type)
        built.set()

    thread = threading.Thread(target=other)
    thread.start()
    with context:
        entered.set()
        built.wait()
    thread.join()
    return found[0]


seen = {
    "init_empty_weights": built_elsewhere_during(init_empty_weights()),
    "torch.device": built_elsewhere_during(torch.device("meta")),
}
for name, device in seen.items():
    print(f"inside {name}, another thread's Linear lies on: {device}")
assert seen == {"init_empty_weights": "meta", "torch.device": "cpu"}, seen
PY
"$place/venv/bin/python" "$place/seen.py"
