"""Command line of the suite."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import transformers
from tqdm import tqdm

from tests.transformers_suite.process import run_tests, stop_all
from tests.transformers_suite.report import FAILED, Outcome, render, succeeded
from tests.transformers_suite.source import assemble, checkout_tests, default_cache, fetch_tests
from tests.transformers_suite.testers import CAUSAL_LM, DEFAULT_VARIANTS, LIBRARY, OURS, ROOT, VARIANTS


EPILOG = """examples:
  python -m tests.transformers_suite
      ours and the library's class, four variants, on the tests of the installed version's source distribution
  python -m tests.transformers_suite --transformers-src ~/src/transformers
      the same on a checkout, which adds the generation and export tests, and the library's test case for its own
      class as one more variant, "causal-lm"
  python -m tests.transformers_suite --baseline-variants half-0.1
      the library's class in one variant, which ours is held against in the others too: a third less work
  python -m tests.transformers_suite --only ours --variants half-0.1 --slow -k compile
      one variant of ours, slow tests included, tests whose name contains "compile"

What ours fails is run once more in float32. At initializer_range 0.1 a comparison in half precision that passes there
differed by rounding, and is excused.

exit status: 0 when ours passes all that the library's class passes and fails nothing else; 1 otherwise; 2 when the
tests cannot be found or pytest cannot run them.
"""


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.transformers_suite",
        description="Run transformers' own model tests on the classes of this repository, as remote code.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--transformers-src", type=Path, metavar="DIR", help="checkout of the transformers repository at that version"
    )
    parser.add_argument(
        "--cache", type=Path, metavar="DIR", default=None, help=f"folder for downloaded tests ({default_cache()})"
    )
    parser.add_argument(
        "--variants",
        nargs="+",
        choices=list(VARIANTS),
        default=list(DEFAULT_VARIANTS),
        metavar="NAME",
        help=f"{', '.join(VARIANTS)} ({' '.join(DEFAULT_VARIANTS)})",
    )
    parser.add_argument(
        "--baseline-variants",
        nargs="+",
        choices=list(VARIANTS),
        metavar="NAME",
        help="run the library's class in these only, and hold ours against them in all (all that are run)",
    )
    parser.add_argument("--only", choices=(OURS, LIBRARY), help="run one implementation instead of both")
    parser.add_argument("-k", dest="keyword", metavar="EXPRESSION", help="run the tests that pytest's -k selects")
    parser.add_argument("--slow", action="store_true", help="run the tests that the library marks slow")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time (2)")
    parser.add_argument(
        "--test-timeout", type=float, default=300, metavar="SECONDS", help="after which a test has failed (300)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every outcome to FILE")
    parser.add_argument("--verbose", action="store_true", help="show pytest's own output of failing tests")
    return parser.parse_args(arguments)


def run_case(
    package_home: Path,
    implementation: str,
    variant: str,
    args: argparse.Namespace,
    keyword: str | None = None,
    float32: bool = False,
) -> tuple[list[Outcome], str]:
    """Runs the test case for one implementation and variant; returns its outcomes and pytest's output.

    Args:
        package_home: folder that holds the package of `assemble`.
        keyword: the tests to run, as pytest's -k takes them; None for those of the command line.
        float32: compute in float32 where the tests ask for half precision.

    Raises:
        RuntimeError: pytest did not get as far as running tests.
    """
    with tempfile.TemporaryDirectory() as scratch:
        environment = dict(
            os.environ,
            HRM_TEXT_SUITE_IMPLEMENTATION=implementation,
            HRM_TEXT_SUITE_VARIANT=variant,
            PYTHONPATH=os.pathsep.join([str(package_home), str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(":"),
            HF_HUB_OFFLINE="1",
            # Processes side by side must not copy remote code into one folder, nor share compiled kernels.
            HF_MODULES_CACHE=f"{scratch}/modules",
            TORCHINDUCTOR_CACHE_DIR=f"{scratch}/inductor",
            RUN_SLOW="1" if args.slow else "0",
            HRM_TEXT_SUITE_FLOAT32="1" if float32 else "",
            CUDA_VISIBLE_DEVICES="",
        )
        environment.setdefault("OMP_NUM_THREADS", "1")
        # The mixins bring markers and habits of their own, so neither our settings nor our conftest apply.
        settings = Path(scratch) / "pytest.ini"
        settings.write_text("[pytest]\n")
        options = ["-q", "-p", "no:cacheprovider", "--no-header", "--tb=short", "-W", "ignore"]
        options += ["-c", str(settings), "--rootdir", str(ROOT), "--confcutdir", scratch]
        keyword = keyword or args.keyword
        options += ["-k", keyword] if keyword else []
        cases = str(Path(__file__).with_name("causal_lm_cases.py" if variant == CAUSAL_LM else "cases.py"))
        try:
            return run_tests([*options, cases], args.test_timeout, environment)
        except RuntimeError as error:
            raise RuntimeError(f"pytest could not run {implementation}, {variant}:\n{error}") from error


def repeat_in_float32(package_home: Path, results: dict, args: argparse.Namespace) -> None:
    """Runs what ours failed once more without half precision, and notes on each outcome what came of it."""
    for variant, by_implementation in results.items():
        failing = {test: o for test, o in by_implementation.get(OURS, {}).items() if o.status == FAILED}
        if failing:
            again, _ = run_case(package_home, OURS, variant, args, keyword=" or ".join(failing), float32=True)
            for outcome in again:
                if outcome.test in failing:
                    failing[outcome.test].in_float32 = outcome.status


def run_all(
    package_home: Path, pool: ThreadPoolExecutor, implementations: list[str], args: argparse.Namespace
) -> dict:
    """variant -> implementation -> test -> outcome."""
    measured = [*(args.baseline_variants or args.variants), CAUSAL_LM]
    runs = [(v, name) for v in args.variants for name in implementations if name == OURS or v in measured]
    waiting = {run: pool.submit(run_case, package_home, run[1], run[0], args) for run in runs}
    results: dict = {variant: {} for variant in args.variants}
    for (variant, name), future in tqdm(waiting.items(), unit="run", disable=None):
        outcomes, printed = future.result()
        results[variant][name] = {outcome.test: outcome for outcome in outcomes}
        if args.verbose:
            print(printed)
    repeat_in_float32(package_home, results, args)
    return results


def main(arguments: list[str] | None = None) -> int:
    args = parse_arguments(arguments)
    # Processes that run tests have sessions of their own, and would outlive a program that is simply ended.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    implementations = [args.only] if args.only else [OURS, LIBRARY]
    if LIBRARY in implementations and not hasattr(transformers, "HrmTextForCausalLM"):
        print(f"transformers {transformers.__version__} has no HRM-Text class of its own: no baseline to measure")
        implementations.remove(LIBRARY)
    try:
        if args.transformers_src:
            tests = checkout_tests(args.transformers_src)
            if (tests / "models" / "hrm_text" / "test_modeling_hrm_text.py").is_file():
                args.variants = [*args.variants, CAUSAL_LM]
        else:
            tests = fetch_tests(transformers.__version__, args.cache)
        with tempfile.TemporaryDirectory() as home, ThreadPoolExecutor(args.jobs) as pool:
            try:
                standins = assemble(tests, Path(home))
                results = run_all(Path(home), pool, implementations, args)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                stop_all()
                raise
    except (RuntimeError, FileNotFoundError) as error:
        print(error, file=sys.stderr)
        return 2
    print(render(transformers.__version__, [str(standin) for standin in standins], results))
    if args.json:
        plain = {v: {i: [vars(o) for o in tests.values()] for i, tests in by.items()} for v, by in results.items()}
        args.json.write_text(json.dumps({"transformers": transformers.__version__, "results": plain}, indent=1))
    return 0 if succeeded(results) else 1


if __name__ == "__main__":
    sys.exit(main())
