"""A list of requests: JSON, one a line, with the fields of `penstock generate` or of the server."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, get_args, get_type_hints

from penstock.engine.lora.file import Lora
from penstock.engine.request.settings import ANY_SEED, Settings
from penstock.errors import PenstockError, UsageError, brief
from penstock.regular import open_regular

MAX_LIST_BYTES = 64 << 20
"""Of a list: a hundred thousand lines with long prompts."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}")

_WORDS: Mapping[str, str] = MappingProxyType(
    {
        "negative": "negative_prompt", "cfg": "guidance_scale", "nag": "nag_scale",
        "num_frames": "frames", "num_inference_steps": "steps", "flow_shift": "shift",
        "guidance_scale_2": "guidance_low", "input_reference": "image", "continue": "after",
    }
)  # fmt: skip
"""What a field may be called besides: as a flag of ``generate``, or as the server's clients say."""

_OWN = ("id", "custom_id", "model", "lora", "width", "height", "guidance_low")
_SETTINGS = tuple(each.name for each in fields(Settings))
_PATHS = ("image", "last_image", "after")
_JSON = (int, float, str, bool)


def _kinds_of(declared: Any) -> tuple[type, ...]:
    """Return what a field of that type may be in JSON: a number may be whole, a path is a text."""
    parts = get_args(declared) or (declared,)
    kinds = tuple(kind for kind in _JSON if kind in parts)
    return ((int, *kinds) if float in kinds and int not in kinds else kinds) or (str,)


_KINDS: Mapping[str, tuple[type, ...]] = MappingProxyType(
    {name: _kinds_of(declared) for name, declared in get_type_hints(Settings).items()}
)


@dataclass(frozen=True)
class Line:
    """One request of a list.

    Attributes:
        number: of its line, from 1.
        name: of its video, without a suffix: its "id", or the number in four digits.
        model: a folder, a file or a hub id, as ``--model`` takes it.
        loras: "FILE", "FILE:STRENGTH", with "@high" or "@low", as ``--lora`` takes them.
        settings: what to make; its seed is never open.
        digest: of all that determines the video, in hexadecimal.
    """

    number: int
    name: str
    model: str
    loras: tuple[str, ...]
    settings: Settings
    digest: str


@dataclass(frozen=True)
class BadLine:
    """A line that cannot be done.

    Attributes:
        number: from 1.
        name: as of `Line`, or the number in four digits where it tells none.
        error: why.
    """

    number: int
    name: str
    error: PenstockError

    def __str__(self) -> str:
        return f"line {self.number}: {self.error}"


def read_lines(
    path: Path, model: str | None, loras: Sequence[str] = ()
) -> tuple[list[Line], list[BadLine]]:
    """Read the lines of a list, and those that are no request; blank ones are left out.

    Args:
        path: of the list. Paths in it count from its folder.
        model: of lines that name none.
        loras: of lines that name none, likewise.

    Raises:
        UsageError: the list holds nothing, or more than `MAX_LIST_BYTES`.
        OSError: it cannot be read.
    """
    with open_regular(path) as file:
        data = file.read(MAX_LIST_BYTES + 1)
    if len(data) > MAX_LIST_BYTES:
        expected = f"at most {MAX_LIST_BYTES:,} bytes"
        raise UsageError("the list is too long", expected=expected, found=f"{path}, longer")
    good: list[Line] = []
    bad: list[BadLine] = []
    names: dict[str, int] = {}
    for number, raw in enumerate(data.split(b"\n"), start=1):
        if not raw.strip():
            continue
        name = f"{number:04}"
        try:
            given = _parsed(raw)
            name = _name_of(given, name)
            first = names.setdefault(name.casefold(), number)  # some disks do not tell a from A
            if first != number:
                raise UsageError("two lines have the same id", found=f"{name} in line {first}")
            good.append(_line(number, name, given, path.absolute().parent, model, tuple(loras)))
        except PenstockError as error:
            bad.append(BadLine(number, name, error))
    if not good and not bad:
        raise UsageError("the list is empty", expected="one request per line", found=str(path))
    return good, bad


def _parsed(raw: bytes) -> dict[str, Any]:
    try:
        given = json.loads(raw, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise UsageError("not valid JSON", found=str(error)) from error
    if not isinstance(given, dict):
        raise UsageError("not a request", expected="a JSON object", found=brief(given))
    found: dict[str, Any] = {}
    for key, value in given.items():
        word = key.replace("-", "_")
        word = _WORDS.get(word, word)
        if word not in (*_SETTINGS, *_OWN):
            known = sorted({*_SETTINGS, *_OWN, *_WORDS} - {"guidance_low", "guidance_high"})
            raise UsageError("no such field", expected=", ".join(known), found=brief(key))
        if word in found:
            raise UsageError("a field is given twice", found=brief(key))
        if value is not None:
            found[word] = value
    return found


def _no_number(word: str) -> float:
    raise ValueError(f"{word} is not a JSON number")


def _name_of(given: Mapping[str, Any], otherwise: str) -> str:
    if "id" in given and "custom_id" in given:
        raise UsageError("a field is given twice", found="id and custom_id")
    name = given.get("id", given.get("custom_id", otherwise))
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        expected = "up to 100 of A-Z, a-z, 0-9, _ and -, a letter or a digit first"
        raise UsageError("this id cannot name a file", expected=expected, found=brief(name))
    return name


def _line(
    number: int,
    name: str,
    given: dict[str, Any],
    folder: Path,
    model: str | None,
    loras: tuple[str, ...],
) -> Line:
    model = _checked(given, "model", (str,), model)
    if not model:
        raise UsageError("the line names no model", expected='"model" in the line, or --model')
    loras = _loras(given, folder, loras)
    settings = _settings(given, folder)
    facts = {**vars(settings), "model": model, "loras": loras, "name": name}
    told = json.dumps(facts, sort_keys=True, default=str).encode()
    digest = hashlib.sha256(told).hexdigest()
    if settings.seed in (None, ANY_SEED):  # of its own, and the same whenever it is begun
        settings = replace(settings, seed=int(digest[:8], 16))
    return Line(number, name, model, loras, settings, digest)


def _settings(given: Mapping[str, Any], folder: Path) -> Settings:
    values: dict[str, Any] = {}
    for word in _SETTINGS:
        value = _checked(given, word, _KINDS[word])
        if value is not None:
            values[word] = folder / Path(value).expanduser() if word in _PATHS else value
    if "prompt" not in values and "after" not in values:
        raise UsageError("the prompt is missing", expected='"prompt"')
    low = _checked(given, "guidance_low", (int, float))
    if low is not None:  # the server's word for it: the first scale is for much noise
        values["guidance_high"] = _checked(given, "guidance_scale", (int, float), low)
        values["guidance_scale"] = low
    width, height = (_checked(given, word, (int,)) for word in ("width", "height"))
    if (width is None) != (height is None) or (width is not None and "size" in values):
        raise UsageError(
            "the size is incomplete or given twice", expected='"size", or "width" and "height"'
        )
    if width is not None:
        values["size"] = f"{width}x{height}"
    return Settings(**({"prompt": ""} | values))


def _loras(given: Mapping[str, Any], folder: Path, otherwise: tuple[str, ...]) -> tuple[str, ...]:
    value = given.get("lora")
    if value is None:
        return otherwise
    words = value if isinstance(value, list) else [value]
    if not all(isinstance(word, str) and word for word in words):
        expected = '"FILE:STRENGTH", or a list of such'
        raise UsageError("not a LoRA", expected=expected, found=brief(value))
    return tuple(_lora(word, folder) for word in words)


def _lora(word: str, folder: Path) -> str:
    """Return ``word`` with its file's place made absolute, where that is a path from ``folder``."""
    path = Lora.parse(word).path
    there = folder / path.expanduser()
    return f"{there}{word.removeprefix(str(path))}" if there.exists() else word


def _checked(
    given: Mapping[str, Any], word: str, kinds: tuple[type, ...], otherwise: Any = None
) -> Any:
    value = given.get(word, otherwise)
    if value is None or (isinstance(value, kinds) and (bool in kinds or type(value) is not bool)):
        return value
    expected = " or ".join(kind.__name__ for kind in kinds)
    raise UsageError(f"illegal {word}", expected=expected, found=brief(value))


Check = Callable[[Line], None]
"""Raises a PenstockError for a line that cannot be done."""


def sorted_out(lines: Sequence[Line], check: Check) -> tuple[list[Line], list[BadLine]]:
    """Return the lines that pass ``check``, in the order given, and the others."""
    good: list[Line] = []
    bad: list[BadLine] = []
    for line in lines:
        try:
            check(line)
            good.append(line)
        except PenstockError as error:
            bad.append(BadLine(line.number, line.name, error))
        except OSError as error:
            told = UsageError("a file cannot be read", found=str(error))
            bad.append(BadLine(line.number, line.name, told))
    return good, bad
