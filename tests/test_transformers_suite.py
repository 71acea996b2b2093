"""The runner of transformers' own tests: how it fills holes in their source, and how it judges what ran."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from .transformers_suite.process import run_tests
from .transformers_suite.report import FAILED, PASSED, SKIPPED, Outcome, differences, render, succeeded
from .transformers_suite.source import PACKAGE, assemble, checkout_tests


def outcomes(**statuses: str) -> dict[str, Outcome]:
    return {test: Outcome(test, status, reason="because") for test, status in statuses.items()}


def test_differences_by_what_each_side_did():
    ours = outcomes(same=PASSED, lost=FAILED, quiet=SKIPPED, broken=FAILED, gained=PASSED, new=PASSED)
    library = outcomes(same=PASSED, lost=PASSED, quiet=PASSED, broken=FAILED, gained=SKIPPED)
    lost, failing, gained = differences(ours, library)
    assert [o.test for o in lost] == ["lost", "quiet"]
    assert [o.test for o in failing] == ["broken"]
    assert [o.test for o in gained] == ["gained"]


@pytest.mark.parametrize(
    ("ours", "library", "good"),
    [
        (PASSED, PASSED, True),
        (SKIPPED, SKIPPED, True),
        (FAILED, FAILED, True),
        (PASSED, FAILED, True),
        (SKIPPED, PASSED, False),
        (FAILED, PASSED, False),
        (FAILED, SKIPPED, False),
    ],
)
def test_success_is_measured_against_the_library(ours, library, good):
    assert succeeded({"half": {"ours": outcomes(t=ours), "library": outcomes(t=library)}}) is good
    if ours == FAILED:
        # Without a baseline nothing excuses a failure.
        assert not succeeded({"half": {"ours": outcomes(t=ours)}})


@pytest.mark.parametrize(("variant", "in_float32", "good"), [("half-0.1", PASSED, True), ("half", PASSED, False)])
def test_rounding_is_excused_where_weights_are_large(variant, in_float32, good):
    ours = outcomes(t=FAILED)
    ours["t"].in_float32 = in_float32
    results = {variant: {"ours": ours, "library": outcomes(t=PASSED)}}
    assert succeeded(results) is good
    assert "in float32: passed" in render("5.23.0", [], results)
    ours["t"].in_float32 = FAILED
    assert not succeeded(results)


def test_a_baseline_of_another_variant_excuses_nothing():
    library = outcomes(passes=PASSED, skips=SKIPPED, fails=FAILED)
    measured = {"ours": outcomes(passes=PASSED, skips=SKIPPED, fails=FAILED), "library": library}
    for test, status, good in (
        ("passes", SKIPPED, False),
        ("skips", SKIPPED, True),
        ("skips", FAILED, False),
        ("fails", FAILED, False),
        ("fails", PASSED, True),
    ):
        results = {"half": {"ours": outcomes(**{test: status})}, "half-0.1": measured}
        assert succeeded(results) is good
        assert "[half] ours is held against what the library's class passes in half-0.1" in render("5", [], results)


def test_a_test_that_hangs_or_dies_has_failed_and_the_others_go_on(tmp_path):
    module = tmp_path / "test_some.py"
    module.write_text(
        """
import os, subprocess, sys, time, unittest
class Some(unittest.TestCase):
    def test_1_passes(self): pass
    def test_2_hangs(self):
        # With a process of its own, as a rank that waits for another; it holds the output open.
        subprocess.run([sys.executable, "-c", "import time; time.sleep(600)"])
    def test_3_fails(self): self.assertEqual(1, 2)
    def test_4_dies(self): os._exit(7)
    def test_5_skips(self): self.skipTest("because")
    def test_6_in_parts(self):
        for part in range(3):
            with self.subTest(part): self.assertLess(part, 2)
    def test_7_passes(self): pass
"""
    )
    started = time.monotonic()
    outcomes, printed = run_tests(["-q", "-p", "no:cacheprovider", str(module)], limit=3)
    assert time.monotonic() - started < 60
    by_test = {outcome.test: outcome for outcome in outcomes}
    assert [outcome.status for outcome in outcomes] == [PASSED, FAILED, FAILED, FAILED, SKIPPED, FAILED, PASSED]
    assert re.match(r"did not end within 3 s, at test_some.py:\d+ in test_2_hangs", by_test["test_2_hangs"].reason)
    assert by_test["test_4_dies"].reason == "ended its process (7)"
    assert by_test["test_3_fails"].reason.startswith("AssertionError: 1 != 2")
    assert by_test["test_5_skips"].reason == "because" and "subprocess.py" in printed


def test_what_cannot_be_collected_is_an_error(tmp_path):
    (tmp_path / "test_some.py").write_text("import nothing_of_this_name\n")
    with pytest.raises(RuntimeError, match="nothing_of_this_name"):
        run_tests(["-q", "-p", "no:cacheprovider", str(tmp_path)], limit=60)
    assert run_tests(["-q", "-k", "absent", "-p", "no:cacheprovider", str(Path(__file__))], limit=60)[0] == []


def write(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def run(folder: Path, code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_holes_are_filled_and_named(tmp_path):
    tests = write(
        tmp_path / "tests",
        {
            "test_modeling_common.py": "from .generation.test_utils import MixinOfTests\nfrom .here import X\n",
            "test_other.py": "from .utils.settings import common_kwargs\nfrom .generation.test_utils import Second\n",
            "here.py": "X = 1\n",
        },
    )
    standins = assemble(tests, tmp_path / "out")
    assert [str(standin) for standin in standins] == [
        "tests/generation/test_utils.py (empty): MixinOfTests, Second",
        "tests/utils/settings.py (empty): common_kwargs",
        "tests/utils/tiny_model_summary.json (empty): tiny checkpoints for the pipeline tests",
    ]
    code = f"from {PACKAGE} import test_modeling_common as a, test_other as b\n"
    code += "print(a.X, a.MixinOfTests.__name__, b.common_kwargs)"
    assert run(tmp_path / "out", code) == "1 MixinOfTests {}"


def test_a_checkout_brings_its_own(tmp_path):
    write(
        tmp_path / "checkout" / "tests",
        {
            "test_modeling_common.py": "from .generation.test_utils import GenerationTesterMixin\n",
            "generation/__init__.py": "",
            # `tests` is ours when they run, and `utils` beside it is no part of the tests.
            "generation/test_utils.py": "from tests.exporters.test_export import Export\n"
            "import tests.exporters.test_export as same\n"
            "class GenerationTesterMixin(Export):\n    real = same.Export is Export\n",
            "exporters/__init__.py": "",
            "exporters/test_export.py": "tests = 1\nclass Export: pass\n",
            "utils/__init__.py": "",
            "utils/test_configuration_utils.py": "import sys\nfrom pathlib import Path\n"
            "sys.path.append(str(Path(__file__).parent.parent.parent / 'utils'))\nfrom test_module import there\n",
            "utils/tiny_model_summary.json": "{}",
        },
    )
    with pytest.raises(FileNotFoundError, match="`utils`"):
        checkout_tests(tmp_path / "checkout")
    write(tmp_path / "checkout" / "utils", {"test_module/__init__.py": "there = 'found'\n"})
    tests = checkout_tests(tmp_path / "checkout")
    assert assemble(tests, tmp_path / "out") == []
    code = f"import {PACKAGE}.utils.test_configuration_utils as u\n"
    code += f"from {PACKAGE}.test_modeling_common import GenerationTesterMixin as g; print(g.real, u.there)"
    assert run(tmp_path / "out", code) == "True found"


def test_a_folder_without_the_tests_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkout of the transformers repository"):
        checkout_tests(tmp_path)
