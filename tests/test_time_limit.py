"""No test can wait without an end: the limit that ends it, and that what tests start and wait for has limits too."""

from __future__ import annotations

import ast
import os
import re
import sys

from .processes import run_within
from .tiny import ROOT


WAITING = """
import collections, itertools, multiprocessing, pytest, queue, subprocess, sys, threading, time

def test_passes(): pass
def test_queue(): queue.Queue().get()
def test_swallowed():
    try: time.sleep(600)
    except Exception: pass
def test_process():
    process = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(600,))
    process.start()
    process.join()
def test_output():
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.read()
@pytest.fixture
def waiting(): time.sleep(600)
def test_fixture(waiting): pass
@pytest.mark.slow
def test_slow(): time.sleep(3)
def test_passes_too(): pass
def test_library(): collections.deque(itertools.repeat(0), maxlen=0)
"""


def test_what_waits_fails_and_the_others_go_on(tmp_path):
    """Waits in Python are failures of their test; one in a library ends the process, but never a run."""
    (tmp_path / "test_waiting.py").write_text(WAITING)
    (tmp_path / "limited.py").write_text(
        "import tests.time_limit\ntests.time_limit.GRACE_SECONDS = 8\nfrom tests.time_limit import *\n"
    )
    (tmp_path / "pytest.ini").write_text("[pytest]\ntest_seconds = 2\nmarkers = slow\n")
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "-p", "limited", "--tb=no", "-rN"]
    done = run_within([*command, str(tmp_path)], 120, cwd=tmp_path, env=environment)
    outcomes = dict(re.findall(r"test_waiting\.py::(\w+) ([A-Z]+)", done.stdout))
    assert outcomes == {
        **dict.fromkeys(["test_passes", "test_passes_too", "test_slow"], "PASSED"),
        **dict.fromkeys(["test_queue", "test_swallowed", "test_process", "test_output"], "FAILED"),
        "test_fixture": "ERROR",
    }
    assert done.returncode == 1 and "in test_library" in done.stderr


def test_a_thread_that_is_left_behind_does_not_keep_the_process(tmp_path):
    (tmp_path / "test_thread.py").write_text(
        "import threading, time\ndef test_passes(): threading.Thread(target=time.sleep, args=(600,)).start()\n"
    )
    (tmp_path / "limited.py").write_text(
        "import tests.time_limit\ntests.time_limit.GRACE_SECONDS = 2\nfrom tests.time_limit import *\n"
    )
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "limited", str(tmp_path)]
    done = run_within(command, 120, cwd=tmp_path, env=environment)
    assert "1 passed" in done.stdout and done.returncode == 1 and "Timeout" in done.stderr


# What waits for something outside the test, and the argument that bounds it. `Thread(daemon=True)` bounds nothing, but
# the process can end without it.
BOUNDED = {
    "run": "timeout",
    "check_output": "timeout",
    "check_call": "timeout",
    "communicate": "timeout",
    "urlopen": "timeout",
    "spawn": "timeout",
    "TextIteratorStreamer": "timeout",
    "AsyncTextIteratorStreamer": "timeout",
    "OpenAI": "timeout",
    "Thread": "daemon",
}
OWNERS = {"run": "subprocess", "spawn": "pexpect"}


def unbounded(source: str) -> list[str]:
    """The calls in a module that can wait for ever, as "line: call"."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        owner = getattr(getattr(node.func, "value", None), "id", "")
        given = {keyword.arg for keyword in node.keywords}
        if name in BOUNDED and owner == OWNERS.get(name, owner) and BOUNDED[name] not in given:
            found.append(f"{node.lineno}: {name}")
        # `process.wait()` and `thread.join()`, but not `", ".join(words)` nor `wait(timeout=1)`.
        if isinstance(node.func, ast.Attribute) and name in ("wait", "join") and not node.args and not given:
            found.append(f"{node.lineno}: {name}")
    return found


def test_what_can_wait_is_recognized():
    assert unbounded("subprocess.run(['true'])\nprocess.wait()\nThread(target=f)\npexpect.spawn('sh')") == [
        "1: run",
        "2: wait",
        "3: Thread",
        "4: spawn",
    ]
    assert unbounded("run(x)\nsubprocess.run(x, timeout=1)\nt.join(timeout=3)\n' '.join(x)\nmp.spawn(f)") == []


def test_everything_that_tests_wait_for_has_a_limit():
    # The one that runs commands for the others waits for what it has killed.
    paths = [path for path in (ROOT / "tests").rglob("*.py") if path.name != "processes.py"]
    found = {str(path.relative_to(ROOT)): unbounded(path.read_text(encoding="utf-8")) for path in sorted(paths)}
    assert {path: calls for path, calls in found.items() if calls} == {}
