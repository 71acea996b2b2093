"""Command line: run transformers' own tokenizer tests on `HrmTextTokenizer`, as remote code."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import tempfile
from pathlib import Path

import pytest
import transformers

from tests.transformers_suite.source import PACKAGE, assemble, checkout_tests, default_cache, fetch_tests


EPILOG = """examples:
  python -m tests.transformers_suite.tokenizer
  python -m tests.transformers_suite.tokenizer --transformers-src ~/src/transformers -k chat

exit status: 0 when every test passes or is skipped for a reason that is printed; 1 otherwise; 2 when the tests cannot
be found or a package that they need is missing.
"""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.transformers_suite.tokenizer",
        description="Run transformers' own tokenizer tests on the tokenizer of this repository, as remote code.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--transformers-src", type=Path, metavar="DIR", help="checkout of the transformers repository at that version"
    )
    parser.add_argument("--cache", type=Path, metavar="DIR", help=f"folder for downloaded tests ({default_cache()})")
    parser.add_argument("-k", dest="keyword", metavar="EXPRESSION", help="run the tests that pytest's -k selects")
    options = parser.parse_args(arguments)
    if transformers.__version__.startswith("4."):
        try:
            importlib.import_module("google.protobuf")
        except ImportError:
            print("transformers 4 needs protobuf for these tests: pip install protobuf", file=sys.stderr)
            return 2
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        source = options.transformers_src
        tests = checkout_tests(source) if source else fetch_tests(transformers.__version__, options.cache)
    except (RuntimeError, FileNotFoundError) as error:
        print(error, file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as home:
        assemble(tests, Path(home))
        sample = Path(home) / PACKAGE / "fixtures" / "sample_text.txt"
        if not sample.is_file():  # the source distribution has no fixtures
            sample.parent.mkdir()
            sample.write_text("This is a text.\n\nThis is another one, 2026.\n", encoding="utf-8")
        sys.path.insert(0, home)
        command = ["-q", "-rs", "--tb=short", "--no-header", "-p", "no:cacheprovider", "-W", "ignore", "-m", ""]
        command += ["--confcutdir", home, *(["-k", options.keyword] if options.keyword else [])]
        result = pytest.main([*command, str(Path(__file__).with_name("tokenizer_cases.py"))])
    return 0 if result == pytest.ExitCode.OK else 1


if __name__ == "__main__":
    sys.exit(main())
