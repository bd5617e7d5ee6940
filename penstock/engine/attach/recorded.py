"""Calls of networks that are kept as they are made, and answered from there when they come again.

A pipeline is a program whose only long part are the calls of its networks. Run again from its start
with the same arguments and seed, it asks them the same: what a record answers is not computed, and
no weight is moved for it. What the pipeline draws it draws again, so samplers with noise of their
own go on as well. A call that is asked something else than its record says is an error: something
before it is not what it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial, wraps
from typing import Any

import torch
from torch import nn

from penstock.engine.attach.calls import (
    Asked,
    NotPlain,
    apart,
    asked,
    form_of,
    form_text,
    together,
)
from penstock.engine.run.keeper import JournalKeeper
from penstock.engine.store.journal import Tensors
from penstock.errors import FingerprintMismatch, JournalError


class CallKeeper(JournalKeeper):
    """Keeps a job whose steps are calls of networks."""

    def call(self, number: int) -> tuple[Tensors, dict[str, str]] | None:
        """Return what call ``number`` gave, and what was told of it; None: it is not there, or
        damaged."""
        self.settle()
        return self._journal.load_call(number)

    def save_call(self, number: int, tensors: Tensors, told: Mapping[str, str]) -> None:
        """Save what call ``number`` gave. Returns before it is on the disk.

        Args:
            tensors: nobody else's; let go when they are written.

        Raises:
            StorageError: the one before could not be written.
        """
        self._write_copies(tensors, lambda held: self._journal.save_call(number, held, told))


class Recorder:
    """Answers calls of networks from a job's records, and keeps those that have none.

    Args:
        networks: by name.
        keeper: of the job.
        device: that the networks compute on.
        trusts: take what a call gave also where it is asked other values now.

    Attributes:
        answered: calls that came from records so far.
        computed: calls that did not.
        problems: what was found and worked around, as sentences.
    """

    def __init__(
        self,
        networks: Mapping[str, nn.Module],
        keeper: CallKeeper,
        device: torch.device,
        *,
        trusts: bool = False,
    ) -> None:
        self._networks, self._keeper, self._device = networks, keeper, device
        self._trusts, self._is_inside = trusts, False
        self.answered = self.computed = 0
        self.problems: list[str] = []

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Stand before the networks' forwards inside."""
        with intercepted(self._networks, self._called):
            yield
        self._keeper.settle()

    def _called(self, name: str, run: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if self._is_inside:  # of a network that is kept whole
            return run(*args, **kwargs)
        number = self.answered + self.computed
        try:
            now = asked(args, kwargs)
        except NotPlain as error:
            return self._computed(number, name, partial(run, *args, **kwargs), None, error)
        found = self._kept(number, name, now)
        if found is not None:
            self.answered += 1
            return found[0]
        return self._computed(number, name, partial(run, *args, **kwargs), now, None)

    def _computed(
        self,
        number: int,
        name: str,
        run: Callable[[], Any],
        now: Asked | None,
        why: NotPlain | None,
    ) -> Any:
        self._is_inside = True
        try:
            out = run()
        finally:
            self._is_inside = False
        self.computed += 1
        if now is None:
            self.problems.append(f"call {number} of {name} is not kept: it is given a {why}")
            return out
        try:
            given = apart(out)
        except NotPlain as error:
            self.problems.append(f"call {number} of {name} is not kept: it gives a {error}")
            return out
        self._keeper.settle()  # first: only one copy is alive at a time
        told = {"network": name, "asked": now.form, "values": now.values,
                "form": form_text(given.form)}  # fmt: skip
        self._keeper.save_call(number, given.copied(), told)
        return out

    def _kept(self, number: int, name: str, now: Asked) -> tuple[Any] | None:
        """Return what the record of a call answers; None: there is none.

        Raises:
            FingerprintMismatch: it answers something else.
        """
        kept = self._keeper.call(number)
        if kept is None:
            return None
        tensors, told = kept
        try:
            given = together(form_of(told["form"]), tensors, self._networks[name], self._device)
            then = told["network"], told["asked"], told["values"]
        except (JournalError, KeyError) as error:
            self.problems.append(f"call {number} of {name} is computed again: {error}")
            return None
        if then[:2] != (name, now.form):
            raise FingerprintMismatch([(f"call {number}", then[:2], (name, now.form))])
        if then[2] != now.values:
            if not self._trusts:
                raise FingerprintMismatch(
                    [(f"what call {number} ({name}) is asked", then[2], now.values)]
                )
            self.problems.append(
                f"the result will not be identical: call {number} of {name} is asked other values"
            )
        return (given,)


@contextmanager
def intercepted(
    networks: Mapping[str, nn.Module],
    called: Callable[[str, Callable[..., Any], Any, Any], Any],
) -> Iterator[None]:
    """Let ``called(name, forward, args, kwargs)`` answer for the forwards of networks inside."""
    changed: list[tuple[nn.Module, Any]] = []
    try:
        for name, network in networks.items():
            changed.append((network, vars(network).get("forward")))
            vars(network)["forward"] = _standing_before(name, network.forward, called)
        yield
    finally:
        for network, own in changed:
            if own is None:
                del vars(network)["forward"]
            else:
                vars(network)["forward"] = own


def _standing_before(name: str, forward: Callable[..., Any], called: Any) -> Callable[..., Any]:
    @wraps(forward)  # pipelines look at its signature
    def answer(*args: Any, **kwargs: Any) -> Any:
        return called(name, forward, args, kwargs)

    return answer
