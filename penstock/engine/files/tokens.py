"""What the process of a tokenizer does: read the files, tokenise, write them anew.

Nothing here imports torch or transformers; `penstock.engine.files.tokenizer` asks.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

from penstock.engine.files.spm import backend_from_spm
from penstock.errors import CheckpointError

_SPM_FILES = ("spiece.model", "tokenizer.model")
_CONFIGS = ("special_tokens_map.json", "tokenizer_config.json")
_DEFAULTS = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
_LARGEST_BYTES = 256 << 20


@dataclass(frozen=True)
class _Read:
    """A tokenizer of the library ``tokenizers``, and its marks by transformers' names."""

    backend: Any
    marks: dict[str, str]


def _answering(work: Callable[..., Any]) -> Callable[..., dict[str, Any]]:
    """Turn a refusal of ours into an answer; what else is raised ends the process."""

    @wraps(work)
    def answer(source: dict[str, Any], **arguments: Any) -> dict[str, Any]:
        try:
            return {"found": work(_read(source), **arguments)}
        except CheckpointError as error:
            told = ("what", "expected", "found", "remedy")
            return {"refused": {name: getattr(error, name) for name in told}}

    return answer


@_answering
def tokenise(read: _Read, texts: list[str], max_tokens: int) -> list[tuple[list[int], int, str]]:
    """Return the ids padded or cut to ``max_tokens``, how many are not padding, and the text that
    was cut."""
    pad = read.backend.token_to_id(read.marks["pad_token"])
    if pad is None:
        raise CheckpointError(
            "the tokenizer has no padding mark",
            expected=f"a token {read.marks['pad_token']}",
            found="none",
            remedy="Use the tokenizer that the model came with",
        )
    whole = [read.backend.encode(text) for text in texts]
    read.backend.enable_truncation(max_tokens)
    fitted = [read.backend.encode(text).ids for text in texts]
    specials = read.backend.num_special_tokens_to_add(False)
    found = []
    for every, ids in zip(whole, fitted, strict=True):
        tail = every.ids[max_tokens - specials : len(every.ids) - specials]
        cut = read.backend.decode(tail) if len(every.ids) > max_tokens else ""
        found.append((ids + [pad] * (max_tokens - len(ids)), len(ids), cut))
    return found


@_answering
def verbatim(
    read: _Read, texts: list[str], marks: list[str]
) -> tuple[list[list[int]], list[int | None]]:
    """Return the ids of whole texts, without the marks that the tokenizer would add; and of single
    marks, None for one that it has not."""
    ids = [read.backend.encode(text, add_special_tokens=False).ids for text in texts]
    return ids, [read.backend.token_to_id(mark) for mark in marks]


@_answering
def written(read: _Read) -> tuple[str, dict[str, Any]]:
    """Return the content of a ``tokenizer.json``, and what its config says; encodes a word
    first."""
    read.backend.encode("a")
    known: dict[str, Any] = {
        name: mark
        for name, mark in read.marks.items()
        if read.backend.token_to_id(mark) is not None
    }
    text = read.backend.to_str()
    if (json.loads(text)["pre_tokenizer"] or {}).get("add_prefix_space"):
        known["add_prefix_space"] = True  # transformers 4 takes it out where no config has it
    return text, known


def _read(source: dict[str, Any]) -> _Read:
    path = Path(source["path"])
    if path.is_file():
        return _spm(_content(path, source.get("offset", 0), source.get("nbytes")))
    whole = path / "tokenizer.json"
    if whole.is_file():
        return _json(whole, path)
    for name in _SPM_FILES:
        if (path / name).is_file():
            return _spm(_content(path / name))
    raise CheckpointError(
        "no usable tokenizer",
        expected=f"tokenizer.json or {' or '.join(_SPM_FILES)} in {path}",
        found="none of them",
        remedy="Download the model's tokenizer folder again",
    )


def _spm(data: bytes) -> _Read:
    backend, unknown = backend_from_spm(data)
    return _Read(backend, {**_DEFAULTS, "unk_token": unknown})


def _json(path: Path, folder: Path) -> _Read:
    from tokenizers import Tokenizer

    backend = Tokenizer.from_str(_content(path).decode("utf-8"))
    backend.no_truncation()
    backend.no_padding()
    marks = dict(_DEFAULTS)
    for name in _CONFIGS:
        if (folder / name).is_file():
            marks |= _marks(json.loads(_content(folder / name)))
    return _Read(backend, marks)


def _marks(config: Any) -> dict[str, str]:
    """Return the marks that a config names: as texts, or as objects with a content."""
    named = config if isinstance(config, dict) else {}
    texts = {
        name: value.get("content") if isinstance(value, dict) else value
        for name, value in named.items()
        if name in _DEFAULTS
    }
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def _content(path: Path, offset: int = 0, nbytes: int | None = None) -> bytes:
    size = path.stat().st_size if nbytes is None else nbytes
    if size > _LARGEST_BYTES:
        raise CheckpointError(
            f"{path} holds no tokenizer",
            expected=f"{_LARGEST_BYTES:,} bytes at most",
            found=f"{size:,}",
        )
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(size)
