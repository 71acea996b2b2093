"""No test can wait without an end: at its limit a test fails, and the next one runs.

The limit covers a test with the fixtures that are set up for it: the ini setting `test_seconds`, and six times that
for a test marked slow. A main thread that waits in Python is interrupted, so that the report shows where; one that
waits inside a library, which no signal reaches, ends its process a minute later, after the stacks of all threads are
printed. `conftest.py` imports the hooks.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

import pytest


SLOW_FACTOR = 6
# Between the signal and the end of the process, and for the process to end after its last test.
GRACE_SECONDS = 60
_STDERR = pytest.StashKey[int]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addini("test_seconds", "after so many seconds a test has failed", default="600")


def pytest_configure(config: pytest.Config) -> None:
    # pytest keeps what is written to standard error in a file, which is lost with the process.
    capture = config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        config.stash[_STDERR] = os.dup(2)


def pytest_unconfigure(config: pytest.Config) -> None:
    # The interpreter waits for threads and processes that a test left behind. The watchdog lives in C until the end.
    if _STDERR in config.stash:
        faulthandler.dump_traceback_later(GRACE_SECONDS, exit=True, file=config.stash[_STDERR])


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    limit = float(item.config.getini("test_seconds"))
    if item.get_closest_marker("slow"):
        limit *= SLOW_FACTOR

    def stop(number: int, frame: FrameType | None) -> None:
        for child in multiprocessing.active_children():
            child.kill()
        # Once more in a while: what is interrupted may wait again as it cleans up.
        signal.setitimer(signal.ITIMER_REAL, GRACE_SECONDS / 4)
        pytest.fail(f"the test did not end within {limit:g} s")

    in_main = threading.current_thread() is threading.main_thread()
    if in_main:
        before = signal.signal(signal.SIGALRM, stop)
        signal.setitimer(signal.ITIMER_REAL, limit)
    faulthandler.dump_traceback_later(limit + GRACE_SECONDS, exit=True, file=item.config.stash[_STDERR])
    try:
        return (yield)
    finally:
        faulthandler.cancel_dump_traceback_later()
        if in_main:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
