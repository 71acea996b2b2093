"""One defect in a copy of the repository, and what the tests say of it."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from .mutators import Defect, planted


KILLED, SURVIVED, TIMED_OUT = "killed", "survived", "timed out"
# Where copies of the repository need nothing from.
LEFT_OUT = (
    ".git",
    ".venv",
    "__pycache__",
    ".pytest_cache",
    ".ruff_cache",
    ".hypothesis",
    "build",
    "runs",
    "*.egg-info",
)
# Ids may hold spaces; what follows " - " is the message.
_FAILURE = re.compile(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", re.MULTILINE)
# pytest: all passed, some failed, interrupted (a module that cannot be imported, at -x).
_PASSED, _TOLD = 0, (1, 2)


class NoVerdict(RuntimeError):
    """The tests did not run, so that nothing can be said of a defect."""


@dataclass(frozen=True)
class Verdict:
    """What became of a defect: `outcome`, the test that told (or None), and how long it took in seconds."""

    defect: Defect
    outcome: str
    told_by: str | None
    seconds: float


def copy_repository(root: Path, folder: Path) -> Path:
    """A copy without history, environments and caches; where `root` has links, they are followed."""
    target = folder / "repository"
    shutil.copytree(root, target, ignore=shutil.ignore_patterns(*LEFT_OUT))
    return target


def run_tests(copy: Path, tests: list[str], timeout: float, leave_out: list[str] = (), stop: bool = True) -> tuple:
    """Runs tests in a copy.

    Args:
        copy: root of the repository to test.
        tests: files or ids, from the root.
        timeout: seconds, after which the process and its children are killed.
        leave_out: ids of tests that are not run.
        stop: whether to stop at the first failure.

    Returns:
        The exit status of pytest, None where the time ran out; and what it printed.
    """
    command = [sys.executable, "-m", "pytest", "-q", "--tb=no", "-p", "no:cacheprovider"]
    command += ["-x"] if stop else []
    command += [f"--deselect={name}" for name in leave_out] + tests
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    # No plugin is needed, and a compiled copy of a file could outlive the defect in it.
    environment |= {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        environment.setdefault(name, "1")
    with subprocess.Popen(
        command,
        cwd=copy,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    ) as process:
        try:
            printed, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            printed, _ = process.communicate(timeout=60)
            return None, printed
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    return process.returncode, printed


def failing_tests(copy: Path, tests: list[str], timeout: float) -> list[str]:
    """Ids of the tests that fail without any defect.

    Raises:
        NoVerdict: the tests cannot be run, or not in time.
    """
    status, printed = run_tests(copy, tests, timeout, stop=False)
    if status == _PASSED:
        return []
    failing = _FAILURE.findall(printed)
    if status != 1 or not failing:
        reason = "not in time" if status is None else f"pytest ended with {status}"
        raise NoVerdict(f"the tests do not run without a defect ({reason}):\n{printed[-2000:]}")
    return failing


def try_defect(copy: Path, defect: Defect, tests: list[str], timeout: float, leave_out: list[str]) -> Verdict:
    """Plants a defect in a copy, runs the tests, and puts the file back.

    Raises:
        NotFoundOnce: the defect does not fit the file.
        NoVerdict: no test ran.
    """
    path = copy / defect.file
    source = path.read_text(encoding="utf-8")
    changed = planted(source, defect)
    started = time.perf_counter()
    path.write_text(changed, encoding="utf-8")
    try:
        status, printed = run_tests(copy, tests, timeout, leave_out)
    finally:
        path.write_text(source, encoding="utf-8")
    seconds = round(time.perf_counter() - started, 1)
    if status is None:
        return Verdict(defect, TIMED_OUT, None, seconds)
    if status == _PASSED:
        return Verdict(defect, SURVIVED, None, seconds)
    if status not in _TOLD:
        raise NoVerdict(f"{defect.name}: pytest ended with {status}:\n{printed[-2000:]}")
    told = _FAILURE.search(printed)
    return Verdict(defect, KILLED, told.group(1) if told else None, seconds)
