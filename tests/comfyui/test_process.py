"""The worker's process from ComfyUI's side, with workers that are a few lines each."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import psutil
import pytest

from penstock.comfy.order import PLAN, NodeOrder
from penstock.comfy.process import Interrupted, Process, WorkerDied, environment

LINES = """
import json, os, signal, sys
def say(**said): print(json.dumps(said), flush=True)
def heard(): return json.loads(sys.stdin.readline() or os._exit(0))
"""
ECHO = (
    LINES + "while True: say(event='x', n=1), say(event='x', n=2), say(state=heard()['run']['id'])"
)
STOPS = LINES + (
    "run = heard()['run']; say(event='ready'); name = heard()['cancel']\n"
    "assert name == run['id']; say(state='stopped')\nheard()"
)
DEAF = LINES + "heard(); say(event='ready')\nwhile True: heard()"
DIES = LINES + "heard(); say(event='ready'); os.kill(os.getpid(), signal.SIGKILL)"
LEAVES = LINES + "heard(); print('half a li', end='', flush=True); sys.exit(3)"
STATION = """
import sys
from penstock.serve.worker import Line, Station, own_output
class Hands:
    def run(self, order, tell):
        tell({"event": "here"})
        while True: pass
    def cancel(self, name): pass
line = Line(own_output())
station = Station(line)
station.listen()
station.work(Hands(), dict)
"""
PARENT = f"""
from penstock.comfy.order import NodeOrder
from penstock.comfy.process import Process
import sys
process = Process((sys.executable, "-c", {STATION!r}))
process.do(NodeOrder("a", "plan"), lambda said: print(process.pid, flush=True), lambda: False)
"""


def order(name: str = "a") -> NodeOrder:
    return NodeOrder(name, PLAN)


@contextmanager
def process(script: str) -> Iterator[Process]:
    made = Process((sys.executable, "-c", script))
    try:
        yield made
    finally:
        made.rest()
    assert made.pid is None


def never() -> bool:
    return False


def once_ready(heard: list[Any], times: int) -> Callable[[], bool]:
    """Yes, so many times, from when the worker has said something on."""
    left = [times]

    def interrupted() -> bool:
        left[0] -= bool(heard)
        return bool(heard) and left[0] >= 0

    return interrupted


def test_what_is_told_is_heard_in_order_and_the_process_stays() -> None:
    with process(ECHO) as worker:
        assert worker.pid is None  # until there is something to do
        heard: list[Any] = []
        assert worker.do(order("one"), heard.append, never) == {"state": "one"}
        pid = worker.pid
        assert worker.do(order("two"), heard.append, never) == {"state": "two"}
        assert worker.pid == pid
        assert [each["n"] for each in heard] == [1, 2, 1, 2]


def test_an_interrupt_stops_the_order_and_keeps_the_process() -> None:
    with process(STOPS) as worker:
        heard: list[Any] = []
        ended = worker.do(order(), heard.append, once_ready(heard, 1))
        assert ended == {"state": "stopped"}
        assert worker.pid is not None


def test_a_second_interrupt_ends_the_process() -> None:
    with process(DEAF) as worker:
        heard: list[Any] = []
        with pytest.raises(Interrupted):
            worker.do(order(), heard.append, once_ready(heard, 2))
        assert worker.pid is None


@pytest.mark.parametrize(
    ("script", "how"), [(DIES, "was ended by signal 9"), (LEAVES, "ended with code 3")]
)
def test_a_process_that_ends_says_how_and_the_next_order_starts_another(
    script: str, how: str
) -> None:
    with process(script) as worker:
        for _ in range(2):
            with pytest.raises(WorkerDied, match=how):
                worker.do(order(), lambda said: None, never)


def test_a_process_that_cannot_be_started_says_so() -> None:
    with pytest.raises(WorkerDied, match="could not be started"):
        Process(("/nowhere/python",)).do(order(), lambda said: None, never)


def test_what_goes_wrong_on_this_side_leaves_no_order_behind() -> None:
    def fail(said: Any) -> None:
        raise ZeroDivisionError

    with process(ECHO) as worker:
        with pytest.raises(ZeroDivisionError):
            worker.do(order(), fail, never)
        assert worker.pid is None
        assert worker.do(order("b"), lambda said: None, never) == {"state": "b"}


def test_orders_take_turns_and_one_that_waits_can_be_interrupted() -> None:
    with process(STOPS) as worker:
        heard: list[Any] = []
        ready, release = threading.Event(), threading.Event()
        ended: list[Any] = []

        def hear(said: Any) -> None:
            heard.append(said)
            ready.set()

        def first() -> None:
            ended.append(worker.do(order("first"), hear, release.is_set))

        thread = threading.Thread(target=first)
        thread.start()
        ready.wait()
        with pytest.raises(Interrupted):
            worker.do(order("second"), heard.append, lambda: True)
        pid = worker.pid
        worker.rest()  # not while it works
        assert worker.pid == pid and psutil.pid_exists(int(pid or 0))
        release.set()
        thread.join()
        assert ended == [{"state": "stopped"}]
        worker.rest()
        assert worker.pid is None and not psutil.pid_exists(int(pid or 0))


def test_the_worker_ends_with_a_parent_that_is_killed() -> None:
    environ = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True, env=environ
    )
    assert parent.stdout is not None
    worker = psutil.Process(int(parent.stdout.readline()))
    parent.kill()
    parent.wait()
    parent.stdout.close()
    psutil.wait_procs([worker])


def test_the_allocator_of_comfyui_is_not_the_workers() -> None:
    theirs = {"PYTORCH_CUDA_ALLOC_CONF": "backend:cudaMallocAsync", "CUDA_VISIBLE_DEVICES": "1"}
    assert environment(theirs) == {"CUDA_VISIBLE_DEVICES": "1", "PYTHONUNBUFFERED": "1"}
