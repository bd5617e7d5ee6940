"""Packs: their layout, their bytes whatever the source and however often the maker is killed, and
every flipped bit found."""

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from penstock.engine.files.formats import linear_formats
from penstock.engine.files.keys import recognise, stored_name
from penstock.engine.files.locate import Files, locate
from penstock.engine.files.reader import WeightReader
from penstock.engine.files.source import open_raw
from penstock.engine.packs import file as packfile
from penstock.engine.packs.file import PackFile, verify
from penstock.engine.packs.pack import PROGRESS_SUFFIX, pack, pack_component
from penstock.engine.packs.plan import plan_component, runs_of
from penstock.engine.store.durable import FileOps
from penstock.errors import CheckpointChanged, CheckpointError, StorageError, UsageError
from penstock.formats.formats import FORMATS
from penstock.offload.checkpoint import Checkpoint
from penstock.offload.layout import BlockLayout
from penstock.quant.arithmetic import dequantise, quantise
from tests.engine import golden
from tests.faults.storage import PACKING, FaultyOps, InterceptedOps

RAM = 64 << 20
WRITABLE = ["bf16", "fp8", "int8", "nf4", "quanto-int8", "quanto-fp8", "quanto-int4", "gguf-q8_0"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return golden.write_model(tmp_path_factory.mktemp("model") / "m")


@pytest.fixture(scope="module")
def packed(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed") / "int8"
    pack(locate(model), "int8", folder)
    return folder


def transformer_of(folder):
    return folder / "transformer" / "diffusion_pytorch_model.safetensors"


def contents(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*")) if path.is_file()
    }  # fmt: skip


@pytest.mark.parametrize("wanted", WRITABLE)
def test_every_format_packs_and_opens_to_the_values_it_stands_for(tmp_path, model, wanted):
    found = locate(model)
    pack(found, wanted, tmp_path / "p", ram_bytes=RAM)
    again = locate(tmp_path / "p")
    assert [s.component for s in again.components()] == [s.component for s in found.components()]
    plain = golden.load(model, "transformer")
    with WeightReader(again.streamed) as reader:
        for name, tensor in plain.items():
            value = reader.read(name, torch.float32)
            if golden.is_block_matrix(name, tensor):
                shape = (tensor.shape[0], tensor.shape[1])
                stored = quantise(FORMATS[wanted], tensor)
                tensor = dequantise(FORMATS[wanted], stored, shape, torch.float32)
            assert torch.equal(value, tensor.float()), name
    for part in ("vae", "text_encoder", "image_encoder"):
        with WeightReader(
            recognise(open_raw(tmp_path / "p" / part), _config(tmp_path / "p" / part))
        ) as reader:  # noqa: E501
            for name, tensor in golden.load(model, part).items():
                assert torch.equal(reader.read(name, torch.float32), tensor.float()), name
    formats = linear_formats(again.streamed)
    expected = set() if wanted == "bf16" else {wanted}
    assert {fmt.name for fmt in formats.values()} == expected


def _config(folder):
    return json.loads((folder / "config.json").read_text())


def test_a_run_is_one_read_from_a_page(packed):
    path = transformer_of(packed)
    about = PackFile.open(path)
    source = recognise(open_raw(path))
    runs = runs_of(source.kind, source.shapes)
    assert list(runs) == ["rest", "cross 0", "cross 1", "block 0", "block 1"] == list(about.runs)
    entries = source.entries()
    for run, names in runs.items():
        suffixes = {name: source.weights[name].tensors for name in names}
        mine = {
            full: entries[full]
            for name, tensors in suffixes.items()
            for full in (stored_name(name, suffix) for suffix in tensors)
        }
        layout = BlockLayout.from_entries(mine)
        (extent,) = layout.extents
        assert extent.file_offset % 4096 == 0 == extent.buffer_offset
        assert (extent.file_offset, extent.nbytes) == (
            about.runs[run].offset,
            about.runs[run].nbytes,
        )
        assert all(place.offset % 64 == 0 for place in layout.places.values())


def test_the_pack_is_plain_safetensors(packed):
    path = transformer_of(packed)
    with safe_open(path, "pt") as file:
        names = set(file.keys())
        about = json.loads(file.metadata()["penstock"])
        weight = file.get_tensor("blocks.0.attn1.to_q.weight")
    assert about["format"] == "int8"
    assert about["component"] == "transformer"
    assert about["source"]["diffusion_pytorch_model.safetensors"]["bytes"] > 0
    assert weight.dtype == torch.int8
    assert any(name.startswith("__pad__.") for name in names)
    with Checkpoint.open(path) as checkpoint:
        assert set(checkpoint) == names


def test_any_source_gives_the_same_runs(tmp_path, model, packed):
    tensors = golden.load(model, "transformer")
    names = golden.original_names("transformer", list(tensors))
    made = golden.make(tensors, names, "bf16", "model.diffusion_model.")
    single = made.save(tmp_path / "x.safetensors")
    source = locate(model, Files(transformer=single))
    pack(source, "int8", tmp_path / "p")
    ours, theirs = (
        PackFile.open(transformer_of(tmp_path / "p")),
        PackFile.open(transformer_of(packed)),
    )
    assert ours.runs == theirs.runs
    assert ours.about["source"] != theirs.about["source"]


@pytest.mark.parametrize("spelling", ["lightx2v int8", "lightx2v fp8", "quanto int8"])
def test_a_file_in_the_wanted_format_is_not_rounded_again(tmp_path, model, spelling):
    tensors = golden.load(model, "transformer")
    made = golden.make(tensors, golden.original_names("transformer", list(tensors)), spelling)
    single = made.save(tmp_path / "x.safetensors")
    wanted = {"lightx2v int8": "int8", "lightx2v fp8": "fp8", "quanto int8": "quanto-int8"}[
        spelling
    ]
    pack(locate(model, Files(transformer=single)), wanted, tmp_path / "p")
    with WeightReader(locate(tmp_path / "p").parts["transformer"]) as reader:
        for name, value in made.values.items():
            assert torch.equal(reader.read(name, torch.float32), value), name


def test_gguf_blocks_of_the_text_encoder_stay_blocks(tmp_path, model):
    tensors = golden.load(model, "text_encoder")
    names = golden.llama_names(list(tensors))
    values = golden.write_gguf(tmp_path / "t.gguf", tensors, names, "Q5_1", "t5encoder")
    files = Files(text_encoder=tmp_path / "t.gguf", tokenizer=model / "tokenizer")
    pack(locate(model, files), "bf16", tmp_path / "p")
    text = locate(tmp_path / "p").parts["text_encoder"]
    assert text.label() == "gguf-q5_1"
    linears = [name for name in values if "relative" not in name and "shared" not in name]
    with WeightReader(text) as reader:
        for name in linears:
            assert torch.equal(reader.read(name, torch.float32).bfloat16(), values[name].bfloat16())


class Killed(BaseException):
    """The process is gone."""


class DyingOps(InterceptedOps):
    """Dies before or after the Nth changing operation; nothing works from then on."""

    def __init__(self, at):
        self.left, self.dead = at, False

    def before(self, operation, arguments):
        self._pass(operation)

    def after(self, operation, arguments, result):
        self._pass(operation)

    def _pass(self, operation):
        if self.dead:
            raise Killed
        if operation in PACKING:
            if self.left == 0:
                self.dead = True
                raise Killed
            self.left -= 1


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A transformer of one narrow block: few operations, so that all can be tried."""
    from penstock.engine.families.wan.tiny import write_tiny_model

    sizes = {"num_layers": 1, "num_attention_heads": 1, "attention_head_dim": 12, "ffn_dim": 16}
    folder = tmp_path_factory.mktemp("small")
    return write_tiny_model(folder, image_to_video=False, transformer=sizes) / "transformer"


def _small_plan(small, wanted="int8"):
    return plan_component(recognise(open_raw(small), _config(small)), wanted)


def make(plan, path, ops=None):
    return pack_component(plan, path, RAM, ops or FileOps(), lambda nbytes: None)


def test_killed_at_every_operation_it_ends_with_the_same_bytes(tmp_path, small):
    plan = _small_plan(small)
    make(plan, tmp_path / "whole" / "x.safetensors")
    expected = (tmp_path / "whole" / "x.safetensors").read_bytes()
    reused, at = set(), 0
    while True:
        path = tmp_path / "killed" / "x.safetensors"
        try:
            make(plan, path, DyingOps(at))
        except Killed:
            assert not path.exists() or path.read_bytes() == expected
            reused.add(make(plan, path))
        else:
            break
        finally:
            assert (tmp_path / "killed").exists() or at < 2
        assert path.read_bytes() == expected
        left = sorted(p.name for p in path.parent.iterdir())
        assert left == ["x.safetensors", "x.safetensors.source"]  # and what it was made from
        shutil.rmtree(path.parent)
        at += 1
    assert at > 150
    assert reused == {0, 1, 2, 3}  # every number of runs was found done by some attempt


def test_matrices_whose_rows_are_not_whole_blocks_stay_plain(small):
    """Rows of 12 and 16: NF4 has blocks of 64."""
    steps = [step for run in _small_plan(small, "nf4").steps for step in run]
    assert {step.format for step in steps} == {None}
    assert "int8" in {step.format.name for run in _small_plan(small).steps for step in run
                      if step.format}  # fmt: skip


def test_killed_twice(tmp_path, small):
    plan = _small_plan(small)
    make(plan, tmp_path / "whole.safetensors")
    expected = (tmp_path / "whole.safetensors").read_bytes()
    for first in range(3, 200, 23):
        path = tmp_path / f"{first}" / "x.safetensors"
        for at in (first, first // 2):
            with pytest.raises(Killed):
                make(plan, path, DyingOps(at))
        make(plan, path)
        assert path.read_bytes() == expected


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL")
def test_a_real_kill(tmp_path, model, packed):
    code = (
        "import sys; from pathlib import Path\n"
        "from penstock.engine.files.locate import locate\n"
        "from penstock.engine.packs.pack import pack\n"
        "from tests.faults.storage import KillingOps\n"
        "pack(locate(sys.argv[1]), 'int8', Path(sys.argv[2]), ops=KillingOps(int(sys.argv[3])))\n"
    )
    for at in (40, 400):
        done = subprocess.run(
            [sys.executable, "-c", code, str(model), str(tmp_path / "p"), str(at)],
            check=False, cwd=Path(__file__).parents[3], capture_output=True,
        )  # fmt: skip
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert not (tmp_path / "p" / "model_index.json").exists()
    report = pack(locate(model), "int8", tmp_path / "p")
    assert report.reused_runs > 0
    assert contents(tmp_path / "p") == contents(packed)


def test_damage_to_what_was_left_is_found_and_made_again(tmp_path, small):
    plan = _small_plan(small)
    make(plan, tmp_path / "whole.safetensors")
    expected = (tmp_path / "whole.safetensors").read_bytes()
    path = tmp_path / "x.safetensors"
    partial, notes = tmp_path / "x.safetensors.new", tmp_path / f"x.safetensors{PROGRESS_SUFFIX}"

    class LastSync(DyingOps):
        def before(self, operation, arguments):
            if operation == "rename" and arguments[1] == path:
                raise Killed

    def again():
        with pytest.raises(Killed):
            make(plan, path, LastSync(10**9))
        return bytearray(partial.read_bytes())

    for run, found in ((2, 2), (1, 1), (0, 0)):
        spoiled = again()
        spoiled[plan.layout.data_start + plan.layout.runs[run].offset + 5] ^= 1
        partial.write_bytes(spoiled)
        assert make(plan, path) == found
        assert path.read_bytes() == expected
        path.unlink()
    for spoil in (lambda: notes.write_bytes(b"{"), lambda: notes.write_bytes(b'{"runs": 3}'),
                  lambda: partial.write_bytes(b"short"), partial.unlink):  # fmt: skip
        again()
        spoil()
        assert make(plan, path) == 0
        assert path.read_bytes() == expected
        path.unlink()
    again()
    other = _small_plan(small, "fp8")
    assert make(other, path) == 0
    assert PackFile.open(path).about["format"] == "fp8"


@pytest.mark.parametrize("operation", ["write", "fsync", "rename", "create"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_failing_operations_leave_something_to_continue(tmp_path, small, operation, code):
    plan = _small_plan(small)
    make(plan, tmp_path / "whole.safetensors")
    for at in (1, 2, 4):
        path = tmp_path / str(at) / "x.safetensors"
        ops = FaultyOps(operation, at, code)
        with pytest.raises(StorageError):
            make(plan, path, ops)
        assert ops.raised == 1
        assert not path.exists()
        make(plan, path)
        assert path.read_bytes() == (tmp_path / "whole.safetensors").read_bytes()


def test_a_file_whose_sync_failed_is_given_up(tmp_path, small):
    """What the system still shows of it may not be on the disk: nothing of it is reused."""
    plan, path = _small_plan(small), tmp_path / "x.safetensors"
    with pytest.raises(StorageError):
        make(
            plan, path, FaultyOps("fsync", 3)
        )  # the second run's; the first and its notes are done
    assert not (tmp_path / "x.safetensors.new").exists()
    assert make(plan, path) == 0


def test_space_is_checked_before_anything_is_written(tmp_path, model, packed):
    class Full(FileOps):
        def free_bytes(self, folder):
            return sum(path.stat().st_size for path in packed.rglob("*.safetensors")) - 1

    with pytest.raises(StorageError, match="no space"):
        pack(locate(model), "int8", tmp_path / "p", ops=Full())
    assert not (tmp_path / "p").exists()
    with pytest.raises(UsageError, match="too little memory"):
        pack(locate(model), "int8", tmp_path / "p", ram_bytes=1 << 20)
    with pytest.raises(UsageError, match="cannot be packed in this format"):
        pack(locate(model), "int3", tmp_path / "p")


def test_a_source_that_changes_is_noticed(tmp_path, small):
    copy = shutil.copytree(small, tmp_path / "t")
    plan = _small_plan(copy)
    file = copy / "diffusion_pytorch_model.safetensors"

    class Touching(InterceptedOps):
        def after(self, operation, arguments, result):
            if operation == "fsync":
                os.utime(file, ns=(1, 1))

    with pytest.raises(CheckpointChanged):
        make(plan, tmp_path / "x.safetensors", Touching())
    assert not (tmp_path / "x.safetensors").exists()


def test_a_finished_pack_is_left_alone(tmp_path, model):
    first = pack(locate(model), "nf4", tmp_path / "p")
    before = contents(tmp_path / "p")
    stamp = transformer_of(tmp_path / "p").stat().st_mtime_ns
    second = pack(locate(model), "nf4", tmp_path / "p")
    assert (first.reused_runs, second.reused_runs) == (0, 14)
    assert contents(tmp_path / "p") == before
    assert transformer_of(tmp_path / "p").stat().st_mtime_ns == stamp


def test_progress_reaches_the_whole(tmp_path, model):
    seen = []
    report = pack(locate(model), "int8", tmp_path / "p", progress=lambda *args: seen.append(args))
    assert [nbytes for _, nbytes, _ in seen] == sorted(nbytes for _, nbytes, _ in seen)
    assert seen[-1][1:] == (report.nbytes, report.nbytes)
    assert {name for name, _, _ in seen} == {"transformer", "vae", "text_encoder", "image_encoder"}


def test_a_flipped_bit_anywhere_is_found(tmp_path, packed):
    path = tmp_path / "x.safetensors"
    shutil.copy(transformer_of(packed), path)
    about = PackFile.open(path)
    size, header = path.stat().st_size, min(run.offset for run in about.runs.values())
    rng = random.Random(0)
    places = list(range(16)) + rng.sample(range(16, header), 250)
    places += rng.sample(range(about.sums_offset, size), 60)
    ends = [run.offset + run.nbytes for run in about.runs.values()]
    gaps = [at for end in ends for at in range(end, end + (-end % 4096))]
    places += rng.sample(gaps, 150) + rng.sample(range(header, size), 600)
    assert len(places) >= 1000
    missed = []
    with path.open("r+b") as file:
        for place in places:
            _flip(file, place, bit := 1 << rng.randrange(8))
            if not verify(path).damage:
                missed.append((place, bit))
            _flip(file, place, bit)
    assert missed == []
    assert verify(path).damage == ()


def _flip(file, place, bit):
    file.seek(place)
    byte = file.read(1)[0]
    file.seek(place)
    file.write(bytes([byte ^ bit]))
    file.flush()


@pytest.mark.parametrize("change", ["cut", "longer", "shifted"])
def test_wrong_sizes_are_found(tmp_path, packed, change):
    data = transformer_of(packed).read_bytes()
    path = tmp_path / "x.safetensors"
    changed = {"cut": data[:-1], "longer": data + b"\0", "shifted": data[:5000] + data[4999:]}
    path.write_bytes(changed[change])
    assert verify(path).damage


def test_verify_of_a_folder_names_the_damage(tmp_path, packed):
    copy = shutil.copytree(packed, tmp_path / "p")
    seen = []
    found = verify(copy, lambda done, total: seen.append((done, total)))
    assert (found.files, found.runs, found.damage) == (4, 14, ())
    assert seen[-1][0] <= seen[-1][1] == found.nbytes
    about = PackFile.open(transformer_of(copy))
    with transformer_of(copy).open("r+b") as file:
        _flip(file, about.runs["block 1"].offset + 77, 1)
        _flip(file, about.runs["cross 0"].offset, 1)
    assert verify(copy).damage == (
        (transformer_of(copy), "cross 0"), (transformer_of(copy), "block 1"),
    )  # fmt: skip
    with pytest.raises(CheckpointError, match="holds no pack"):
        verify(tmp_path / "p" / "tokenizer")
    save_file({"a": torch.zeros(3)}, tmp_path / "foreign.safetensors")
    assert verify(tmp_path / "foreign.safetensors").damage


def test_a_newer_pack_is_refused(tmp_path, small, monkeypatch):
    monkeypatch.setattr(packfile, "VERSION", 2)
    make(_small_plan(small), tmp_path / "x.safetensors")
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="another version"):
        PackFile.open(tmp_path / "x.safetensors")
