"""Command line of the version matrix."""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections import Counter
from pathlib import Path

from tqdm import tqdm

from tests.matrix.environments import LeftOutError, Row, default_home, make_environment
from tests.matrix.runs import AREAS, run_tests, test_files


# The first and the last release supported, those on either side of a change in the library, and one in the middle; the
# oldest torch, the pinned one and the newest two; three Pythons.
ROWS = (
    Row("4.57.6", "2.8.0", "3.10"),
    Row("4.57.6"),
    Row("5.0.0"),
    Row("5.9.0"),
    Row("5.16.1", "2.8.0", "3.10"),
    Row("5.22.2"),
    Row("5.23.0"),
    Row("5.24.0"),
    Row("5.24.0", "2.14.1"),
    Row("5.24.0", "2.15.0", "3.13"),
)
EPILOG = """examples:
  python -m tests.matrix                      every row
  python -m tests.matrix 4.57.6 5.16.1        two releases, with the torch and the Python that run this program
  python -m tests.matrix 4.57.6/2.8.0 5.24.0/2.15.0/3.13
      with a torch of their own, and the second with a Python of its own
  python -m tests.matrix --json matrix.json --markdown matrix.md
      keep the table and each failing test

A torch of its own is gigabytes where pip brings the CUDA build; rows with the same torch and Python share it. Of the
rows that are not named, those whose Python is not on PATH or whose torch pip may not install are left out, and the
table is followed by the reason.

exit status: 0 when every test passed, 1 when one failed, 2 when an environment could not be made.
"""


def _row(text: str) -> Row:
    try:
        return Row.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.matrix",
        description="Run the core tests on the supported versions of transformers, torch and Python: print a table.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "rows",
        nargs="*",
        type=_row,
        metavar="TRANSFORMERS[/TORCH[/PYTHON]]",
        help=f"({', '.join(map(str, ROWS))})",
    )
    parser.add_argument("--home", type=Path, metavar="DIR", help=f"folder of the environments ({default_home()})")
    parser.add_argument("--areas", nargs="+", choices=list(AREAS), metavar="AREA", help=", ".join(AREAS))
    parser.add_argument("--jobs", type=int, default=2, help="test processes of a row (2)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write counts and failing tests to FILE")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table to FILE")
    return parser.parse_args(arguments)


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
    packages = ["huggingface_hub", "tokenizers", "accelerate"]
    rows = [["transformers", "torch", "Python", *packages, *areas]]
    for row, result in results.items():
        counts = [cell(result["areas"][area]) for area in areas]
        rows.append([*row.split("/"), *(result["packages"][name] for name in packages), *counts])
    rows.insert(1, ["---"] * len(rows[0]))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main(arguments: list[str] | None = None) -> int:
    args = parse_arguments(arguments)
    # The tests run in a session of their own, and would outlive a program that is simply ended.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    files = test_files(args.areas or list(AREAS))
    results, left_out, broken = {}, {}, {}
    for row in tqdm(args.rows or ROWS, unit="row", disable=None):
        try:
            environment = make_environment(row, args.home or default_home())
            results[str(row)] = {"packages": environment.packages, **run_tests(environment.python, files, args.jobs)}
        except RuntimeError as error:
            # What nobody named may be out of reach; what was asked for may not.
            (left_out if isinstance(error, LeftOutError) and not args.rows else broken)[str(row)] = str(error)
    if results:
        print(table(results))
    for row, reason in left_out.items():
        print(f"{row}: left out, {reason}")
    for row, result in results.items():
        for failure in result["failures"]:
            print(f"{row}: {failure} failed")
    for row, result in results.items():
        for reason, count in result["skips"].most_common():
            print(f"{row}: {count} skipped, {reason}")
    for row, error in broken.items():
        print(f"{row}: did not run: {error}", file=sys.stderr)
    if args.json:
        args.json.write_text(json.dumps({**results, "left out": left_out}, indent=1), encoding="utf-8")
    if args.markdown:
        args.markdown.write_text(table(results) + "\n", encoding="utf-8")
    if broken or not results:
        return 2
    return 1 if any(result["failures"] for result in results.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
