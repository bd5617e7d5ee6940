"""A tokenizer out of a SentencePiece model, such as the one that UMT5 files carry as a byte tensor.

Source: ``sentencepiece_model.proto`` for the fields, and the protocol buffers encoding for how they
lie. The result splits text as SentencePiece itself does; tests hold the two together.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from penstock.errors import CheckpointError

_UNIGRAM = 1
NORMAL, UNKNOWN, CONTROL = 1, 2, 3


@dataclass(frozen=True)
class SpmModel:
    """What a Unigram model of SentencePiece says.

    Attributes:
        pieces: text, score and kind of each piece, in the order of their ids.
        charsmap: the normaliser's compiled table.
        byte_fallback: unknown characters become their bytes.
        dummy_prefix: a space is put before the text.
        squeeze: runs of spaces become one, and none is left at the ends.
    """

    pieces: tuple[tuple[str, float, int], ...]
    charsmap: bytes
    byte_fallback: bool
    dummy_prefix: bool
    squeeze: bool


def parse_spm(data: bytes) -> SpmModel:
    """Read the serialised model ``data``.

    Raises:
        CheckpointError: it is no SentencePiece model, or not a Unigram model.
    """
    try:
        return _parse(data)
    except (IndexError, ValueError, struct.error) as error:
        raise CheckpointError(
            "the embedded tokenizer cannot be read",
            expected="a SentencePiece model",
            found=str(error) or type(error).__name__,
            remedy="Give a tokenizer folder with --tokenizer.",
        ) from error


def _parse(data: bytes) -> SpmModel:
    pieces: list[tuple[str, float, int]] = []
    trainer: dict[int, Any] = {}
    normalizer: dict[int, Any] = {}
    for number, value in _fields(data):
        if number == 1:
            piece = dict(_fields(value))
            (score,) = struct.unpack("<f", piece.get(2, bytes(4)))
            pieces.append((piece[1].decode("utf-8"), score, piece.get(3, NORMAL)))
        elif number == 2:
            trainer = dict(_fields(value))
        elif number == 3:
            normalizer = dict(_fields(value))
    if not pieces or trainer.get(3, _UNIGRAM) != _UNIGRAM:
        raise ValueError(f"{len(pieces)} pieces of model type {trainer.get(3, _UNIGRAM)}")
    return SpmModel(
        pieces=tuple(pieces),
        charsmap=normalizer.get(2, b""),
        byte_fallback=bool(trainer.get(35, 0)),
        dummy_prefix=bool(normalizer.get(3, 1)),
        squeeze=bool(normalizer.get(4, 1)),
    )


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Yield the field numbers and values: ints for varints, bytes for all else."""
    place = 0
    while place < len(data):
        key, place = _varint(data, place)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, place = _varint(data, place)
            yield number, value
            continue
        if wire == 2:
            length, place = _varint(data, place)
        elif wire in (1, 5):
            length = 8 if wire == 1 else 4
        else:
            raise ValueError(f"wire type {wire} at byte {place}")
        if place + length > len(data):
            raise ValueError(f"a field past the end at byte {place}")
        yield number, data[place : place + length]
        place += length


def _varint(data: bytes, place: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = data[place]
        place += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, place
    raise ValueError(f"an endless number at byte {place}")


def backend_from_spm(data: bytes) -> tuple[Any, str]:
    """Return a tokenizer of the library ``tokenizers`` that splits as the SentencePiece model
    ``data`` does, T5's way, with an end mark after each text; and its mark for what is unknown.

    Raises:
        CheckpointError: the model cannot be read, or lacks T5's marks.
    """
    model = parse_spm(data)
    names = [text for text, _, _ in model.pieces]
    if not {"</s>", "<pad>"} <= set(names):
        raise CheckpointError(
            "the embedded tokenizer is not UMT5's",
            expected="the pieces <pad> and </s>",
            found=", ".join(names[:4]),
            remedy="Give a tokenizer folder with --tokenizer.",
        )
    unknown = next((text for text, _, kind in model.pieces if kind == UNKNOWN), "<unk>")
    return build_backend(model), unknown


def build_backend(model: SpmModel) -> Any:
    """Build a tokenizer of the library ``tokenizers`` for a model that has the piece ``</s>``."""
    from tokenizers import (
        AddedToken,
        Regex,
        Tokenizer,
        decoders,
        normalizers,
        pre_tokenizers,
        processors,
    )
    from tokenizers.models import Unigram

    unknown = next((i for i, piece in enumerate(model.pieces) if piece[2] == UNKNOWN), None)
    vocabulary = [(text, score) for text, score, _ in model.pieces]
    end = next(i for i, piece in enumerate(model.pieces) if piece[0] == "</s>")
    tokenizer = Tokenizer(Unigram(vocabulary, unknown, model.byte_fallback))
    steps: list[Any] = [normalizers.Precompiled(model.charsmap)] if model.charsmap else []
    if model.squeeze:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if steps:
        tokenizer.normalizer = normalizers.Sequence(steps)
    scheme = "always" if model.dummy_prefix else "never"
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=scheme)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", end)]
    )
    marks = [text for text, _, kind in model.pieces if kind == CONTROL]
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in marks])
    return tokenizer
