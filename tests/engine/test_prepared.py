"""The one door to a plan: files or a description, this machine or another, a request or a shape."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from penstock.engine.bench import order as bench
from penstock.engine.engine import Engine
from penstock.engine.prepared import Prepared, machine_of
from penstock.engine.request.generation import GenerationRequest, workload_of
from penstock.engine.request.settings import Settings, resolve
from penstock.errors import RequestError, UsageError
from penstock.profiles.options import Options
from tests.engine.running import REQUEST, a_request

TRUE = "wan2.1-i2v-14b"


def test_a_request_and_its_shape_have_one_plan(t2v_folder: Path, picture: Path) -> None:
    options = Options(vram="200MiB", ram="200MiB", device="cpu", tiles="2x2")
    prepared = Prepared.open(t2v_folder, options=options)
    found = prepared.plan(REQUEST, saved=True)
    assert prepared.plan(workload_of(REQUEST, saved=True)) == found
    assert found.options == options and found["decode"].tiles == (2, 2)
    with Engine(prepared) as engine:
        assert engine.plan(REQUEST, saved=True) == found
        assert engine.plan_workload(workload_of(REQUEST, saved=True)) == found
    with pytest.raises(RequestError, match="text-to-video"):
        prepared.plan(a_request(image=picture))


def test_an_engine_fills_the_gaps_of_a_request_with_its_models_defaults(
    t2v_folder: Path, picture: Path, tmp_path: Path
) -> None:
    with Engine.open(t2v_folder, vram="200MiB", ram="200MiB", device="cpu") as engine:
        request = engine.request("a plan", steps=7)
        assert request == resolve(Settings("a plan", steps=7), engine.model)
        # a narrow model of text alone, which 1.3B is for the defaults, unlike those of I2V
        assert (request.steps, request.shift) == (7, 5.0)
        assert engine.request("a plan").steps == 50 != GenerationRequest("a plan").steps
        sized = engine.request("a plan", size="64x48", frames=5)
        assert (sized.width, sized.height, sized.frames) == (64, 48, 5)
        with pytest.raises(UsageError, match="no such setting of a request") as failed:
            engine.request("a plan", vram="12GiB")
        assert failed.value.found == "vram" and "Engine.open" in str(failed.value)
    defaults = {"width": 32, "height": 32, "frames": 5, "steps": 2}
    own = tmp_path / "own"
    shutil.copytree(t2v_folder, own)
    (own / "defaults.json").write_text(json.dumps(defaults))
    with Engine.open(own, vram="200MiB", ram="200MiB", device="cpu") as engine:
        assert vars(engine.request("a plan")).items() >= defaults.items()


def test_a_description_stands_in_for_a_models_defaults_and_sizes(picture: Path) -> None:
    options, machine = machine_of(Options(ram="64GiB"), "RTX 4090 24GB", "nvme4")
    assert machine is not None and options == Options()
    prepared = Prepared.open(synthetic=TRUE, options=options, machine=machine)
    assert prepared.hardware.name == "RTX 4090 24GB" == prepared.plan(REQUEST).machine
    request = resolve(Settings(prompt="a plan"), prepared.about)
    assert (request.width, request.height, request.frames, request.steps) == (1280, 720, 81, 40)
    tall = resolve(Settings(prompt="a plan", image=picture), prepared.about)
    assert (tall.width, tall.height) == (1040, 864)  # the picture's 96x80 in the area of 720p
    with pytest.raises(UsageError, match=f"the built-in {TRUE} has no weights"):
        Engine(prepared)


def test_a_description_is_planned_for_another_machine_as_files_are() -> None:
    named = Options(profile="12gb", format="int8", compute="fast", attention="int8")
    options, machine = machine_of(named, "RTX 4090 24GB", None)
    found = Prepared.open(synthetic=TRUE, options=options, machine=machine).plan(REQUEST)
    assert (found.weight_format, found.compute_path, found.attention) == ("int8", "int8", "int8")
    assert found.options == replace(named, device="cuda")


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({}, "found neither"),
        ({"model": "m", "synthetic": TRUE}, "found both"),
        ({"synthetic": TRUE, "loras": ["x.safetensors"]}, "a LoRA can only be checked against"),
        ({"synthetic": TRUE, "vrams": "1GiB"}, "no such option"),
    ],
)
def test_what_opens_nothing_is_refused(given: dict[str, str], told: str) -> None:
    with pytest.raises(UsageError, match=told):
        Prepared.open(**given)


def test_a_disk_without_a_card_describes_no_machine() -> None:
    with pytest.raises(UsageError, match="--card as well"):
        machine_of(Options(), None, "sata")
    assert machine_of(Options(ram="1GiB"), None, None) == (Options(ram="1GiB"), None)


def test_a_benchmark_predicts_by_the_same_door() -> None:
    def seconds(**named: str) -> float:
        order = bench.BenchOrder(
            synthetic=TRUE, frames=5, steps=2, warmup=1, options=Options(device="cpu", **named)
        )
        return bench._predicted_s(order, "int8")

    order = bench.BenchOrder(synthetic=TRUE, frames=5, steps=2, warmup=1)
    prepared = Prepared.open(synthetic=TRUE, device="cpu", vram=1 << 50, ram=1 << 50, format="int8")
    request = order.request(prepared.about.official)
    assert seconds() == prepared.plan(workload_of(request))["denoise"].seconds > 0
    assert seconds(chunk_tokens="16") > seconds(), "by the options of the order"
