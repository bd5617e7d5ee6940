"""What a run can be told besides what to make: one value that travels whole, from the command line
or `Engine.open` through the plan, the stored job and the report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from penstock.errors import UsageError, brief
from penstock.profiles.policy import AUTO, Policy, policy_of
from penstock.units import parse_bytes

DEVICES = (AUTO, "cuda", "cpu")

_NAMES = ("device", "profile", "format")


@dataclass(frozen=True)
class Options:
    """Every option of a run, spelled as flags are. None leaves the choice to the profile, the
    machine or the model's files. Fields that `Policy` has too narrow the planner's search.

    Attributes:
        vram, ram: memory budgets, such as "12GiB" or bytes.
        device: "cuda", "cpu" or "auto" (CUDA if available).
        profile: profile name, or path of a .toml file.
        format: weight format of the transformer's blocks (`penstock.formats.formats.FORMATS`). If
            the files hold another one, the first job packs the transformer and reads the pack.
        compute: "exact" decodes quantised weights; "fast" multiplies in 8 bits where the format
            allows it and a trial on the device succeeds.
        attention: self-attention kernel: "sdpa", or, if comfy-kitchen is there and a trial on
            the device succeeds, "int8" (8-bit), "sol" or "sol:TAU" (sparse).
        residual: precision of the transformer's hidden states between operations: "fp32" as the
            makers do, "bf16" (the dtype it computes in) or "auto" (fp32 if it fits).
        branches: CFG branches per visit of a block: 1, 2 or "auto".
        chunk_tokens: tokens per chunk of the transformer's forward pass, or "auto".
        tiles: VAE tiles, "ROWSxCOLUMNS" or "auto".
        cross_kv: where to keep cross-attention K/V: "auto", "vram" or "ram".
        disk: whether blocks may stream from disk at every pass: "auto", "spare" or "never".
        pinned_share: share of the RAM budget that may be pinned (page-locked), above 0, at most 1.
        step_cache: which forward passes to skip: "off"; "budget" or "budget:T" (steps whose
            expected error stays below T of the latents); or "plan:N" (all but N steps).

    Raises:
        UsageError, ProfileError: an illegal value; says what was expected.
    """

    vram: str | int | None = None
    ram: str | int | None = None
    device: str | None = None
    profile: str | None = None
    format: str | None = None
    compute: str | None = None
    attention: str | None = None
    residual: str | None = None
    branches: str | int | None = None
    chunk_tokens: str | int | None = None
    tiles: str | None = None
    cross_kv: str | None = None
    disk: str | None = None
    pinned_share: str | float | None = None
    step_cache: str | None = None

    def __post_init__(self) -> None:
        for name in ("vram", "ram"):
            if name in self.given:
                parse_bytes(self.given[name])
        for name in _NAMES:
            if not isinstance(self.given.get(name, ""), str):
                raise UsageError(
                    f"illegal {name}", expected="a name", found=brief(self.given[name])
                )
        if self.device not in (None, *DEVICES):
            raise UsageError(
                "unknown device", expected="auto, cuda or cpu", found=brief(self.device)
            )
        policy_of(self.policy, Policy())
        if self.share is not None and not 0 < self.share <= 1:
            raise self._no_share()

    @property
    def share(self) -> float | None:
        """``pinned_share`` as a number."""
        if self.pinned_share is None:
            return None
        try:
            return float(self.pinned_share)
        except (TypeError, ValueError) as error:
            raise self._no_share() from error

    def _no_share(self) -> UsageError:
        expected = "a share of RAM, above 0 and up to 1"
        return UsageError("illegal pinned_share", expected=expected, found=repr(self.pinned_share))

    @property
    def given(self) -> dict[str, Any]:
        """The options that say something, by their names."""
        return {name: word for name, word in vars(self).items() if word is not None}

    @property
    def policy(self) -> dict[str, Any]:
        """What is said of a `Policy`, by its names."""
        known = {each.name for each in fields(Policy)}
        return {name: word for name, word in self.given.items() if name in known}

    def over(self, other: Options) -> Options:
        """Return ``other``, with what is given here in its place."""
        return replace(other, **self.given)

    def named(self, named: Mapping[str, Any]) -> Options:
        """Return these options and others by their names, as keywords give them.

        Args:
            named: values by the names of options; None says nothing.

        Raises:
            UsageError: a name that is none, one that is given here too, or an illegal value.
        """
        known = tuple(each.name for each in fields(self))
        unknown = ", ".join(sorted(named.keys() - set(known)))
        if unknown:
            raise UsageError("no such option", expected=", ".join(known), found=unknown)
        said = {name: word for name, word in named.items() if word is not None}
        twice = sorted(said.keys() & self.given.keys())
        if twice:
            raise UsageError(
                f"given twice: {', '.join(twice)}",
                expected="each option in Options(...) or by its own name",
                found="both",
            )
        return replace(self, **said)

    def to_json(self) -> dict[str, Any]:
        """Return plain values, ready for json.dumps; `from_json` reads them again."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Options:
        """Return the options that `to_json` gave ``value`` for; what is absent was not known then.

        Raises:
            TypeError, UsageError: ``value`` holds something else.
        """
        return cls(**value)
