"""Command line of the version matrix."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree
from collections import Counter
from pathlib import Path

from tqdm import tqdm

from tests.matrix.environments import default_home, make_environment


ROOT = Path(__file__).resolve().parents[2]
# The first and the last release supported, those on either side of a change in the library, and one in the middle.
VERSIONS = ("4.57.6", "5.0.0", "5.9.0", "5.16.1", "5.22.2", "5.23.0")
# What has to hold everywhere, by the columns of the table. What does not touch transformers (unsafe checkpoints, bad
# input, publishing) is tested once, on the newest.
AREAS = {
    "parity": ("test_reference.py", "test_in_library.py", "test_model.py", "test_heads.py", "test_versions.py"),
    "one answer": ("test_one_answer*.py", "test_cache.py", "test_attention*.py"),
    "conversion": ("test_convert_sources.py", "test_convert_output.py", "test_convert_verify.py"),
    "tokenizer": ("test_tokenizer.py", "test_chat.py"),
    "pipeline": ("test_pipeline.py",),
    "Nano": ("test_nano*.py",),
}
# A version takes two to five minutes on two cores.
RUN_SECONDS = 1800
EPILOG = """examples:
  python -m tests.matrix                        every supported version
  python -m tests.matrix 4.57.6 5.16.1          two of them
  python -m tests.matrix --json matrix.json --markdown matrix.md
      keep the table and each failing test

exit status: 0 when every test passed, 1 when one failed, 2 when an environment could not be made.
"""


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.matrix",
        description="Run the core tests on every supported version of transformers and print a table.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "versions", nargs="*", metavar="VERSION", help=f"releases of transformers ({', '.join(VERSIONS)})"
    )
    parser.add_argument("--home", type=Path, metavar="DIR", help=f"folder of the environments ({default_home()})")
    parser.add_argument("--areas", nargs="+", choices=list(AREAS), metavar="AREA", help=", ".join(AREAS))
    parser.add_argument("--jobs", type=int, default=2, help="test processes of a version (2)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write counts and failing tests to FILE")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table to FILE")
    return parser.parse_args(arguments)


def test_files(areas: list[str]) -> dict[str, str]:
    """Test module -> the area it belongs to."""
    return {
        path.stem: area for area in areas for pattern in AREAS[area] for path in sorted((ROOT / "tests").glob(pattern))
    }


def run_tests(python: Path, files: dict[str, str], jobs: int) -> dict:
    """Runs the test files with an interpreter.

    Returns:
        `areas`: area -> counts of passed, skipped and failed; `failures`: ids of failing tests; `skips`: reason ->
        count; `seconds`.

    Raises:
        RuntimeError: pytest did not get as far as a report.
    """
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.xml"
        environment = dict(os.environ, HF_HUB_OFFLINE="1", HF_MODULES_CACHE=f"{scratch}/modules")
        environment.setdefault("OMP_NUM_THREADS", "1")
        command = [str(python), "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}"]
        # One module that a version cannot import must not hide the others.
        command += ["--continue-on-collection-errors"]
        command += ["-n", str(jobs), "--dist", "loadfile"] if jobs > 1 else []
        command += [f"tests/{name}.py" for name in files]
        started = time.perf_counter()
        # A test that stands still shows where, and the whole run is given up in the end.
        command += ["-o", "faulthandler_timeout=300"]
        try:
            done = subprocess.run(
                command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=RUN_SECONDS
            )
        except subprocess.TimeoutExpired as error:
            shown = ((error.stdout or b"") + (error.stderr or b"")).decode(errors="replace")
            raise RuntimeError(f"the tests did not end within {RUN_SECONDS} s:\n{shown[-3000:]}") from error
        seconds = time.perf_counter() - started
        if done.returncode not in (0, 1) or not report.is_file():
            raise RuntimeError(f"pytest ended with {done.returncode}:\n{(done.stdout + done.stderr)[-3000:]}")
        areas = {area: Counter() for area in dict.fromkeys(files.values())}
        failures, skips = [], Counter()
        for case in xml.etree.ElementTree.parse(report).iter("testcase"):
            module = case.get("classname", "").split(".")
            area = next((files[part] for part in module if part in files), None)
            # A module that cannot be imported is reported under its own name.
            area = area or files.get(Path(case.get("name", "").replace(".", "/")).name)
            if (skip := case.find("skipped")) is not None:
                areas[area]["skipped"] += 1
                skips[skip.get("message", "")] += 1
            elif case.find("failure") is not None or case.find("error") is not None:
                areas[area]["failed"] += 1
                failures.append(f"{case.get('classname')}::{case.get('name')}")
            else:
                areas[area]["passed"] += 1
    return {"areas": areas, "failures": failures, "skips": skips, "seconds": round(seconds)}


def cell(counts: Counter) -> str:
    text = (
        f"{counts['failed']} of {counts['failed'] + counts['passed']} fail"
        if counts["failed"]
        else str(counts["passed"])
    )
    return text + (f" ({counts['skipped']} skipped)" if counts["skipped"] else "")


def table(results: dict[str, dict]) -> str:
    """The results as a Markdown table; a number alone is a number of tests that passed, with none failing."""
    areas = list(dict.fromkeys(area for result in results.values() for area in result["areas"]))
    rows = [["transformers", "huggingface_hub", "tokenizers", "accelerate", *areas]]
    for version, result in results.items():
        packages = result["packages"]
        counts = [cell(result["areas"][area]) for area in areas]
        rows.append([version, packages["huggingface_hub"], packages["tokenizers"], packages["accelerate"], *counts])
    rows.insert(1, ["---"] * len(rows[0]))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main(arguments: list[str] | None = None) -> int:
    args = parse_arguments(arguments)
    files = test_files(args.areas or list(AREAS))
    results = {}
    try:
        for wanted in tqdm(args.versions or VERSIONS, unit="version", disable=None):
            environment = make_environment(wanted, args.home or default_home())
            results[wanted] = {"packages": environment.packages, **run_tests(environment.python, files, args.jobs)}
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 2
    print(table(results))
    for version, result in results.items():
        for failure in result["failures"]:
            print(f"{version}: {failure} failed")
    for version, result in results.items():
        for reason, count in result["skips"].most_common():
            print(f"{version}: {count} skipped, {reason}")
    if args.json:
        args.json.write_text(json.dumps(results, indent=1), encoding="utf-8")
    if args.markdown:
        args.markdown.write_text(table(results) + "\n", encoding="utf-8")
    return 1 if any(result["failures"] for result in results.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
