"""Profiles: byte budgets and policy under a name, as TOML; and where each value comes from.

A flag wins over the profile, the profile over what was measured, that over defaults.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, fields, replace
from importlib.resources import files
from pathlib import Path

from penstock.errors import ProfileError, UsageError, brief
from penstock.folders import config_folder
from penstock.formats.formats import get_format
from penstock.profiles.hardware import Hardware
from penstock.profiles.options import Options
from penstock.profiles.plan import Origin
from penstock.profiles.policy import AUTO, Policy, policy_of
from penstock.regular import read_regular
from penstock.units import format_bytes, parse_bytes

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pragma: no cover (Python 3.10)

SHIPPED = ("4gb", "6gb", "8gb", "12gb", "16gb", "24gb", "max")


@dataclass(frozen=True)
class Profile:
    """Budgets and policy; what is None is left to the machine.

    Attributes:
        name: of the file, without its ending.
        summary: for whom it is.
        vram_bytes, ram_bytes: ceilings; None: what is free, less a reserve.
        pinned_share: of the RAM budget that may be page-locked.
        formats: of the transformer's blocks, in order of preference, where there is a choice.
        given: the keys that the file sets.
        path: of the file; None for "auto".
    """

    name: str
    summary: str
    vram_bytes: int | None = None
    ram_bytes: int | None = None
    pinned_share: float = 1.0
    formats: tuple[str, ...] = ("bf16", "int8", "nf4")
    policy: Policy = Policy()
    given: frozenset[str] = frozenset()
    path: Path | None = None

    def __post_init__(self) -> None:
        if not 0 < self.pinned_share <= 1:
            raise ProfileError(
                f"illegal pinned_share in profile {self.name}",
                expected="a share of RAM, above 0 and up to 1",
                found=brief(self.pinned_share),
            )
        for name in self.formats:
            get_format(name)


@dataclass(frozen=True)
class Chosen:
    """What a plan is made with.

    Attributes:
        hardware: with the budgets in force.
        pinned_bytes: the most page-locked memory.
        formats: that may be tried, in order.
        formats_from: who names them: "flag", "profile NAME" or "default".
        origins: where each value comes from.
        options: as they were asked for, the device decided, a profile's file by its whole path.
    """

    hardware: Hardware
    policy: Policy
    pinned_bytes: int
    formats: tuple[str, ...]
    origins: tuple[Origin, ...] = field(default=())
    formats_from: str = "default"
    options: Options = field(default_factory=Options)


def with_torchs_attention(chosen: Chosen, reason: str) -> Chosen:
    """Return ``chosen`` with torch's own attention, and with ``reason`` beside its origin."""
    origins = tuple(
        Origin(each.name, "sdpa", f"{chosen.policy.attention} by {each.source}, not here: {reason}")
        if each.name == "attention"
        else each
        for each in chosen.origins
    )
    return replace(chosen, policy=replace(chosen.policy, attention="sdpa"), origins=origins)


def choose(profile: Profile, options: Options, hardware: Hardware) -> Chosen:
    """Return the budgets and policy in force, each with its origin.

    A profile's ceiling counts where that much is free; an option counts as it is.

    Args:
        profile: that `Options.profile` names.
        hardware: the machine, with what it has free.

    Raises:
        Nothing: options are legal once they are made.
    """
    from_profile, origins = f"profile {profile.name}", []
    budgets = {}
    for name, flag, set_bytes, free_bytes in (
        ("vram", options.vram, profile.vram_bytes, hardware.vram_bytes),
        ("ram", options.ram, profile.ram_bytes, hardware.ram_bytes),
    ):
        if flag is not None:
            budgets[name], source = parse_bytes(flag), "flag"
        elif set_bytes is not None and set_bytes <= free_bytes:
            budgets[name], source = set_bytes, from_profile
        else:
            budgets[name], source = free_bytes, f"free on {hardware.name}, less a reserve"
        origins.append(Origin(name, format_bytes(budgets[name]), source))
    share = profile.pinned_share if options.share is None else options.share
    pinned_bytes = int(share * budgets["ram"])
    formats = profile.formats if options.format is None else (options.format,)
    formats_from = _source(options.format is not None, "formats", profile)
    pinned_from = _source(options.share is not None, "pinned_share", profile)
    origins.append(Origin("pinned", format_bytes(pinned_bytes), pinned_from))
    origins.append(Origin("format", ", ".join(formats), formats_from))
    policy = policy_of(options.policy, profile.policy)
    origins += [
        Origin(name, word, _source(name in options.policy, name, profile))
        for name, word in policy.words().items()
    ]
    origins.append(Origin("rates", hardware.name, hardware.rates_source))
    return Chosen(
        replace(hardware, vram_bytes=budgets["vram"], ram_bytes=budgets["ram"]),
        policy,
        pinned_bytes,
        formats,
        tuple(origins),
        formats_from,
        _decided(options, profile, hardware),
    )


def _decided(options: Options, profile: Profile, hardware: Hardware) -> Options:
    """Return ``options`` as they mean the same on another day and from another folder."""
    found = replace(options, device=hardware.device)
    if profile.path is None or not (options.profile or AUTO).endswith(".toml"):
        return found
    return replace(found, profile=str(profile.path.absolute()))


def _source(in_flag: bool, key: str, profile: Profile) -> str:
    if in_flag:
        return "flag"
    return f"profile {profile.name}" if key in profile.given else "default"


def names(folder: Path | None = None) -> tuple[str, ...]:
    """Return all profiles by name: those shipped, then the user's own."""
    own = sorted(path.stem for path in _own_dir(folder).glob("*.toml"))
    return (AUTO, *SHIPPED, *(name for name in own if name not in SHIPPED))


def load(name: str, folder: Path | None = None) -> Profile:
    """Load the profile called ``name``, or the one in the file ``name`` if that ends in ``.toml``.

    A user's own file wins over a shipped one of the same name.

    Args:
        folder: of the user's own profiles; by default in the config directory.

    Raises:
        ProfileError: there is none, or the file is not a profile.
    """
    if name == AUTO:
        policy = Policy(disk="spare")
        return Profile(AUTO, "what is free on this machine, less a reserve", policy=policy)
    if name.endswith(".toml"):
        path = Path(name).expanduser()
        return parse(path.stem, _text(path), path)
    own = _own_dir(folder) / f"{name}.toml"
    if _is_there(own):
        return parse(name, _text(own), own)
    if name not in SHIPPED:
        raise ProfileError(
            "no such profile",
            expected="one of " + ", ".join(names(folder)) + ", or the path of a .toml file",
            found=brief(name),
        )
    shipped = files("penstock.profiles") / f"{name}.toml"
    return parse(name, shipped.read_text(encoding="utf-8"), Path(str(shipped)))


def _is_there(path: Path) -> bool:
    """Return whether the user has this file; no such name can be one, nor a folder that is not
    theirs."""
    try:
        return path.exists()
    except OSError:
        return False


def _own_dir(folder: Path | None) -> Path:
    return config_folder() / "profiles" if folder is None else folder


_MAX_BYTES = 256 << 10


def _text(path: Path) -> str:
    try:
        size = path.stat().st_size
        if size > _MAX_BYTES:
            raise ProfileError(
                f"{path} is not a profile",
                expected=f"at most {_MAX_BYTES:,} bytes",
                found=f"{size:,}",
            )
        return read_regular(path).decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ProfileError(
            f"{path} cannot be read", expected="a profile in TOML", found=str(error)
        ) from error


_POLICY = tuple(each.name for each in fields(Policy))
_KEYS = ("summary", "vram", "ram", "pinned_share", "formats", *_POLICY)


def parse(name: str, text: str, path: Path) -> Profile:
    """Parse the profile that ``text`` states.

    Raises:
        ProfileError: not TOML, an unknown key, or an illegal value; names the file.
    """
    try:
        return _parse(name, text, path)
    except (ValueError, OverflowError, RecursionError, UsageError) as error:
        raise ProfileError(f"{path} is not a profile", found=str(error)) from error


def _parse(name: str, text: str, path: Path) -> Profile:
    found = tomllib.loads(text)
    unknown = sorted(found.keys() - set(_KEYS))
    if unknown:
        raise ProfileError("unknown keys", expected=", ".join(_KEYS), found=", ".join(unknown))
    share = found.get("pinned_share", 1.0)
    formats = found.get("formats", Profile.formats)
    is_number = isinstance(share, int | float) and not isinstance(share, bool)
    if not is_number or not isinstance(formats, list | tuple):
        raise ProfileError(
            "illegal pinned_share or formats", expected="a number; a list", found=text
        )
    return Profile(
        name=name,
        summary=str(found.get("summary", "")),
        vram_bytes=_size(found.get("vram", AUTO)),
        ram_bytes=_size(found.get("ram", AUTO)),
        pinned_share=float(share),
        formats=tuple(map(str, formats)),
        policy=policy_of({key: found[key] for key in _POLICY if key in found}, Policy()),
        given=frozenset(found),
        path=path,
    )


def _size(word: object) -> int | None:
    if word == AUTO:
        return None
    return parse_bytes(word if isinstance(word, str) or type(word) is int else repr(word))
