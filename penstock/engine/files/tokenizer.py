"""A text encoder's tokenizer: from a folder, a SentencePiece model, or the tensor that holds one.

Its files are read by native code, so all that is done with them is done in a process of its own
(`penstock.engine.files.apart`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from penstock.engine.files.apart import ChildLimits, call_apart
from penstock.errors import CheckpointError, RequestError
from penstock.offload.checkpoint import TensorEntry

TOKENS = 512
_WORKER = "penstock.engine.files.tokens"


@dataclass(frozen=True)
class TokenisedPrompt:
    """A prompt as the encoder sees it.

    Attributes:
        ids: token ids, end mark included, padded to the full length.
        length: how many of them are not padding.
        cut: the text that did not fit, ``""`` if all did. Tell the user.
    """

    ids: tuple[int, ...]
    length: int
    cut: str


@dataclass(frozen=True)
class Tokenizer:
    """Where a tokenizer lies, and what may be asked of it.

    Attributes:
        source: a folder, a SentencePiece model, or the byte tensor that holds one.
        limits: of each process that reads it.
    """

    source: Path | TensorEntry
    limits: ChildLimits = field(default_factory=ChildLimits)

    @property
    def where(self) -> str:
        """What it is, for people."""
        if isinstance(self.source, Path):
            return f"the tokenizer {self.source}"
        return f"the tokenizer {self.source.name} in {self.source.file}"

    def tokenise(self, texts: Sequence[str], max_tokens: int = TOKENS) -> list[TokenisedPrompt]:
        """Tokenise clean texts, padded or cut to ``max_tokens``; one process for all of them.

        Raises:
            CheckpointError: the tokenizer cannot be read, or is of no use.
            RequestError: it makes nothing of a text, not even an end mark.
        """
        found = self._ask("tokenise", texts=list(texts), max_tokens=max_tokens)
        prompts = [TokenisedPrompt(tuple(ids), length, cut) for ids, length, cut in found]
        for text, prompt in zip(texts, prompts, strict=True):
            if prompt.length == 0:
                raise RequestError(
                    "the prompt has no tokens",
                    expected="text that the model knows",
                    found=repr(text),
                )
        return prompts

    def verbatim(
        self, texts: Sequence[str], marks: Sequence[str] = ()
    ) -> tuple[list[list[int]], list[int]]:
        """Return the ids of whole texts as they are, nothing added or cut, and of single marks.

        Raises:
            CheckpointError: the tokenizer cannot be read, or has not one of ``marks``.
        """
        ids, found = self._ask("verbatim", texts=list(texts), marks=list(marks))
        for mark, number in zip(marks, found, strict=True):
            if number is None:
                raise CheckpointError(
                    f"{self.where} is of another model",
                    expected=f"a token {mark}",
                    found="none",
                    remedy="Use the tokenizer that the model came with",
                )
        return ids, found

    def written(self) -> tuple[str, dict[str, Any]]:
        """Return the content of a ``tokenizer.json``, and the marks and what else goes into a
        config beside it.

        Raises:
            CheckpointError: the tokenizer cannot be read.
        """
        text, marks = self._ask("written")
        return text, marks

    def for_transformers(self) -> Any:
        """Return a tokenizer of transformers that does the same, in this process, for a pipeline
        that tokenises itself. A child has read it and used it before.

        Raises:
            CheckpointError: the tokenizer cannot be read.
        """
        text, marks = self.written()
        from tokenizers import Tokenizer as Backend
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast(
            tokenizer_object=Backend.from_str(text),
            model_max_length=TOKENS,
            padding_side="right",
            **marks,
        )

    def _ask(self, what: str, **more: Any) -> Any:
        answer = call_apart(
            f"{_WORKER}:{what}", {"source": _told(self.source), **more}, self.where, self.limits
        )
        if "refused" in answer:
            raise CheckpointError(**answer["refused"])
        return answer["found"]


def _told(source: Path | TensorEntry) -> dict[str, Any]:
    if isinstance(source, Path):
        return {"path": str(source)}
    return {"path": str(source.file), "offset": source.offset, "nbytes": source.nbytes}
