"""A setting of a request is declared once; every door takes it by its name."""

from __future__ import annotations

import inspect
from dataclasses import fields

from penstock.cli.main import generate, plan
from penstock.engine.request.settings import Settings
from penstock.serve.fields import PlanFields, read_fields

NAMES = {each.name for each in fields(Settings)}
FLAGS = {
    "guidance_scale": "cfg", "guidance_high": "cfg", "nag_scale": "nag", "after": "continues",
    "negative_prompt": "negative",
}  # fmt: skip
"""Of settings, where it is not their name; ``--cfg`` says both scales."""

DIALECT = {
    "frames": "num_frames", "steps": "num_inference_steps", "shift": "flow_shift",
    "guidance_high": "guidance_scale_2",
}  # fmt: skip
FILES = {"image", "last_image", "after"}


def test_every_setting_has_a_flag() -> None:
    assert {FLAGS.get(name, name) for name in NAMES} <= inspect.signature(
        generate
    ).parameters.keys()


def test_what_a_plan_depends_on_is_a_flag_of_plan() -> None:
    made = {"prompt", "negative_prompt", "after", "last_image", "seed", "fps", "fit", "clip_crop"}
    wanted = {FLAGS.get(name, name) for name in NAMES - made}
    assert wanted <= inspect.signature(plan).parameters.keys()


def test_every_setting_is_a_field_of_the_server() -> None:
    wanted = {DIALECT.get(name, name) for name in NAMES - FILES}
    assert wanted - PlanFields.model_fields.keys() == {"max_area", "clip_crop"}


def test_the_servers_fields_reach_the_settings_of_their_name() -> None:
    said = {"cfg_interval": "0.3,0.9", "nag_scale": 3.0, "window": 33, "overlap": 16, "seed": 7,
            "sampler": "lcm", "fit": "pad", "negative_prompt": "n", "prompt": "p"}  # fmt: skip
    dialect = {"num_frames": 5, "num_inference_steps": 3, "flow_shift": 2.0, "fps": 12.0,
               "guidance_scale": 4.0, "guidance_scale_2": 3.0, "distilled": True,
               "width": 64, "height": 32}  # fmt: skip
    wanted = {"frames": 5, "steps": 3, "shift": 2.0, "fps": 12, "guidance_scale": 3.0,
              "guidance_high": 4.0, "distilled": True, "size": "64x32"}  # fmt: skip
    assert read_fields(PlanFields, said | dialect).settings == said | wanted
