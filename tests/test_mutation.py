"""The program that plants defects: what it makes of a file, what it refuses, and what it says of tests."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from .mutation import __main__ as program
from .mutation.defects import DEFECTS
from .mutation.mutators import MUTATORS, Defect, NotFoundOnce, drawn, generic_defects, planted
from .mutation.trial import KILLED, SURVIVED, TIMED_OUT, NoVerdict, failing_tests, try_defect
from .tiny import ROOT


SOURCE = '''"""Größe: a text with letters of two bytes."""
import time
import torch
LIMIT: int = 3
__all__ = ["inside", "clip"]
def inside(x: int, low: int = 0) -> bool:
    """x > 1 is not an answer."""
    name = "ä"; far = x > LIMIT
    if not far and x >= low:
        return True
    if x < -5:
        raise ValueError(f"{x > 2}")
    return False
def clip(x):
    return torch.where(x > 2, x, 0), min(x, LIMIT), x & 1
'''
TEST = """import time
from room import inside
def test_inside():
    assert inside(3) and not inside(4) and not inside(-1)
"""


@pytest.fixture
def root(tmp_path) -> Path:
    (tmp_path / "room.py").write_text(SOURCE, encoding="utf-8")
    (tmp_path / "test_room.py").write_text(TEST)
    (tmp_path / "conftest.py").write_text("")
    return tmp_path


def test_every_mutator_makes_what_it_says(root):
    found = generic_defects(root, "room.py")
    kinds = {defect.breaks.split(":")[0] for defect in found}
    assert kinds == set(MUTATORS)
    assert len({planted(SOURCE, defect) for defect in found}) == len(found)
    for defect in found:
        changed = planted(SOURCE, defect)
        compile(changed, "room.py", "exec")
        assert changed != SOURCE and "x > 1 is not an answer" in changed and '["inside", "clip"]' in changed
    by_kind = {kind: [d.new for d in found if d.breaks.startswith(f"{kind}:")] for kind in kinds}
    assert "(x >= LIMIT)" in by_kind["comparison"] and "(x <= LIMIT)" in by_kind["comparison"]
    assert by_kind["not"] == ["(far)"] and by_kind["raise"] == ["pass"] and by_kind["pair"] == ["max(x, LIMIT)"]
    assert by_kind["where"] == ["torch.where(x > 2, 0, x)"] and by_kind["and-or"] == ["((not far) or (x >= low))"]
    assert by_kind["sign"] == ["(x | 1)"]


def test_a_draw_is_the_same_for_the_same_seed(root):
    assert drawn(root, ["room.py"], 5, 3) == drawn(root, ["room.py"], 5, 3)
    assert drawn(root, ["room.py"], 5, 3) != drawn(root, ["room.py"], 5, 4)
    assert drawn(root, ["room.py"], 999, 3) == generic_defects(root, "room.py")


@pytest.mark.parametrize(
    "defect",
    [
        Defect("room.py", "no such text", "x", "found nowhere"),
        Defect("room.py", "LIMIT", "LIMITS", "found twice"),
        Defect("room.py", "far = x > LIMIT", "far = x >", "no Python"),
        Defect("room.py", "not far", "not far", "no change"),
        Defect("room.py", "", "x", "empty"),
        Defect("room.py", "not far", "far", "elsewhere", (1, 0)),
    ],
    ids=lambda defect: defect.breaks,
)
def test_what_does_not_fit_is_refused(defect):
    with pytest.raises(NotFoundOnce, match=r"room\.py"):
        planted(SOURCE, defect)


TRIED = {
    KILLED: Defect("room.py", "x > LIMIT", "x >= LIMIT", "3 is far"),
    SURVIVED: Defect("room.py", "x < -5", "x < -6", "-6 is not refused"),
    TIMED_OUT: Defect("room.py", "far = x > LIMIT", "time.sleep(600)", "stands still"),
}


@pytest.mark.parametrize("outcome", TRIED)
def test_what_becomes_of_a_defect(root, outcome):
    timeout = 8 if outcome == TIMED_OUT else 60
    verdict = try_defect(root, TRIED[outcome], ["test_room.py"], timeout, [])
    assert verdict.outcome == outcome
    assert verdict.told_by == ("test_room.py::test_inside" if outcome == KILLED else None)
    assert (root / "room.py").read_text(encoding="utf-8") == SOURCE


def test_a_defect_that_cannot_be_imported_is_told(root):
    defect = Defect("room.py", "import time", "import no_such_module", "no import")
    assert try_defect(root, defect, ["test_room.py"], 60, []).outcome == KILLED


def test_tests_that_fail_by_themselves(root):
    wrong = 'import pytest\n@pytest.mark.parametrize("x", ["of two words"])\n'
    wrong += 'def test_wrong(x):\n    assert False, "why - not"\n'
    (root / "test_room.py").write_text(TEST + wrong)
    assert failing_tests(root, ["test_room.py"], 60) == ["test_room.py::test_wrong[of two words]"]
    with pytest.raises(NoVerdict):
        failing_tests(root, ["no_such_test.py"], 60)
    verdict = try_defect(root, TRIED[SURVIVED], ["test_room.py"], 60, ["test_room.py::test_wrong[of two words]"])
    assert verdict.outcome == SURVIVED


def test_the_program(root, monkeypatch, capsys):
    """Exit status, table and JSON, over a small repository in the place of ours."""
    monkeypatch.setattr(program, "ROOT", root)
    monkeypatch.setattr(program, "DEFECTS", (TRIED[KILLED], TRIED[SURVIVED]))
    common = ["--tests", "test_room.py", "--timeout", "60"]
    files = ["--json", str(root / "out.json"), "--markdown", str(root / "out.md")]
    assert program.main([*common, *files]) == 1
    assert [row["outcome"] for row in json.loads((root / "out.json").read_text())] == [KILLED, SURVIVED]
    assert "| survived | room.py | -6 is not refused |" in (root / "out.md").read_text().splitlines()[2]
    assert program.main([*common, "--only", "3 is far"]) == 0
    assert program.main([*common, "--only", "nothing like it"]) == 2
    monkeypatch.setattr(program, "DEFECTS", (Defect("room.py", "LIMIT", "x", "found twice"),))
    assert program.main(common) == 2
    assert "found 3 times" in capsys.readouterr().err
    for wrong in (
        ["--count", "0"],
        ["--files", "room.py"],
        ["--count", "1", "--files", "nowhere.py"],
        ["--jobs", "0"],
    ):
        with pytest.raises(SystemExit) as exit_:
            program.main(wrong)
        assert exit_.value.code == 2


@pytest.mark.parametrize("defect", DEFECTS, ids=lambda defect: f"{defect.file} {defect.breaks}")
def test_the_listed_defects_fit_the_code(defect):
    planted((ROOT / defect.file).read_text(encoding="utf-8"), defect)


def test_the_core_has_defects_of_every_kind():
    files = [file for file in program.CORE if (ROOT / file).is_file()]
    found = [defect for file in files for defect in generic_defects(ROOT, file)]
    assert {defect.breaks.split(":")[0] for defect in found} == set(MUTATORS)
    assert len(found) > 300
