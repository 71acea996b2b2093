"""The core tests on releases that are newer than the pinned ones: `python -m tests.matrix.newest --help`."""

from __future__ import annotations

import argparse
import json
import re
import signal
import sys
from collections import Counter
from pathlib import Path

from packaging.version import Version

from tests.matrix.environments import Row, default_home, make_environment, run_command
from tests.matrix.runs import AREAS, ROOT, run_tests, test_files


PACKAGES = ("transformers", "torch")
# An index that does not answer costs two attempts of fifteen seconds for each package.
LOOK_UP_SECONDS = 120
# It fails on every release that nobody has tried yet, which is why this program runs.
EXPECTED_TO_FAIL = "tests/test_versions.py::test_this_version_is_one_of_those_promised"
EPILOG = """examples:
  python -m tests.matrix.newest
  python -m tests.matrix.newest --constraints constraints.txt --jobs 1

The last line says in one sentence what came of it.

exit status: 0 when there is nothing newer, nothing could be looked up, or every test passed; 1 when a test failed;
2 when the newer releases could not be installed or the tests could not run.
"""


def pinned(constraints: str) -> dict[str, Version]:
    """The pinned releases of transformers and torch.

    Raises:
        ValueError: one of them is not pinned.
    """
    found = dict(re.findall(r"^(\w+)==(\S+)", constraints, re.MULTILINE))
    if missing := [name for name in PACKAGES if name not in found]:
        raise ValueError(f"the constraints do not pin {' and '.join(missing)} with `==`")
    return {name: Version(found[name]) for name in PACKAGES}


def newest(package: str) -> Version:
    """The release that `pip install` would bring to a new environment.

    Raises:
        RuntimeError: the index does not answer, or has none.
    """
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--no-deps", "--quiet"]
    command += ["--disable-pip-version-check", "--retries", "1", "--timeout", "15", "--report", "-", package]
    report = json.loads(run_command(command, LOOK_UP_SECONDS))
    return Version(report["install"][0]["metadata"]["version"])


def in_words(releases: dict[str, Version]) -> str:
    return " and ".join(f"{name} {version.public}" for name, version in releases.items())


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.matrix.newest",
        description="Run the core tests on the newest transformers and torch, where they are newer than the pinned.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--constraints", type=Path, metavar="FILE", default=ROOT / "constraints.txt", help="where the pins are"
    )
    parser.add_argument("--home", type=Path, metavar="DIR", help=f"folder of the environments ({default_home()})")
    parser.add_argument("--jobs", type=int, default=2, help="test processes (2)")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    args = parse_arguments(arguments)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        pins = pinned(args.constraints.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        print(f"test-newest: {error}", file=sys.stderr)
        return 2
    try:
        found = {name: newest(name) for name in PACKAGES}
    except (RuntimeError, LookupError, ValueError) as error:
        print(f"test-newest: could not look up what pip would install: {str(error).strip().splitlines()[-1]}")
        return 0
    # "2.13.0+cpu" is no other release than 2.13.0, and where pip is held back nothing is newer.
    newer = {name: version for name, version in found.items() if version.release > pins[name].release}
    if not newer:
        print(f"test-newest: nothing is newer than the pinned {in_words(pins)}")
        return 0
    tried = {name: newer.get(name, pins[name]) for name in PACKAGES}
    try:
        row = Row(*(tried[name].public for name in PACKAGES))
        environment = make_environment(row, args.home or default_home())
        result = run_tests(environment.python, test_files(list(AREAS)), args.jobs, ["--deselect", EXPECTED_TO_FAIL])
    except RuntimeError as error:
        print(f"{error}\ntest-newest: {in_words(newer)} came out, and the core tests could not run there")
        return 2
    for failure in result["failures"]:
        print(f"{failure} failed")
    counts = sum(result["areas"].values(), Counter())
    beside = (
        "" if len(newer) == len(PACKAGES) else f", with {in_words({n: v for n, v in tried.items() if n not in newer})}"
    )
    ran = counts["passed"] + counts["failed"]
    outcome = f"{counts['failed']} of {ran} core tests fail" if counts["failed"] else f"all {ran} core tests pass"
    print(f"test-newest: {in_words(newer)} came out{beside}: {outcome}")
    return 1 if counts["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
