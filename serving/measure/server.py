"""A server of vLLM in a process of its own."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil


ROOT = Path(__file__).parents[2]
START_SECONDS = 900


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def served(folder: Path, log: Path, *options: str, plugin: bool = True) -> Iterator[tuple[str, int]]:
    """A server of `folder` on loopback, taken down after use with all that it started.

    Args:
        folder: the model.
        log: file for what the server writes.
        options: further ones of the server.
        plugin: whether plug-ins are loaded.

    Yields:
        The address of its OpenAI interface, and its process id.

    Raises:
        RuntimeError: it ends, or does not answer within fifteen minutes.
    """
    port = free_port()
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    command += ["--served-model-name", "hrm", "--host", "127.0.0.1", "--port", str(port), *options]
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }
    environment.update({} if plugin else {"VLLM_PLUGINS": ""})
    with running_server(command, port, log, environment) as process_id:
        yield f"http://127.0.0.1:{port}", process_id


@contextmanager
def running_server(
    command: list[str], port: int, log: Path, environment: dict[str, str] | None = None
) -> Iterator[int]:
    """Runs a command that serves on loopback, and takes it down after use with all that it started.

    Args:
        command: program and arguments.
        port: where it will answer `/health`.
        log: file for what it writes.
        environment: its variables; default: those of this process, offline.

    Yields:
        Its process id.

    Raises:
        RuntimeError: it ends, or does not answer in time.
    """
    environment = environment or {**os.environ, "HF_HUB_OFFLINE": "1"}
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
        try:
            _wait(process, port, log)
            yield process.pid
        finally:
            family = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(30)
            for child in family:
                if child.is_running():
                    child.kill()


def _wait(process: subprocess.Popen, port: int, log: Path) -> None:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end:
        if process.poll() is not None:
            raise RuntimeError(f"the server ended with {process.returncode}:\n{log.read_text()[-4000:]}")
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    raise RuntimeError(f"the server did not answer within {START_SECONDS} s:\n{log.read_text()[-4000:]}")
