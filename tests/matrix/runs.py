"""The core tests in one environment."""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
import xml.etree.ElementTree
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.processes import run_within


ROOT = Path(__file__).resolve().parents[2]
# What has to hold everywhere, by the columns of the table. What does not touch transformers (unsafe checkpoints, bad
# input, publishing) is tested once, on the pinned pair.
AREAS = {
    "parity": ("test_reference.py", "test_in_library.py", "test_model.py", "test_heads.py", "test_versions.py"),
    "one answer": ("test_one_answer*.py", "test_cache.py", "test_continuous_batching.py"),
    "conversion": ("test_convert_sources.py", "test_convert_output.py", "test_convert_verify.py"),
    "tokenizer": ("test_tokenizer.py", "test_chat.py"),
    "pipeline": ("test_pipeline.py",),
    "Nano": ("test_nano*.py",),
}
# Two to five minutes on two quiet cores.
RUN_SECONDS = 3600


def test_files(areas: Sequence[str]) -> dict[str, str]:
    """Test module -> the area it belongs to."""
    return {
        path.stem: area for area in areas for pattern in AREAS[area] for path in sorted((ROOT / "tests").glob(pattern))
    }


test_files.__test__ = False  # no test, in spite of its name


def run_tests(python: Path, files: dict[str, str], jobs: int, options: Sequence[str] = ()) -> dict[str, Any]:
    """Runs the test files with an interpreter.

    Returns:
        `areas`: area -> counts of passed, skipped and failed; `failures`: ids of failing tests; `skips`: reason ->
        count; `seconds`.

    Raises:
        RuntimeError: pytest did not get as far as a report.
    """
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.xml"
        environment = dict(os.environ, HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
        environment.setdefault("OMP_NUM_THREADS", "1")
        command = [str(python), "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}"]
        # One module that a version cannot import must not hide the others.
        command += ["--continue-on-collection-errors", *options]
        command += ["-n", str(jobs), "--dist", "loadfile"] if jobs > 1 else []
        command += [f"tests/{name}.py" for name in files]
        started = time.perf_counter()
        try:
            done = run_within(command, RUN_SECONDS, cwd=ROOT, env=environment)
        except subprocess.TimeoutExpired as error:
            shown = (error.stdout + error.stderr)[-3000:]
            raise RuntimeError(f"the tests did not end within {RUN_SECONDS} s:\n{shown}") from error
        seconds = time.perf_counter() - started
        if done.returncode not in (0, 1) or not report.is_file():
            raise RuntimeError(f"pytest ended with {done.returncode}:\n{(done.stdout + done.stderr)[-3000:]}")
        areas: dict[str, Counter] = {area: Counter() for area in dict.fromkeys(files.values())}
        failures, skips = [], Counter()
        for case in xml.etree.ElementTree.parse(report).iter("testcase"):
            module = case.get("classname", "").split(".")
            area = next((files[part] for part in module if part in files), None)
            # A module that cannot be imported is reported under its own name.
            area = area or files.get(Path(case.get("name", "").replace(".", "/")).name) or "others"
            areas.setdefault(area, Counter())
            if (skip := case.find("skipped")) is not None:
                areas[area]["skipped"] += 1
                skips[skip.get("message", "")] += 1
            elif case.find("failure") is not None or case.find("error") is not None:
                areas[area]["failed"] += 1
                failures.append(f"{case.get('classname')}::{case.get('name')}")
            else:
                areas[area]["passed"] += 1
    return {"areas": areas, "failures": failures, "skips": skips, "seconds": round(seconds)}
