"""Work that the loop leaves to a thread, and that is over when the task that waits for it is."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

_Result = TypeVar("_Result")


async def to_its_end(work: Callable[..., _Result], *arguments: Any) -> _Result:
    """Return what ``work`` gives, on a thread. Unlike `asyncio.to_thread`, a task that is cancelled
    meanwhile ends when the thread has: what comes after it finds nobody at work."""
    thread = asyncio.get_running_loop().run_in_executor(None, partial(work, *arguments))
    try:
        return await asyncio.shield(thread)
    except asyncio.CancelledError:
        await asyncio.gather(thread, return_exceptions=True)
        raise
