"""Jobs of pipelines that diffusers runs go on after a kill: the same bits, no weight of what is
answered."""

from __future__ import annotations

import errno
import json
import os
import shutil
import threading
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from penstock.engine.attach.calls import NotPlain, apart, asked, form_of, form_text, together
from penstock.engine.attach.keeping import RECORDS, Counted, Counter, Kept, Seen, kept_of
from penstock.engine.attach.recorded import CallKeeper, Recorder
from penstock.engine.run import fingerprint
from penstock.engine.run.jobs import describe, find_unfinished, remove_job
from penstock.engine.store.durable import FileOps
from penstock.engine.store.journal import HEADER_BYTES, Journal
from penstock.errors import (
    FingerprintMismatch,
    JobCancelled,
    JournalError,
    OverBudget,
    StorageError,
)
from tests.engine.attach.resuming import ROOM, WORDS, Task, equal, saved
from tests.versions import DIFFUSERS_0_36, TRANSFORMERS_4

pytestmark = [
    pytest.mark.skipif(TRANSFORMERS_4 or DIFFUSERS_0_36, reason="its parts are newer"),
    pytest.mark.skipif(not hasattr(os, "fork"), reason="children are forked"),
]


@pytest.fixture(scope="module")
def rehearsals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What was rehearsed by one test serves the others."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def cache(rehearsals: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache folder of all tests here."""
    monkeypatch.setenv("PENSTOCK_CACHE", str(rehearsals))
    return rehearsals


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Tasks by recipe and scheduler, each made once."""
    made: dict[tuple[str, str | None], tuple[Task, Any]] = {}

    def task(name: str, scheduler: str | None = None) -> tuple[Task, Any]:
        if (name, scheduler) not in made:
            folder = saved(name, tmp_path_factory.mktemp("model"), scheduler)
            one = Task(folder, WORDS[name])
            made[name, scheduler] = one, one.made()[0]
        return made[name, scheduler]

    yield task
    for one, _ in made.values():
        one.job.__exit__()


CASES = [
    ("LTX-2", None, (5,)),  # three calls a step
    ("Flux", None, (1,)),
    ("SDXL", "EulerAncestralDiscreteScheduler", (1,)),  # noise at every step
    ("Wan2.2 A14B", None, (3,)),  # two transformers, two calls a step
]
MORE = [
    ("SDXL", "HeunDiscreteScheduler", ()),  # two calls a step but the last
    ("SDXL", "PNDMScheduler", ()),  # one more than steps
]
"""Of `make faults`."""


@pytest.mark.parametrize(("name", "scheduler", "kills"), CASES)
def test_killed_and_gone_on_with(
    name: str, scheduler: str | None, kills: tuple[int, ...], tasks: Any, tmp_path: Path
) -> None:
    task, wanted = tasks(name, scheduler)
    kept = task.job.plan.kept
    for at in kills:
        folder = tmp_path / f"job-{at}"
        task.killed(folder, at)
        found = describe(folder)
        assert found.state == "killed" and found.unfinished
        assert found.step == found.steps * (at + 1) // kept.calls
        given, report = task.resumed(folder)
        assert equal(given, wanted)
        assert report.answered_calls == at + 1
        assert report.answered_calls + report.computed_calls == kept.calls
        if report.computed_calls == 0:
            assert all(task.reads[network] == 0 for network in kept.networks)
        assert describe(folder).state == "done"
        assert sorted(path.name for path in folder.iterdir()) == [
            "job-0.json",
            "job-1.json",
            "lock",
        ]
    assert not report.problems


def test_noise_that_no_generator_draws(
    tasks: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is a function of the seed as well, and drawn again; torch's own state stays."""
    task, plain = tasks("Flux")
    scheduler = task.job._opened.pipe.scheduler
    step = scheduler.step

    def noisy(*args: Any, **kwargs: Any) -> tuple[torch.Tensor]:
        made = step(*args, **kwargs)[0]
        return (made + torch.randn_like(made),)

    monkeypatch.setattr(scheduler, "step", noisy)
    before = torch.random.get_rng_state()
    wanted = task.made()[0]
    assert torch.equal(torch.random.get_rng_state(), before) and not equal(wanted, plain)
    task.killed(tmp_path / "job", 1)
    torch.rand(1)
    given, report = task.resumed(tmp_path / "job")
    assert equal(given, wanted) and report.answered_calls == 2


def test_a_job_stops_at_the_next_call(tasks: Any) -> None:
    """Whether its loop tells steps or not."""
    task, wanted = tasks("Flux")
    task.job.cancel()
    with pytest.raises(JobCancelled):
        task.made()
    assert set(task.reads.values()) == {0}
    task.job._stopped = threading.Event()
    assert equal(task.made()[0], wanted)


def test_only_what_is_computed_is_read(tasks: Any, tmp_path: Path) -> None:
    task, _ = tasks("Flux")
    _, plain = task.made()
    once = task.reads["transformer"]
    task.killed(tmp_path / "job", task.job.plan.kept.calls - 1)
    task.resumed(tmp_path / "job")
    assert once > 0 and task.reads["transformer"] == 0


def test_disk_is_what_the_records_take(tasks: Any, tmp_path: Path) -> None:
    task, _ = tasks("LTX-2")
    kept = task.job.plan.kept
    assert kept.calls == 6 and any(note.startswith("resumable: ") for note in task.job.plan.notes)
    task.killed(tmp_path / "job", kept.calls - 1)
    records = list((tmp_path / "job").glob("call-*"))
    assert len(records) == kept.calls
    held = sum(_tensor_bytes(path) for path in records)
    assert held == kept.disk_bytes - kept.calls * HEADER_BYTES
    assert sum(path.stat().st_size for path in records) <= kept.disk_bytes
    size = describe(tmp_path / "job").size_bytes
    remove_job(tmp_path / "job")
    assert size > held and not (tmp_path / "job").exists()


def _tensor_bytes(path: Path) -> int:
    blob = path.read_bytes()
    return len(blob) - 8 - int.from_bytes(blob[:8], "little")


def test_ram_for_a_record_is_planned_and_held(tasks: Any) -> None:
    task, _ = tasks("LTX-2")
    from penstock.engine.attach.foreign_job import CallJob
    from penstock.engine.attach.stream import budgets

    plan = task.job.plan
    blocks = plan.ram_bytes - plan.kept.ram_bytes
    assert blocks > 0
    with pytest.raises(OverBudget, match="RAM") as refused:
        CallJob(task.model, task.words, budgets("cpu", ROOM, plan.ram_bytes - 1))
    assert refused.value.need_bytes == plan.ram_bytes
    with CallJob(task.model, task.words, budgets("cpu", ROOM, plan.ram_bytes)) as job:
        assert job.plan.kept == plan.kept
    task.made()
    assert [held[RECORDS] for held in task.held] == [plan.kept.ram_bytes] * len(task.held) != []


def test_a_kill_while_a_record_is_written_costs_that_call(tasks: Any, tmp_path: Path) -> None:
    task, wanted = tasks("LTX-2")
    task.killed(tmp_path / "job", 3, settled=False)
    given, report = task.resumed(tmp_path / "job")
    assert equal(given, wanted) and report.answered_calls in (3, 4)


def test_a_damaged_record_is_computed_again(tasks: Any, tmp_path: Path) -> None:
    task, wanted = tasks("LTX-2")
    task.killed(tmp_path / "job", 4)
    record = tmp_path / "job" / "call-2.safetensors"
    blob = bytearray(record.read_bytes())
    blob[-3] ^= 1
    record.write_bytes(blob)
    given, report = task.resumed(tmp_path / "job")
    assert equal(given, wanted) and report.answered_calls == 4
    assert any("call-2.safetensors is computed again" in each for each in report.problems)


def test_another_library_or_other_weights_are_refused(
    tasks: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, wanted = tasks("Flux")
    task.killed(tmp_path / "job", 1)
    with monkeypatch.context() as other:
        other.setattr(fingerprint, "package_version", lambda name: "0.1")
        with pytest.raises(FingerprintMismatch, match=r"versions\.diffusers"):
            task.resumed(tmp_path / "job")
    changed = tmp_path / "model"
    shutil.copytree(task.model, changed)
    weights = changed / "transformer" / "diffusion_pytorch_model.safetensors"
    blob = bytearray(weights.read_bytes())
    blob[-1] ^= 1
    weights.write_bytes(blob)
    with pytest.raises(FingerprintMismatch, match="diffusion_pytorch_model") as refused:
        Task(changed, task.words).resumed(tmp_path / "job")
    assert "--allow-nonidentical" in str(refused.value) and str(weights) in str(refused.value)
    assert equal(task.resumed(tmp_path / "job")[0], wanted)


def test_a_call_that_is_asked_something_else_is_an_error(tasks: Any, tmp_path: Path) -> None:
    """Whatever makes it so: here another encoder, of which nothing else has told."""
    task, wanted = tasks("Flux")
    task.killed(tmp_path / "job", 1)
    other = Task(task.model, ["prompt=dog", *task.words[1:]])
    with pytest.raises(FingerprintMismatch, match=r"what call 0 \(transformer\) is asked"):
        other.resumed(tmp_path / "job")
    given, report = other.resumed(tmp_path / "job", trusts=True)
    assert report.answered_calls == 2 and not equal(given, wanted)
    assert "the result will not be identical: call 0" in report.problems[0]


def test_other_shapes_are_an_error_always(tasks: Any, tmp_path: Path) -> None:
    task, _ = tasks("Flux")
    task.killed(tmp_path / "job", 1)
    other = Task(task.model, [task.words[0], "height=16", *task.words[2:]])
    with pytest.raises(FingerprintMismatch, match="call 0"):
        other.resumed(tmp_path / "job", trusts=True)


def test_a_disk_that_fills_up(tasks: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The job stops and says so; with space it goes on."""
    task, wanted = tasks("LTX-2")
    create = FileOps.create

    def full(self: FileOps, path: Path) -> int:
        if path.name.startswith("call-2"):
            raise OSError(errno.ENOSPC, "No space left on device")
        return create(self, path)

    with monkeypatch.context() as disk:
        disk.setattr(FileOps, "create", full)
        with pytest.raises(StorageError, match=r"(?s)no space.*penstock resume"):
            task.made(task.begun(tmp_path / "job"))
    found = describe(tmp_path / "job")
    assert found.state == "failed" and found.unfinished
    given, report = task.resumed(tmp_path / "job")
    assert equal(given, wanted) and report.answered_calls == 2


def test_no_space_is_refused_before_anything(
    tasks: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, _ = tasks("LTX-2")
    free = task.job.plan.kept.disk_bytes - 1
    monkeypatch.setattr(FileOps, "free_bytes", lambda self, folder: free)
    with pytest.raises(StorageError, match="no space"):
        task.begun(tmp_path / "job")
    assert not (tmp_path / "job").exists()


def test_an_identical_job_is_known(tasks: Any, tmp_path: Path) -> None:
    task, _ = tasks("Flux")
    task.killed(tmp_path / "job", 0)
    same, other = task.job.call(None, None).values(), task.job.call(4, None).values()
    found = find_unfinished(same, tmp_path / "job")
    assert found is not None and found.folder == tmp_path / "job"
    assert find_unfinished(other, tmp_path / "job") is None
    assert find_unfinished(same | {"words": ["prompt=dog"]}, tmp_path / "job") is None


def test_what_is_asked_is_told_to_the_bit() -> None:
    x = torch.arange(6.0).reshape(2, 3)
    told = asked([x], {"scale": 1.0, "more": {"ids": x.int()[:1, :1], "none": None}})
    assert told == asked([x.T.contiguous().T], {"scale": 1.0, "more": {"ids": x.int()[:1, :1],
                                                                      "none": None}})  # fmt: skip
    near = x.clone()
    near[1, 2] = torch.nextafter(near[1, 2], torch.tensor(9.0))
    others = [
        asked([near], {"scale": 1.0, "more": {"ids": x.int()[:1, :1], "none": None}}),
        asked([x], {"scale": 1, "more": {"ids": x.int()[:1, :1], "none": None}}),
        asked([x], {"scale": 1.0, "more": {"ids": x.long()[:1, :1], "none": None}}),
        asked([x.reshape(3, 2)], {"scale": 1.0, "more": {"ids": x.int()[:1, :1], "none": None}}),
    ]
    assert told not in others
    assert asked([torch.tensor(2).expand(1)], {}) == asked([torch.tensor([2])], {})
    with pytest.raises(NotPlain, match="SimpleNamespace"):
        asked([x], {"cache": SimpleNamespace()})


def test_what_is_given_comes_together_as_it_lay() -> None:
    from diffusers import FluxTransformer2DModel
    from diffusers.models.modeling_outputs import Transformer2DModelOutput

    network = FluxTransformer2DModel(num_layers=1, num_single_layers=1, attention_head_dim=8,
                                     num_attention_heads=1, joint_attention_dim=8,
                                     pooled_projection_dim=8, axes_dims_rope=(2, 2, 4))  # fmt: skip
    x = torch.randn(2, 3, 4)
    out = Transformer2DModelOutput(sample=x.permute(2, 0, 1))
    given = apart(({"a": [out, x[:, :1], None]}, 2, x.bool()))
    form = form_of(form_text(given.form))
    made = together(form, given.copied(), network, torch.device("cpu"))
    sample = made[0]["a"][0].sample
    assert type(made[0]["a"][0]) is Transformer2DModelOutput
    assert torch.equal(sample, out.sample) and sample.stride() == out.sample.stride()
    assert torch.equal(made[0]["a"][1], x[:, :1]) and made[1] == 2
    with pytest.raises(NotPlain, match="SimpleNamespace"):
        apart((x, SimpleNamespace()))
    with pytest.raises(NotPlain, match="complex64"):
        apart(torch.zeros(1, dtype=torch.complex64))


@pytest.mark.parametrize(
    "form",
    [
        [], ["tensor"], ["tensor", True, [1, 1 << 40]], ["tensor", True, [-1, 1]],
        ["tuple", [["tensor", True, None], ["tensor", True, None]]], ["plain", 1],
        ["system", [["command", ["plain", "x"]]]], ["nn", []], ["plain", {"a": 1}], 7,
        ["Popen", [["args", ["tensor", True, None]]]],
        ["FluxTransformer2DModel", [["num_layers", ["plain", 1]]]],
    ],
)  # fmt: skip
def test_hostile_forms_are_refused(form: Any) -> None:
    network = nn.Linear(1, 1)
    with pytest.raises(JournalError, match="not what a call gave"):
        together(form, {"0": torch.zeros(2, 3)}, network, torch.device("cpu"))


def test_nesting_has_an_end() -> None:
    form: Any = ["tensor", True, None]
    for _ in range(100):
        form = ["list", [form]]
    with pytest.raises(JournalError, match="too deep"):
        together(form, {"0": torch.zeros(1)}, nn.Linear(1, 1), torch.device("cpu"))


class _Loop:
    """Counted as a pipeline is that calls ``network`` two times a turn, and once outside."""

    def __init__(self, network: nn.Module, *more: Any) -> None:
        counter = Counter()
        with counter.watched({"net": network}), torch.no_grad():
            network(torch.zeros(1, 4))
            bar = counter.bar(2)
            for _ in range(2):
                network(torch.zeros(3, 4), *more)
                network(torch.zeros(3, 4))
                bar.update()
            bar.close()
        self.counted = counter.counted


class _Taking(nn.Module):
    def forward(self, x: torch.Tensor, cache: Any = None) -> torch.Tensor:
        return x[:, :2]


class _Outer(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.calls = inner, 0

    def forward(self, x: torch.Tensor, cache: Any = None) -> torch.Tensor:
        self.calls += 1
        return 2 * self.inner(x)


def test_a_network_in_another_is_kept_with_it(tmp_path: Path) -> None:
    """And a call that cannot be told is computed again, and said."""
    inner = _Taking()
    outer, x = _Outer(inner), torch.arange(8.0).reshape(2, 4)
    journal = Journal.create(tmp_path / "job", {}, {}, {})
    keeper = CallKeeper(journal)
    with closing(keeper), torch.no_grad():
        for answered in (0, 2):
            recorder = Recorder({"outer": outer, "inner": inner}, keeper, torch.device("cpu"))
            with recorder.watched():
                made = outer(x), outer(x, SimpleNamespace()), inner(x)
            assert torch.equal(made[0], 2 * x[:, :2]) and torch.equal(made[2], x[:, :2])
            assert (recorder.answered, recorder.computed) == (answered, 3 - answered)
            why = "call 1 of outer is not kept: it is given a SimpleNamespace"
            assert recorder.problems == [why]
    assert outer.calls == 3 and "forward" not in vars(outer)
    names = sorted(path.name for path in (tmp_path / "job").glob("call-*"))
    assert names == ["call-0.safetensors", "call-2.safetensors"]


def test_what_cannot_be_kept_is_said() -> None:
    seen = _Loop(_Taking()).counted
    assert seen.bars == (2,) and seen.networks == {"net": Seen(5, 4, 104, 24, 48)}
    assert Counted.from_json(json.loads(json.dumps(seen.to_json()))) == seen
    kept = kept_of(seen, 2, 40, 1, ["net"])
    assert isinstance(kept, Kept) and kept.networks == ("net",) and kept.calls == 100
    held = _Loop(_Taking(), SimpleNamespace()).counted
    why = kept_of(held, 2, 40, 1, ["net"])
    assert why == "net is given a SimpleNamespace, which may hold a state of its own"
    assert kept_of(Counted((), {"other": Seen(2)}), 2, 40, 1, ["net"]) == (
        "it calls no network step by step"
    )


def test_turns_of_schedulers() -> None:
    """Heun's makes two turns a step but one, PNDM's one more than steps; a part of the steps
    (image to image) makes fewer, two loops twice as many. Where the scheduler tells nothing, bars
    do."""
    for timesteps, bars, calls, order, steps, whole in (
        (3, (2,), 3, 2, 50, 99), (3, (2,), 3, 1, 50, 51), (2, (1,), 1, 1, 50, 25),
        (2, (2, 2), 4, 1, 50, 100), (2, (2,), 6, 1, 50, 150), (2, (2,), 2, 1, 2, 2),
        (1000, (3,), 3, 2, 50, 99), (0, (2, 2), 4, 1, 50, 100), (0, (), 3, 1, 4, 6),
    ):  # fmt: skip
        counted = Counted(bars, {"net": Seen(calls, calls, 10 * calls, 10, 0)}, timesteps)
        kept = kept_of(counted, 2, steps, order, ["net"])
        assert isinstance(kept, Kept) and kept.calls == whole
        assert kept.disk_bytes == whole * (10 + HEADER_BYTES)
