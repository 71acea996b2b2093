"""Runs pytest in a process of its own, in which neither a test that stands still nor one that dies ends the run."""

from __future__ import annotations

import faulthandler
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tests.transformers_suite.report import FAILED, PASSED, SKIPPED, Outcome


ROOT = Path(__file__).resolve().parents[2]

# A process for each implementation and variant: the mixins choose their skips when imported.
CHILD = """
import sys
import pytest
from tests.transformers_suite.process import Collector
sys.exit(pytest.main(sys.argv[3:], plugins=[Collector(sys.argv[1], float(sys.argv[2]))]))
"""


# To import torch and the mixins, and to collect the tests.
STARTING_SECONDS = 600
_running: set[subprocess.Popen] = set()
_stopping = threading.Event()


class Collector:
    """pytest plugin: writes a line when a test begins and one `Outcome` when it ends.

    A failing subtest or teardown fails its test. A test that takes longer than the limit ends the process, after the
    stacks of its threads are written to `stacks` beside the outcomes. Tests that have an outcome are left out.
    """

    def __init__(self, outcomes: str, limit: float):
        self.path, self.limit = Path(outcomes), limit
        self.known = set(read_outcomes(self.path)[0])
        self.stacks = self.path.with_name("stacks").open("w")

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        items[:] = [item for item in items if item.name not in self.known]

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.outcome = Outcome(nodeid.rsplit("::", 1)[-1], PASSED)
        _append(self.path, {"began": self.outcome.test})
        # A watchdog in C: it bites where every Python thread waits for a lock, too.
        faulthandler.dump_traceback_later(self.limit, file=self.stacks, exit=True)

    def pytest_runtest_logreport(self, report: Any) -> None:
        outcome = self.outcome
        outcome.seconds += report.duration
        if report.failed:
            outcome.status = FAILED
            lines = [line for line in str(report.longrepr).splitlines() if line.startswith("E ")]
            outcome.reason = (lines[0][2:].strip() if lines else f"failed in {report.when}")[:300]
        elif report.skipped and outcome.status == PASSED:
            outcome.status = SKIPPED
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
            outcome.reason = reason.removeprefix("Skipped: ")[:300]

    def pytest_runtest_logfinish(self) -> None:
        faulthandler.cancel_dump_traceback_later()
        _append(self.path, asdict(self.outcome))


def _append(path: Path, record: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def read_outcomes(path: Path) -> tuple[dict[str, Outcome], str | None]:
    """What a collector wrote: test -> outcome, and the test that began and has none, if there is one."""
    outcomes, began = {}, None
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        record = json.loads(line)
        if "began" in record:
            began = record["began"]
        else:
            outcomes[record["test"]] = Outcome(**record)
    return outcomes, began if began not in outcomes else None


def _where(stacks: str) -> str:
    """The place in the tests where the main thread stood; faulthandler writes the innermost frame first."""
    main = stacks.rsplit("Thread 0x", 1)[-1].rsplit("Current thread", 1)[-1]
    frames = re.findall(r'File "([^"]+)", line (\d+) in (\S+)', main)
    inside = [frame for frame in frames if Path(frame[0]).name.startswith("test_")] or frames
    return f", at {Path(inside[0][0]).name}:{inside[0][1]} in {inside[0][2]}" if inside else ""


def _end_session(process: subprocess.Popen) -> None:
    """Ends the process and what it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _wait(process: subprocess.Popen, outcomes: Path, seconds: float) -> int:
    """Waits for the process as long as it writes outcomes; returns its exit code.

    The watchdog in the process sees to its tests; this one sees to what comes before and after them.

    Raises:
        RuntimeError: it wrote nothing for so many seconds.
    """
    written = -1
    while True:
        try:
            return process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            before, written = written, outcomes.stat().st_size if outcomes.is_file() else 0
            if written == before:
                raise RuntimeError(f"pytest stood still for {seconds:.0f} s outside of its tests") from None


def stop_all() -> None:
    """Ends every run of `run_tests` in this process; each raises a RuntimeError in its thread."""
    _stopping.set()
    for process in list(_running):
        _end_session(process)


def run_tests(
    arguments: list[str], limit: float, environment: Mapping[str, str] | None = None
) -> tuple[list[Outcome], str]:
    """Runs pytest with `arguments`; a test that takes longer than `limit` seconds, or ends the process, has failed.

    After such a test a new process goes on with the others.

    Returns:
        The outcomes in the order of the tests, and what pytest printed.

    Raises:
        RuntimeError: pytest did not get as far as running a test.
    """
    printed = ""
    with tempfile.TemporaryDirectory() as scratch:
        path, output = Path(scratch) / "outcomes", Path(scratch) / "output"
        command = [sys.executable, "-c", CHILD, str(path), str(limit), "-p", "no:faulthandler", *arguments]
        while True:
            known = len(read_outcomes(path)[0])
            # No pipe: ranks that a test left behind would keep it open. In a session of their own they can be ended.
            with output.open("w") as file:
                process = subprocess.Popen(
                    command, stdout=file, stderr=subprocess.STDOUT, env=environment, cwd=ROOT, start_new_session=True
                )
            _running.add(process)
            try:
                code = _wait(process, path, limit + STARTING_SECONDS)
            finally:
                _running.discard(process)
                _end_session(process)
            if _stopping.is_set():
                raise RuntimeError("stopped")
            printed += output.read_text(encoding="utf-8", errors="replace")[-60_000:]
            outcomes, stopped = read_outcomes(path)
            if stopped is None:
                break
            stacks = Path(scratch, "stacks").read_text(errors="replace")
            printed += stacks
            reason = f"did not end within {limit:.0f} s{_where(stacks)}" if stacks else f"ended its process ({code})"
            _append(path, asdict(Outcome(stopped, FAILED, reason, limit if stacks else 0.0)))
        # 0: all passed, 1: some failed, 5: none selected, or none left. Anything else is no result.
        if code not in (0, 1, 5) or (code == 1 and len(outcomes) == known):
            raise RuntimeError(printed)
        return list(outcomes.values()), printed
