"""The options of a run as one value: legal when made, merged by name, and plain when stored."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from penstock.errors import ProfileError, UsageError
from penstock.profiles.hardware import Hardware
from penstock.profiles.options import Options
from penstock.profiles.plan import NUMERICS, Plan
from penstock.profiles.policy import Policy
from penstock.profiles.profile import choose, load
from penstock.profiles.rates import Rates
from penstock.units import GIB

MACHINE = Hardware("cuda", "a card", 20 * GIB, 30 * GIB, Rates(1e12, 1e10, 1e9))

ALL = Options(
    vram="9GiB", ram=8 * GIB, device="cpu", profile="12gb", format="int8", compute="fast",
    attention="int8", residual="fp32", branches="1", chunk_tokens=64, tiles="2x3", cross_kv="vram",
    disk="never", pinned_share=0.5, step_cache="plan:20",
)  # fmt: skip
"""Every option says something."""


def test_every_rule_of_the_planner_is_an_option() -> None:
    assert {each.name for each in fields(Policy)} <= {each.name for each in fields(Options)}
    assert set(ALL.given) == {each.name for each in fields(Options)}
    assert choose(load("12gb"), ALL, MACHINE).policy == Policy(
        branches=1, chunk_tokens=64, tiles=(2, 3), cross_kv="vram", compute="fast", disk="never",
        attention="int8", residual="fp32", step_cache="plan:20",
    )  # fmt: skip


def test_what_determines_a_result_is_told_by_a_plan() -> None:
    numerics = NUMERICS.keys() - {"weight_format"}
    assert numerics <= {each.name for each in fields(Options)}
    bare = Plan((), 1, 1)
    assert bare.numerics == {"weight_format": "bf16"} | {n: NUMERICS[n] for n in numerics}


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"vram": "much"}, "not a size in bytes"),
        ({"ram": 0}, "size out of range: expected 1 byte to"),
        ({"device": "tpu"}, "unknown device: expected auto, cuda or cpu, found 'tpu'"),
        ({"profile": 12}, "illegal profile: expected a name, found 12"),
        ({"format": ["int8"]}, "illegal format"),
        ({"compute": "quick"}, "illegal compute: expected exact or fast"),
        ({"attention": "fp4"}, "illegal attention: expected sdpa or int8"),
        ({"branches": 3}, "illegal branches: expected 1, 2 or auto"),
        ({"chunk_tokens": "many"}, "illegal chunk_tokens: expected a whole number or auto"),
        ({"chunk_tokens": 0}, "illegal chunk_tokens: expected 1 or more, or auto"),
        ({"tiles": "big"}, "illegal tiles: expected ROWSxCOLUMNS"),
        ({"cross_kv": "disk"}, "illegal cross_kv: expected auto, vram or ram"),
        ({"disk": "no"}, "illegal disk: expected auto, spare or never"),
        ({"pinned_share": "all"}, "illegal pinned_share: expected a share of RAM, above 0 and up"),
        ({"pinned_share": 0}, "illegal pinned_share"),
        ({"pinned_share": "1.01"}, "illegal pinned_share"),
        ({"pinned_share": "nan"}, "illegal pinned_share"),
    ],
)
def test_an_illegal_value_dies_where_it_is_made(given: dict[str, Any], told: str) -> None:
    with pytest.raises(UsageError) as refused:
        Options(**given)
    assert told in str(refused.value)


def test_what_is_given_goes_over_what_was() -> None:
    assert Options(vram="1GiB", tiles="auto").over(ALL) == replace(ALL, vram="1GiB", tiles="auto")
    assert ALL.over(Options(vram="1GiB")) == ALL
    assert Options().over(ALL) == ALL


def test_options_by_their_names_are_the_same() -> None:
    assert Options().named({"vram": "12GiB", "ram": None}) == Options(vram="12GiB")
    rules = Options(chunk_tokens="16")
    assert rules.named({"device": "cpu"}) == Options(chunk_tokens="16", device="cpu")
    assert rules.named({"chunk_tokens": None}) == rules


def test_two_answers_and_unknown_names_are_refused() -> None:
    with pytest.raises(UsageError, match="given twice: ram, vram"):
        Options(vram="1GiB", ram="1GiB").named({"vram": "2GiB", "ram": "1GiB", "device": "cpu"})
    with pytest.raises(UsageError, match="no such option: expected vram, .*found vrams"):
        Options().named({"vrams": "2GiB"})
    with pytest.raises(ProfileError, match="illegal tiles"):
        Options().named({"tiles": "2"})


def test_they_are_stored_and_read_as_plain_values() -> None:
    for options in (ALL, Options()):
        assert Options.from_json(json.loads(json.dumps(options.to_json()))) == options
    assert Options.from_json({}) == Options()
    assert Options.from_json({"vram": 5}) == Options(vram=5)
    with pytest.raises(TypeError):
        Options.from_json({"from tomorrow": 1})


def test_a_plan_carries_them_whole_and_those_before_had_none() -> None:
    plan = Plan((), 1, 2, options=ALL)
    stored = json.loads(json.dumps({"phases": [], "origins": [], **_bare_json(plan)}))
    assert stored["options"] == ALL.to_json()
    assert Plan.from_json(stored) == plan
    del stored["options"]
    assert Plan.from_json(stored) == replace(plan, options=Options())


def _bare_json(plan: Plan) -> dict[str, Any]:
    """Of a plan without phases, which has no peaks."""
    names = [each.name for each in fields(plan) if each.name not in ("phases", "origins")]
    return {name: getattr(plan, name) for name in names} | {"options": plan.options.to_json()}


def test_what_is_chosen_means_the_same_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.toml").write_text('vram = "10GiB"')
    monkeypatch.chdir(tmp_path)
    asked = Options(profile="mine.toml", device="auto", branches="2")
    found = choose(load("mine.toml"), asked, MACHINE).options
    whole = str(tmp_path / "mine.toml")
    assert found == replace(asked, profile=whole, device="cuda")
    named = choose(load("12gb"), Options(profile="12gb"), MACHINE).options
    assert named == Options(profile="12gb", device="cuda")
