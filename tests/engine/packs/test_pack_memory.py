"""Packing takes the memory it is allowed, whatever the size of the model."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from penstock.engine.families.wan.kinds import KINDS
from tests.engine.families.wan.test_structure import I2V_14B
from tests.engine.test_inspect import write_sparse

MIB = 1 << 20
CONFIG = I2V_14B | {
    "num_attention_heads": 16, "ffn_dim": 8192, "num_layers": 3, "image_dim": None,
    "added_kv_proj_dim": None, "in_channels": 16,
}  # fmt: skip

CHILD = """
import json, resource, sys
from pathlib import Path
import bitsandbytes, torch  # libraries are not what is measured
torch.set_num_threads(1)
from penstock.engine.store.durable import FileOps
from penstock.engine.files.locate import open_component
from penstock.engine.packs.pack import pack_component
from penstock.engine.packs.plan import plan_component
def peak(kind):
    return int(Path("/proc/self/status").read_text().split(kind)[1].split()[0]) * 1024
def pack(source, out, room):
    plan = plan_component(open_component(Path(source)), sys.argv[3])
    pack_component(plan, Path(out), room, FileOps(), lambda nbytes: None)
room = int(sys.argv[5])
pack(sys.argv[2], sys.argv[4] + ".small", room)  # pages of torch's kernels, mapped as they are used
before = peak("VmRSS:")
limit = peak("VmData:") + room + (32 << 20)  # arenas of malloc are address space, not memory
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
pack(sys.argv[1], sys.argv[4], room)
print(json.dumps({"taken": peak("VmHWM:") - before}))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads its own peak in /proc")
@pytest.mark.parametrize(
    "wanted",
    ["nf4", "bf16", *(pytest.param(name, marks=pytest.mark.faults) for name in ("int8", "fp8"))],
)
def test_a_model_in_a_sixth_of_its_size(tmp_path, wanted):
    path, small = (
        write_sparse(
            tmp_path / f"{name}.safetensors",
            {n: ("F16", s) for n, s in KINDS["transformer"].shapes(CONFIG | changed).items()},
        )
        for name, changed in (("x", {}), ("small", {"num_attention_heads": 1, "ffn_dim": 256}))
    )
    assert path.stat().st_size > 400 * MIB
    (tmp_path / "out").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(path), str(small), wanted,
         str(tmp_path / "out" / "p.safetensors"), str(64 * MIB)],
        capture_output=True, text=True, check=False, cwd=Path(__file__).parents[3],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["taken"] < 64 * MIB
    for made in (tmp_path / "out").iterdir():
        made.unlink()
