"""Every value of every config has a type and a range, and what is sound passes."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from penstock.engine.families.wan import config as configs
from penstock.engine.families.wan.fields import COMPONENTS, check_config
from penstock.engine.files import side_fields
from penstock.engine.files.fields import (
    MAX_CONFIG_BYTES,
    Field,
    check_fields,
    parse_object,
    read_object,
)
from penstock.engine.request.demo import MINI
from penstock.errors import CheckpointError

TABLES: dict[str, Mapping[str, Field]] = {
    **COMPONENTS,
    "scheduler": side_fields.SCHEDULER,
    "image_processor": side_fields.IMAGE_PROCESSOR,
    "defaults": side_fields.DEFAULTS,
    "model_index": side_fields.MODEL_INDEX,
}
ENTRIES = [(name, entry) for name, table in TABLES.items() for entry in table]
WRONG: list[Any] = [
    10**30, -(10**30), float("nan"), [[[]]], {"a": {"b": 1}}, "x" * 5000, ["x"] * 5000, [10**9] * 9,
]  # fmt: skip


@pytest.mark.parametrize(("name", "entry"), ENTRIES)
def test_every_entry_refuses_what_it_cannot_be(name: str, entry: str) -> None:
    for value in WRONG:
        with pytest.raises(CheckpointError, match=f"{entry}' as") as caught:
            check_fields({entry: value}, TABLES[name], "the file x")
        assert len(str(caught.value)) < 600
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("name", "entry"), ENTRIES)
def test_booleans_and_numbers_are_told_apart(name: str, entry: str) -> None:
    """An entry takes at most one of the two."""
    field = TABLES[name][entry]
    assert not (field.fits(True) and field.fits(1))


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder", "image_encoder"])
def test_the_configs_that_there_are_pass(part: str) -> None:
    config = json.loads((MINI / part / "config.json").read_text())
    check_config(part, "mini", {k: v for k, v in config.items() if not k.startswith("_")})
    defaults = {
        "transformer": configs.TRANSFORMER | {"in_channels": 36, "image_dim": 1280},
        "vae": configs.VAE,
        "text_encoder": configs.TEXT,
        "image_encoder": configs.IMAGE,
    }
    check_config(part, "the class", dict(defaults[part]))


@pytest.mark.parametrize("name", ["scheduler/scheduler_config.json", "defaults.json",
                                  "image_processor/preprocessor_config.json"])  # fmt: skip
def test_the_side_files_that_there_are_pass(name: str) -> None:
    part = Path(name).parts[0].removesuffix(".json")
    check_fields(read_object(MINI / name), TABLES[part], name)


def test_diffusers_own_schedulers_pass() -> None:
    """Also as JSON: one of them writes minus infinity."""
    from diffusers import (
        DPMSolverMultistepScheduler,
        FlowMatchEulerDiscreteScheduler,
        UniPCMultistepScheduler,
    )

    for made in (
        DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler,
    ):  # fmt: skip
        config = parse_object(made().to_json_string(), "x")
        check_fields(config, side_fields.SCHEDULER, made.__name__)


@pytest.mark.parametrize(
    ("part", "changes", "told"),
    [
        ("image_encoder", {"num_attention_heads": 7}, "multiple of 7 heads"),
        ("image_encoder", {"image_size": 16, "patch_size": 32}, "one patch or more"),
        ("text_encoder", {"relative_attention_max_distance": 8}, "buckets can tell"),
        ("vae", {"temperal_downsample": [True]}, "3 entries of temperal_downsample"),
        ("vae", {"latents_mean": [0.0] * 15}, "16 entries of latents_mean"),
        ("vae", {"z_dim": 8}, "8 entries of latents_mean"),
        ("transformer", {"in_channels": 17}, "not a transformer of Wan that penstock runs"),
        ("transformer", {"attention_head_dim": 7}, "even number"),
        ("transformer", {"num_layers": 10_000_000}, "num_layers' as a whole number from 1 to 256"),
        ("transformer", {"num_layers": "40"}, "num_layers"),
        ("transformer", {"num_layers": 40.0}, "num_layers"),
        ("transformer", {"ffn_dim": True}, "ffn_dim"),
        ("scheduler", {"num_train_timesteps": 10**9}, "from 2 to 100,000"),
        ("image_processor", {"size": {"shortest_edge": 10**9}}, "size"),
    ],
)
def test_what_does_not_go_together_is_refused(
    part: str, changes: dict[str, Any], told: str
) -> None:
    with pytest.raises(CheckpointError, match=told):
        if part in COMPONENTS:
            check_config(part, "x", changes)
        else:
            check_fields(changes, TABLES[part], "x")


def test_entries_that_nobody_reads_are_plain_at_least() -> None:
    check_fields({"architectures": ["UMT5EncoderModel"], "torch_dtype": "bfloat16"}, {}, "x")
    for odd in (1 << 60, "x" * 5000, list(range(5000)), {"a": [10**30]}):
        with pytest.raises(CheckpointError, match="plain value"):
            check_fields({"anything": odd}, {}, "x")


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "5", "", "{", '"x"', "nul"])
def test_what_is_no_object_is_one_line(text: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(CheckpointError, match="a JSON object"):
        read_object(path)


def test_long_numbers_are_not_read_digit_by_digit() -> None:
    assert parse_object('{"a": ' + "9" * 100_000 + "}", "x") == {"a": math.inf}
    assert parse_object('{"a": -40}', "x") == {"a": -40}


def test_a_config_is_not_that_long(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(" " * MAX_CONFIG_BYTES + "{}")
    with pytest.raises(CheckpointError, match="bytes"):
        read_object(path)
