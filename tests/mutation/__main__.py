"""Command line of the mutation program."""

from __future__ import annotations

import argparse
import json
import queue
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from .defects import DEFECTS
from .mutators import Defect, NotFoundOnce, drawn, planted
from .trial import KILLED, SURVIVED, TIMED_OUT, NoVerdict, Verdict, copy_repository, failing_tests, try_defect


ROOT = Path(__file__).resolve().parents[2]
# The rooms whose defects change answers: those of them that are there.
CORE = tuple(
    f"{name}_hrm_text.py"
    for name in (
        *("layout", "reading", "attention", "cache", "generation"),
        *("modeling", "kernels", "decoding", "inference"),
    )
)
# What is fast and tells most, the quickest to tell first.
TESTS = (
    "test_planted_defects.py",
    "test_cache_facts.py",
    "test_one_answer_conversations.py",
    "test_adjacent_blocks.py",
    "test_one_answer.py",
    "test_one_answer_refusals.py",
    "test_cache_calls.py",
    "test_cache.py",
    "test_model.py",
    "test_gradient_steps.py",
    "test_cache_generate.py",
    "test_decoding.py",
    "test_compiled_decoding.py",
    "test_one_answer_backends.py",
    "test_model_faults.py",
)
EPILOG = """examples:
  python -m tests.mutation                                  the defects listed in tests/mutation/defects.py
  python -m tests.mutation --only layout --jobs 2           those whose file or effect names it
  python -m tests.mutation --count 40 --seed 3              40 defects from the syntax of the core, drawn by a seed
  python -m tests.mutation --count 10 --files cache_hrm_text.py --json mutation.json --markdown mutation.md

exit status: 0 when every defect was told, 1 when one survived, 2 when one does not fit its file or the tests cannot
run.
"""


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.mutation",
        description="Plant defects in copies of the repository, one at a time, and list what the tests let pass.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--count", type=int, metavar="N", help="draw N defects from the syntax of the core instead")
    parser.add_argument("--seed", type=int, default=0, help="of the draw (0)")
    parser.add_argument("--files", nargs="+", metavar="FILE", help="draw from these files (the rooms of the core)")
    parser.add_argument("--only", metavar="WORD", help="defects whose file or effect holds WORD")
    parser.add_argument("--tests", nargs="+", metavar="TEST", help="test files or ids (the fast tests of the core)")
    parser.add_argument("--jobs", type=int, default=1, help="defects that are tried at a time (1)")
    parser.add_argument("--timeout", type=float, default=600, help="seconds for the tests of one defect (600)")
    parser.add_argument("--leave-out-failing", action="store_true", help="go on without tests that fail by themselves")
    parser.add_argument("--list", action="store_true", help="print the defects and try none")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every verdict to FILE")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table to FILE")
    chosen = parser.parse_args(arguments)
    if chosen.jobs < 1 or chosen.timeout <= 0 or (chosen.count is not None and chosen.count < 1):
        parser.error("--jobs, --timeout and --count take numbers above 0")
    if chosen.files and chosen.count is None:
        parser.error("--files is of --count: the listed defects name their files")
    for file in chosen.files or ():
        if not (ROOT / file).is_file():
            parser.error(f"--files: there is no {file}")
    return chosen


def chosen_defects(chosen: argparse.Namespace) -> list[Defect]:
    """The defects that were asked for, each of which fits its file.

    Raises:
        NotFoundOnce: one does not, with the names of all that do not.
    """
    if chosen.count is not None:
        files = chosen.files or [file for file in CORE if (ROOT / file).is_file()]
        found = drawn(ROOT, files, chosen.count, chosen.seed)
    else:
        found = list(DEFECTS)
    if chosen.only:
        found = [defect for defect in found if chosen.only in defect.name]
    wrong = []
    for defect in found:
        try:
            planted((ROOT / defect.file).read_text(encoding="utf-8"), defect)
        except (NotFoundOnce, OSError) as error:
            wrong.append(str(error))
    if wrong or not found:
        raise NotFoundOnce("\n".join(wrong) or "no defect was chosen")
    return found


def try_all(
    found: list[Defect], tests: list[str], jobs: int, timeout: float, leave_out_failing: bool
) -> Iterable[Verdict]:
    """Verdicts as they come, from `jobs` copies of the repository.

    Raises:
        NoVerdict: tests fail without any defect (and may not be left out), or do not run.
    """
    with tempfile.TemporaryDirectory(prefix="mutation_", ignore_cleanup_errors=True) as folder:
        copies: queue.SimpleQueue[Path] = queue.SimpleQueue()
        for job in range(min(jobs, len(found))):
            copies.put(copy_repository(ROOT, Path(folder) / str(job)))
        first = copies.get()
        failing = failing_tests(first, tests, timeout)
        copies.put(first)
        if failing and not leave_out_failing:
            raise NoVerdict(
                f"{len(failing)} tests fail without any defect, {failing[0]} first: mend them, choose others with "
                "--tests, or go on without them with --leave-out-failing."
            )
        if failing:
            print(f"{len(failing)} tests fail without any defect and are left out", file=sys.stderr)

        def one(defect: Defect) -> Verdict:
            copy = copies.get()
            try:
                return try_defect(copy, defect, tests, timeout, failing)
            finally:
                copies.put(copy)

        with ThreadPoolExecutor(max_workers=jobs) as pool:
            yield from pool.map(one, found)


def table(verdicts: list[Verdict]) -> str:
    """Markdown, what survived first."""
    order = {SURVIVED: 0, TIMED_OUT: 1, KILLED: 2}
    lines = ["| outcome | file | defect | told by |", "| --- | --- | --- | --- |"]
    for verdict in sorted(verdicts, key=lambda verdict: (order[verdict.outcome], verdict.defect.name)):
        defect = verdict.defect
        line = "" if defect.place is None else f":{defect.place[0]}"
        cells = (verdict.outcome, f"{defect.file}{line}", defect.breaks, verdict.told_by or "")
        lines.append("| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def as_json(verdicts: list[Verdict]) -> str:
    rows = [
        {
            "file": verdict.defect.file,
            "place": verdict.defect.place,
            "old": verdict.defect.old,
            "new": verdict.defect.new,
            "breaks": verdict.defect.breaks,
            "outcome": verdict.outcome,
            "told_by": verdict.told_by,
            "seconds": verdict.seconds,
        }
        for verdict in verdicts
    ]
    return json.dumps(rows, indent=1) + "\n"


def main(arguments: list[str] | None = None) -> int:
    chosen = parse_arguments(arguments)
    tests = chosen.tests or [f"tests/{name}" for name in TESTS if (ROOT / "tests" / name).is_file()]
    verdicts: list[Verdict] = []
    try:
        found = chosen_defects(chosen)
        if chosen.list:
            print("\n".join(defect.name for defect in found))
            return 0
        tried = try_all(found, tests, chosen.jobs, chosen.timeout, chosen.leave_out_failing)
        for verdict in tqdm(tried, total=len(found), unit="defect"):
            verdicts.append(verdict)
            if verdict.outcome == SURVIVED:
                tqdm.write(f"survived: {verdict.defect.name}")
    except (NotFoundOnce, NoVerdict) as error:
        print(error, file=sys.stderr)
        return 2
    finally:
        if chosen.json and verdicts:
            chosen.json.write_text(as_json(verdicts), encoding="utf-8")
        if chosen.markdown and verdicts:
            chosen.markdown.write_text(table(verdicts), encoding="utf-8")
    counts = Counter(verdict.outcome for verdict in verdicts)
    print(", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items())))
    return int(counts[SURVIVED] > 0)


if __name__ == "__main__":
    sys.exit(main())
