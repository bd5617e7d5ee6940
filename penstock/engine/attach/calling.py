"""The arguments of any pipeline's call, by name: which there are, and a value from a word."""

from __future__ import annotations

import inspect
import json
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from penstock.errors import RequestError

NOT_SAID = inspect.Parameter.empty
_OURS = ("self", "generator", "output_type", "return_dict", "state", "output", "output_key")
"""What a job decides itself, or what is no argument."""

_SIMPLE: Mapping[type, str] = types.MappingProxyType(
    {bool: "true or false", int: "a whole number", float: "a number", str: "text",
     list: "a list", dict: "an object", type(None): "null"}
)  # fmt: skip


@dataclass(frozen=True)
class Argument:
    """One argument of a pipeline's call.

    Attributes:
        name: as the pipeline has it.
        kinds: the plain types that its signature names; empty: none of them.
        takes_picture: its signature names pictures.
        default: `NOT_SAID` where there is none.
    """

    name: str
    kinds: frozenset[type]
    takes_picture: bool
    default: Any


def arguments_of(pipe: Any) -> dict[str, Argument]:
    """Return what the call of a `DiffusionPipeline` or a `ModularPipeline` takes, by name.

    What only a program can give (tensors, callbacks) is left out.
    """
    blocks = getattr(pipe, "blocks", None)
    if blocks is not None:
        told = [(each.name, each.type_hint, each.default) for each in blocks.inputs if each.name]
    else:
        parameters = inspect.signature(type(pipe).__call__).parameters.values()
        hints = _hints(type(pipe).__call__)
        named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        told = [(p.name, hints.get(p.name, p.annotation), p.default) for p in named]
    found = (Argument(name, _kinds(hint), _pictures(hint), default) for name, hint, default in told)
    return {each.name: each for each in found if each.name not in _OURS and _is_sayable(each)}


def _hints(call: Any) -> dict[str, Any]:
    """Return the annotations of a call, those evaluated that are text; none where one cannot be."""
    try:
        return typing.get_type_hints(call)
    except (NameError, TypeError, AttributeError):  # of what its module does not import
        return {}


def _is_sayable(argument: Argument) -> bool:
    return bool(argument.kinds - {type(None)}) or argument.takes_picture


def _parts(hint: Any) -> list[Any]:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return [part for each in typing.get_args(hint) for part in _parts(each)]
    return [hint]


def _kinds(hint: Any) -> frozenset[type]:
    if hint is NOT_SAID or hint is None or isinstance(hint, str):
        return frozenset(_SIMPLE)  # it does not say: as the value is written
    plain: set[type] = set()
    for part in _parts(hint):
        origin = typing.get_origin(part) or part
        inside = typing.get_args(part)
        if origin in (list, tuple) and not all(_is_plain(each) for each in inside):
            continue
        if origin is tuple:
            plain.add(list)
        elif isinstance(origin, type) and origin in _SIMPLE:
            plain.add(origin)
    return frozenset(plain)


def _is_plain(hint: Any) -> bool:
    origin = typing.get_origin(hint) or hint
    return origin is Ellipsis or origin in _SIMPLE or origin is tuple


def _pictures(hint: Any) -> bool:
    return "PIL.Image" in str(hint) or "Image.Image" in str(hint)


def parse(pipe: Any, pairs: Sequence[str]) -> dict[str, Any]:
    """Parse the values of ``name=value`` words, each of the type that the pipeline's signature
    names.

    Pictures are given by their file. Lists and objects are written as JSON.

    Raises:
        RequestError: no such argument (names the nearest), or a value of another type.
        ImageError: a picture that cannot be read.
    """
    known = arguments_of(pipe)
    given: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals:
            raise RequestError(
                f"--set {pair} gives no value", expected="name=value", found=repr(pair)
            )
        if name in given:
            raise RequestError(f"{name} is given twice", expected="one value", found=repr(pair))
        given[name] = _value(_known(pipe, known, name), text)
    missing = [each.name for each in known.values() if each.default is NOT_SAID]
    lacking = [name for name in missing if name not in given]
    if lacking:
        raise RequestError(
            f"{type(pipe).__name__} wants {lacking[0]}",
            expected=f"--set {lacking[0]}=...",
            found=", ".join(given) or "no arguments",
        )
    return given


def _known(pipe: Any, known: Mapping[str, Argument], name: str) -> Argument:
    if name in known:
        return known[name]
    near = get_close_matches(name, known, n=1, cutoff=0.0)
    raise RequestError(
        f"{type(pipe).__name__} takes no {name}",
        expected=", ".join(known),
        found=name,
        remedy=f"Did you mean {near[0]}?" if near else None,
    )


def _value(argument: Argument, text: str) -> Any:
    if argument.takes_picture and Path(text).is_file():
        from penstock.engine.media.picture import open_image

        return open_image(Path(text))
    read = _read(text)
    if type(read) in argument.kinds:
        return read
    if float in argument.kinds and type(read) is int:
        return float(read)
    if str in argument.kinds:  # of digits, perhaps
        return text
    wanted = [_SIMPLE[kind] for kind in _SIMPLE if kind in argument.kinds]
    raise RequestError(
        f"{argument.name} cannot be {text!r}",
        expected=" or ".join([*wanted, *(["a picture's file"] if argument.takes_picture else [])]),
        found=_SIMPLE[type(read)],
    )


def _read(text: str) -> Any:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return value


class NoBar:
    """Shows nothing."""

    def update(self, n: int = 1) -> None:
        """Show nothing."""

    def close(self) -> None:
        """Note that the loop has ended."""


@contextmanager
def bars(pipe: Any, make: Any) -> Iterator[None]:
    """Let ``pipe`` tell its steps to what ``make(total)`` gives, in the place of its own bar: of a
    modular pipeline, the bars of its blocks."""

    @contextmanager
    def opened(total: int) -> Iterator[Any]:
        bar = make(total)
        yield bar
        bar.close()

    def progress_bar(iterable: Any = None, total: int | None = None) -> Any:
        if iterable is None:
            return opened(total or 0)
        return _walk(iterable, make(len(iterable)))

    tellers = [pipe, *_loops(getattr(pipe, "_blocks", None))]
    for each in tellers:
        vars(each)["progress_bar"] = progress_bar
    try:
        yield
    finally:
        for each in tellers:
            vars(each).pop("progress_bar", None)


def _loops(blocks: Any) -> Iterator[Any]:
    """Yield the blocks of a modular pipeline that have a bar of their own."""
    if hasattr(type(blocks), "progress_bar"):
        yield blocks
    for each in getattr(blocks, "sub_blocks", {}).values():
        yield from _loops(each)


def _walk(iterable: Any, bar: Any) -> Iterator[Any]:
    for each in iterable:
        yield each
        bar.update()
    bar.close()


def output_of(pipe: Any) -> dict[str, str]:
    """Return what makes a pipeline give tensors."""
    blocks = getattr(pipe, "blocks", None)
    if blocks is None:
        names = set(inspect.signature(type(pipe).__call__).parameters)
    else:
        names = {each.name for each in blocks.inputs}
    return {"output_type": "pt"} if "output_type" in names else {}
