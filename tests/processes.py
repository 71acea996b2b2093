"""Other programs, started by tests so that none of them can be waited for without an end."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path


def end_session(process: subprocess.Popen) -> None:
    """Kills a process that leads a session of its own (`start_new_session=True`), and what it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@contextmanager
def session(*args: object, **kwargs: object) -> Iterator[subprocess.Popen]:
    """`subprocess.Popen` in a session of its own, which is killed at the end of the block."""
    process = subprocess.Popen(*args, start_new_session=True, **kwargs)
    try:
        yield process
    finally:
        end_session(process)
        for stream in (process.stdin, process.stdout, process.stderr):
            if stream is not None:
                with suppress(BrokenPipeError):
                    stream.close()


def run_within(
    command: Sequence[str | Path],
    seconds: float,
    cwd: str | Path | None = None,
    env: Mapping[str, str] | None = None,
    check: bool = False,
) -> subprocess.CompletedProcess[str]:
    """Runs a command without standard input and returns what it printed.

    `subprocess.run(timeout=)` waits on for the output of what the command started; here it is killed too, and nothing
    that outlives the command can hold the output open.

    Raises:
        subprocess.TimeoutExpired: it took longer than `seconds`; its text is in `output` and `stderr`.
        subprocess.CalledProcessError: `check` is set and it failed.
    """
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:

        def text(file: object) -> str:
            file.seek(0)
            return file.read().decode("utf-8", errors="replace")

        with session(command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, cwd=cwd, env=env) as process:
            try:
                code = process.wait(timeout=seconds)
            except subprocess.TimeoutExpired as error:
                end_session(process)
                raise subprocess.TimeoutExpired(command, seconds, text(out), text(err)) from error
        done = subprocess.CompletedProcess(command, code, text(out), text(err))
    if check:
        done.check_returncode()
    return done
