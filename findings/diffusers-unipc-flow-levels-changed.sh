#!/usr/bin/env bash
# diffusers 0.36.0 and 0.42.1 (torch 2.13.0): UniPCMultistepScheduler with the settings that Wan2.1's
# repositories publish (flow_prediction, use_flow_sigmas, flow_shift) gives other timesteps for the
# same number of steps. So a video made again with the same model, prompt and seed after an upgrade is
# another video, and neither version warns. A program that promises the same result must own its
# noise levels or keep the list of timesteps with the result.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
cat > "$place/levels.py" <<'PY'
from diffusers import UniPCMultistepScheduler

scheduler = UniPCMultistepScheduler(
    prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0,
    num_train_timesteps=1000,
)
scheduler.set_timesteps(40)
print(" ".join(str(int(each)) for each in scheduler.timesteps))
PY
for version in 0.36.0 0.42.1; do
    python3 -m venv "$place/$version"
    "$place/$version/bin/pip" install -q torch==2.13.0 "diffusers==$version"
    "$place/$version/bin/python" "$place/levels.py" > "$place/$version.txt"
    echo "diffusers $version, last five of 40 timesteps: $(tr ' ' '\n' < "$place/$version.txt" | tail -n 5 | xargs)"
done
differ=$(paste <(tr ' ' '\n' < "$place/0.36.0.txt") <(tr ' ' '\n' < "$place/0.42.1.txt") | awk '$1 != $2' | wc -l)
echo "timesteps that differ: $differ of 40"
test "$differ" -gt 0
