"""Profiles: shipped, a user's own, precedence, and where each value comes from."""

from __future__ import annotations

from pathlib import Path

import pytest

from penstock.errors import ProfileError, UsageError
from penstock.profiles.hardware import Hardware
from penstock.profiles.options import Options
from penstock.profiles.policy import Policy
from penstock.profiles.profile import (
    AUTO,
    SHIPPED,
    Profile,
    choose,
    load,
    names,
    parse,
    with_torchs_attention,
)
from penstock.profiles.rates import Rates
from penstock.units import GIB

MACHINE = Hardware("cuda", "a card", 20 * GIB, 30 * GIB, Rates(1e12, 1e10, 1e9))


def origins(chosen) -> dict[str, tuple[str, str]]:
    return {origin.name: (origin.value, origin.source) for origin in chosen.origins}


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_profiles_stay_under_the_cards_they_are_named_for(name: str) -> None:
    profile = load(name)
    assert profile.name == name and profile.summary
    if name != "max":
        assert profile.vram_bytes is not None
        assert 0.8 < profile.vram_bytes / (int(name[:-2]) * GIB) < 0.95
    assert profile.policy.disk == "spare"


def test_flag_over_profile_over_machine_over_default() -> None:
    flags = Options(vram="9GiB", compute="fast", tiles="2x3", branches="1", chunk_tokens="auto")
    chosen = choose(load("12gb"), flags, MACHINE)
    assert chosen.hardware.vram_bytes == 9 * GIB
    assert chosen.hardware.ram_bytes == 30 * GIB
    assert chosen.pinned_bytes == int(0.75 * 30 * GIB)
    assert chosen.policy == Policy(branches=1, tiles=(2, 3), compute="fast", disk="spare")
    assert origins(chosen) == {
        "vram": ("9.00 GiB", "flag"),
        "ram": ("30.00 GiB", "free on a card, less a reserve"),
        "pinned": ("22.50 GiB", "profile 12gb"),
        "format": ("int8, nf4", "profile 12gb"),
        "branches": ("1", "flag"),
        "chunk_tokens": ("auto", "flag"),
        "tiles": ("2x3", "flag"),
        "cross_kv": ("auto", "default"),
        "compute": ("fast", "flag"),
        "disk": ("spare", "profile 12gb"),
        "attention": ("sdpa", "default"),
        "residual": ("auto", "default"),
        "step_cache": ("off", "default"),
        "rates": ("a card", "assumed"),
    }


def test_a_profiles_ceiling_counts_where_that_much_is_free() -> None:
    small = choose(load("24gb"), Options(), MACHINE)
    assert small.hardware.vram_bytes == 20 * GIB
    assert origins(small)["vram"][1].startswith("free on")
    roomy = choose(load("12gb"), Options(format="nf4"), MACHINE)
    assert roomy.hardware.vram_bytes == 11 * GIB
    assert origins(roomy)["vram"][1] == "profile 12gb"
    assert roomy.formats == ("nf4",) and origins(roomy)["format"][1] == "flag"


def test_an_option_wins_over_the_profiles_share_of_pinned_memory() -> None:
    chosen = choose(load("12gb"), Options(pinned_share="0.5"), MACHINE)
    assert chosen.pinned_bytes == 15 * GIB
    assert origins(chosen)["pinned"] == ("15.00 GiB", "flag")
    assert choose(load("12gb"), Options(pinned_share=1), MACHINE).pinned_bytes == 30 * GIB


def test_auto_is_what_is_free() -> None:
    chosen = choose(load(AUTO), Options(ram=3 * GIB), MACHINE)
    assert (chosen.hardware.vram_bytes, chosen.hardware.ram_bytes) == (20 * GIB, 3 * GIB)


def test_a_users_own_profiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PENSTOCK_CONFIG", str(tmp_path))
    folder = tmp_path / "profiles"
    folder.mkdir()
    (folder / "mine.toml").write_text('vram = "10GiB"\nram = "20GiB"\nchunk_tokens = 512\n')
    (folder / "8gb.toml").write_text('vram = "7GiB"\ntiles = "2x2"\n')
    assert names() == (AUTO, *SHIPPED, "mine")
    mine = load("mine")
    assert mine.ram_bytes == 20 * GIB and mine.policy.chunk_tokens == 512
    assert mine.path == folder / "mine.toml"
    assert load("8gb").vram_bytes == 7 * GIB
    assert load(str(folder / "8gb.toml")).policy.tiles == (2, 2)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("vram = ", "is not a profile"),
        ('vram = "much"', "not a size in bytes"),
        ('speed = "high"', "unknown keys"),
        ('chunk_tokens = "many"', "chunk_tokens"),
        ("branches = true", "branches"),
        ("branches = 3", "branches"),
        ("chunk_tokens = 0", "chunk_tokens"),
        ('tiles = "0x2"', "tiles"),
        ('tiles = "big"', "ROWSxCOLUMNS"),
        ('cross_kv = "disk"', "cross_kv"),
        ('compute = "quick"', "compute"),
        ('disk = "no"', "disk"),
        ("pinned_share = 2.0", "pinned_share"),
        ('pinned_share = "all"', "pinned_share"),
        ('formats = ["int3"]', "int3"),
    ],
)
def test_what_is_no_profile_is_named(text: str, told: str) -> None:
    with pytest.raises(ProfileError, match=r"mine\.toml is not a profile") as refused:
        parse("mine", text, Path("mine.toml"))
    assert told in str(refused.value)


def test_a_profile_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match="no such profile") as refused:
        load("13gb", tmp_path)
    assert "12gb" in str(refused.value)
    with pytest.raises(ProfileError, match="cannot be read"):
        load(str(tmp_path / "none.toml"))


def test_words_of_flags_are_checked_too() -> None:
    with pytest.raises(ProfileError):
        choose(Profile("p", ""), Options(compute="slow"), MACHINE)
    with pytest.raises(ProfileError, match="illegal attention: expected sdpa or int8"):
        choose(Profile("p", ""), Options(attention="fp4"), MACHINE)
    with pytest.raises(UsageError):
        choose(Profile("p", ""), Options(vram="-1"), MACHINE)


def test_a_profile_may_ask_for_attention_in_8_bits_and_a_flag_takes_it_back() -> None:
    asked = parse("mine", 'attention = "int8"', Path("mine.toml"))
    chosen = choose(asked, Options(), MACHINE)
    assert chosen.policy.attention == "int8"
    assert origins(chosen)["attention"] == ("int8", "profile mine")
    assert choose(asked, Options(attention="sdpa"), MACHINE).policy.attention == "sdpa"


def test_why_there_is_no_attention_in_8_bits_stands_with_the_origins() -> None:
    chosen = choose(Profile("p", ""), Options(attention="int8", compute="fast"), MACHINE)
    without = with_torchs_attention(chosen, "no kernel")
    assert without.policy == Policy(compute="fast")
    assert origins(without)["attention"] == ("sdpa", "int8 by flag, not here: no kernel")
    others = origins(chosen).keys() - {"attention"}
    assert all(origins(without)[name] == origins(chosen)[name] for name in others)


def test_auto_takes_back_what_a_profile_fixed() -> None:
    fixed = parse("mine", 'tiles = "2x2"', Path("mine.toml"))
    assert choose(fixed, Options(), MACHINE).policy.tiles == (2, 2)
    assert choose(fixed, Options(tiles="auto"), MACHINE).policy.tiles is None
