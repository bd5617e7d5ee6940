"""Which of a model's two transformers a file is: the one for much noise, or the one for little.

Both have the same tensors and, in Wan2.2, often the very config of Wan2.1's: only what a file and
its folder are called, or what its header says of its name, tells them apart. A file of which none
of this speaks cannot be told from a model of one transformer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from penstock.engine.files.fields import read_object
from penstock.engine.files.source import RawFile
from penstock.errors import CheckpointError, UsageError

Expert = Literal["high", "low"]
FIRST, SECOND = "transformer", "transformer_2"
PARTS: Mapping[str, Expert] = {FIRST: "high", SECOND: "low"}
"""As diffusers' pipelines of two transformers name them."""

_NOISE = re.compile(r"(high|low)(?=[ _.-]*noise)", re.IGNORECASE)
_WORD = re.compile(r"(?<![a-z])(high|low)(?![a-z])", re.IGNORECASE)
_RELEASE = re.compile(r"2[._]?2(?!\d)|a14b", re.IGNORECASE)
_TITLES = ("general.name", "general.basename", "general.finetune", "modelspec.title")
"""Of a header. The usual converters of GGUF write none: of their files only the name tells."""
_OTHER = {"high": "low", "low": "high", "High": "Low", "Low": "High", "HIGH": "LOW", "LOW": "HIGH"}


def expert_named(name: str) -> Expert | None:
    """Return which of the two a file of this name is; None: the name does not say."""
    found = _NOISE.search(name) or (_WORD.search(name) if _RELEASE.search(name) else None)
    return _expert(found)


def expert_of_lora(name: str) -> Expert | None:
    """Return which of the two a LoRA of this name was made for: there the bare word is enough."""
    return _expert(_NOISE.search(name) or _WORD.search(name))


def expert_of_folder(path: Path) -> Expert | None:
    """Return which of the two a file was made for, by the name of its folder."""
    return _expert(_NOISE.search(path.parent.name))


def _expert(found: re.Match[str] | None) -> Expert | None:
    if found is None:
        return None
    return "high" if found[1].lower() == "high" else "low"


def expert_of(raw: RawFile) -> Expert | None:
    """Return which of the two a file is, by its name, its folder's, its header, or the index of the
    pipeline it lies in; None: nothing says so."""
    names = [raw.path.name, *(str(raw.metadata.get(title, "")) for title in _TITLES)]
    folder = raw.path if raw.path.is_dir() else raw.path.parent
    found = (expert_named(name) for name in names)
    by_name = next((each for each in found if each is not None), None)
    return by_name or _expert(_NOISE.search(folder.name)) or _in_pipeline(folder)


def _in_pipeline(folder: Path) -> Expert | None:
    index = folder.parent / "model_index.json"
    if folder.name not in PARTS or not index.exists():
        return None
    try:
        second = read_object(index).get(SECOND)
    except CheckpointError:
        return None
    paired = isinstance(second, list) and second[:1] != [None]
    return PARTS[folder.name] if paired else None


def partner_of(path: Path) -> Path | None:
    """Return what the other of the two would be called, beside ``path``; None: the name does not
    say."""
    named = expert_named(path.name) is not None
    place = path if named else path.parent
    pattern = _NOISE if _NOISE.search(place.name) else _WORD
    if not named and not _NOISE.search(place.name):
        return None
    other = place.with_name(pattern.sub(lambda m: _OTHER.get(m[1], m[1]), place.name, count=1))
    return other if named else other / path.name


def alone(path: Path, expert: Expert) -> CheckpointError:
    """Return the refusal of one transformer without the other."""
    partner = partner_of(path)
    missing = "low" if expert == "high" else "high"
    name = f"{partner.name} beside it, or another file" if partner is not None else "it"
    flag = "--transformer-2" if missing == "low" else "--transformer"
    return CheckpointError(
        f"{path} is one of two transformers, the one for {expert} noise",
        expected=f"the one for {missing} noise as well: {name} with {flag}",
        found="it alone",
        remedy="Give the one for high noise with --transformer and the one for low noise with "
        "--transformer-2.",
    )


def check_order(first: Expert | None, second: Expert | None) -> None:
    """Refuse two transformers that were given in each other's place.

    Raises:
        UsageError: they were, or both are the same one.
    """
    if first == "low" or second == "high":
        raise UsageError(
            "the two transformers are not in their places",
            expected="the one for high noise with --transformer, for low noise with "
            "--transformer-2",
            found=f"{first or 'an unnamed one'} and {second or 'an unnamed one'}",
        )


def pipeline_facts(index: Mapping[str, Any]) -> dict[str, Any]:
    """Return what of a model_index.json determines how a model of two transformers is
    sampled."""
    facts = ("boundary_ratio", "expand_timesteps")
    return {name: index[name] for name in facts if index.get(name) is not None}
