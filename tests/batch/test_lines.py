"""Lists of requests: what a line may say, and what is said of one that is none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from penstock.batch.lines import BadLine, Line, read_lines
from penstock.errors import UsageError


def read(tmp_path: Path, *given: Any, **more: Any) -> tuple[list[Line], list[BadLine]]:
    path = tmp_path / "list.jsonl"
    lines = [each if isinstance(each, str) else json.dumps(each) for each in given]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return read_lines(path, "model", **more)


def test_flags_and_the_servers_fields_say_the_same(tmp_path: Path) -> None:
    flags = {
        "prompt": "p", "negative": "n", "frames": 5, "steps": 3, "cfg": 4.0, "shift": 2.0,
        "size": "64x32", "max-area": None, "nag": 3.0, "last-image": "b.png", "image": "a.png",
    }  # fmt: skip
    clients = {
        "prompt": "p", "negative_prompt": "n", "num_frames": 5, "num_inference_steps": 3,
        "guidance_scale": 4.0, "flow_shift": 2.0, "width": 64, "height": 32, "nag_scale": 3.0,
        "last_image": "b.png", "input_reference": "a.png",
    }  # fmt: skip
    (one, other), bad = read(tmp_path, flags | {"seed": 1}, clients | {"seed": 1})
    assert not bad and one.settings == other.settings
    assert one.settings.image == tmp_path / "a.png", "paths count from the list's folder"
    assert (one.name, other.name, one.number) == ("0001", "0002", 1)


def test_two_scales_are_for_much_noise_and_for_little(tmp_path: Path) -> None:
    (one,), _ = read(tmp_path, {"prompt": "p", "guidance_scale": 4, "guidance_scale_2": 3})
    assert (one.settings.guidance_high, one.settings.guidance_scale) == (4, 3)


def test_an_open_seed_is_the_same_at_every_start_and_another_for_every_line(tmp_path: Path) -> None:
    first, _ = read(tmp_path, {"prompt": "p"}, {"prompt": "p", "seed": -1}, {"prompt": "q"})
    again, _ = read(tmp_path, {"prompt": "p"}, {"prompt": "p", "seed": -1}, {"prompt": "q"})
    assert first == again
    assert len({line.settings.seed for line in first}) == 3
    assert len({line.digest for line in first}) == 3


def test_loras_and_models_of_a_line_win(tmp_path: Path) -> None:
    (tmp_path / "style.safetensors").touch()
    (one, other), _ = read(
        tmp_path,
        {"prompt": "p"},
        {"prompt": "p", "model": "m", "lora": ["style.safetensors:0.5@high", "known-by-name"]},
        loras=("all.safetensors",),
    )
    assert (one.model, one.loras) == ("model", ("all.safetensors",))
    found = (f"{tmp_path / 'style.safetensors'}:0.5@high", "known-by-name")
    assert (other.model, other.loras) == ("m", found)


@pytest.mark.parametrize(
    "line, told",
    [
        ("{", "not valid JSON"),
        ('{"prompt": "p", "steps": NaN}', "is not a JSON number"),
        ("[1]", "not a request"),
        ({"prompt": "p", "stepz": 3}, "'stepz'"),
        ({"prompt": "p", "steps": True}, "illegal steps"),
        ({"prompt": "p", "steps": "3"}, "illegal steps"),
        ({"prompt": 3}, "illegal prompt"),
        ({"prompt": "p", "cfg_interval": 0.3}, "illegal cfg_interval: expected str"),
        ({"prompt": "p", "image": 1}, "illegal image: expected str"),
        ({"prompt": "p", "shift": "5"}, "illegal shift: expected int or float, found"),
        ({"prompt": "p", "distilled": 1}, "illegal distilled: expected bool"),
        ({"steps": 3}, "the prompt is missing"),
        ({"prompt": "p", "cfg": 4, "guidance_scale": 4}, "given twice"),
        ({"prompt": "p", "width": 64}, "the size is incomplete or given twice"),
        (
            {"prompt": "p", "width": 64, "height": 64, "size": "64x64"},
            "the size is incomplete or given twice",
        ),
        ({"prompt": "p", "id": "../a"}, "cannot name a file"),
        ({"prompt": "p", "id": "a", "custom_id": "a"}, "given twice"),
        ({"prompt": "p", "id": "first"}, "first in line 1"),
        ({"prompt": "p", "id": "FIRST"}, "FIRST in line 1"),
        ({"prompt": "p", "lora": [1]}, "not a LoRA"),
        ("[" * 100_000, "not valid JSON"),
    ],
)
def test_a_bad_line_is_named_by_its_number(tmp_path: Path, line: Any, told: str) -> None:
    good, (bad,) = read(tmp_path, {"prompt": "p", "id": "first"}, "", line)
    assert [each.number for each in good] == [1]
    assert str(bad).startswith("line 3: ") and told in str(bad)


def test_a_list_without_lines_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="empty"):
        read(tmp_path, "", " ")


def test_a_line_must_have_a_model(tmp_path: Path) -> None:
    path = tmp_path / "list.jsonl"
    path.write_text('{"prompt": "p"}')
    _, (bad,) = read_lines(path, None)
    assert "names no model" in str(bad)
