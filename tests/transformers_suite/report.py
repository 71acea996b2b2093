"""Collects what pytest ran and prints it: per variant ours beside the library's class, then every difference."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any


PASSED, SKIPPED, FAILED = "passed", "skipped", "failed"

# Tests of machinery that the library's class has and ours has no use for; they skip themselves.
NOT_APPLICABLE = {
    "test_reverse_loading_mapping": "our parameters carry the names of the file, so nothing is converted",
    "test_can_load_from_already_mapped_keys": "our parameters carry the names of the file, so nothing is converted",
    "test_capture_outputs_decorator": "our loop collects hidden states and attentions itself, without the decorator",
    "test_can_capture_specific_layers_hidden_states": "a list of layers is a feature of that decorator",
}


@dataclass
class Outcome:
    """What became of one test.

    Attributes:
        status: passed, skipped or failed.
        reason: of the latter two.
        seconds: setup and teardown included.
        in_float32: for a failing test of ours, what came of it in float32 in place of half precision.
    """

    test: str
    status: str
    reason: str = ""
    seconds: float = 0.0
    in_float32: str = ""


class Collector:
    """pytest plugin: one `Outcome` for each test; a failing subtest or teardown fails its test."""

    def __init__(self) -> None:
        self.outcomes: dict[str, Outcome] = {}

    def pytest_runtest_logreport(self, report: Any) -> None:
        name = report.nodeid.rsplit("::", 1)[-1]
        outcome = self.outcomes.setdefault(name, Outcome(name, PASSED))
        outcome.seconds += report.duration
        if report.failed:
            outcome.status = FAILED
            lines = [line for line in str(report.longrepr).splitlines() if line.startswith("E ")]
            outcome.reason = (lines[0][2:].strip() if lines else f"failed in {report.when}")[:300]
        elif report.skipped and outcome.status == PASSED:
            outcome.status = SKIPPED
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
            outcome.reason = reason.removeprefix("Skipped: ")[:300]

    def as_json(self) -> list[dict[str, Any]]:
        return [asdict(outcome) for outcome in self.outcomes.values()]


def _counts(outcomes: dict[str, Outcome]) -> str:
    count = Counter(outcome.status for outcome in outcomes.values())
    return f"{len(outcomes):>4} {count[PASSED]:>7} {count[SKIPPED]:>8} {count[FAILED]:>7}"


def differences(
    ours: dict[str, Outcome], library: dict[str, Outcome]
) -> tuple[list[Outcome], list[Outcome], list[Outcome]]:
    """Compares one variant's outcomes.

    Returns:
        Tests that the library's class passes and ours does not; tests that fail for ours and that the library's class
        skips, fails too or does not have; tests that ours passes and the library's class does not.
    """
    lost, failing, gained = [], [], []
    for name, outcome in ours.items():
        there = library[name].status if name in library else None
        if outcome.status == SKIPPED and name in NOT_APPLICABLE:
            continue
        if outcome.status != PASSED and there == PASSED:
            lost.append(outcome)
        elif outcome.status == FAILED:
            failing.append(outcome)
        elif outcome.status == PASSED and there in (SKIPPED, FAILED):
            gained.append(outcome)
    return lost, failing, gained


def _skip_reasons(outcomes: dict[str, Outcome]) -> list[str]:
    """Reasons for skipping with how often each was given, parameters of a reason taken out."""
    reasons = Counter(
        re.sub(r"HrmTextSuite::\S+|`[^`]*`|'[^']*'|\d+", "…", outcome.reason).strip()
        for outcome in outcomes.values()
        if outcome.status == SKIPPED
    )
    return [f"{count:>5}  {reason[:140]}" for reason, count in reasons.most_common()]


def render(version: str, standins: list[str], results: dict[str, dict[str, dict[str, Outcome]]]) -> str:
    """The report as text.

    Args:
        version: version of transformers.
        standins: a line for each module that the source of the tests lacks.
        results: variant -> implementation -> test -> outcome.
    """
    lines = [f"transformers {version}, its own model tests", ""]
    if standins:
        lines += ["Modules that the source of the tests lacks, replaced by stand-ins:"]
        lines += [f"  {standin}" for standin in standins] + [""]
    lines += [f"{'variant':<12} {'class':<8} {'all':>4} {'passed':>7} {'skipped':>8} {'failed':>7} {'seconds':>8}"]
    for variant, by_implementation in results.items():
        for implementation, outcomes in by_implementation.items():
            seconds = sum(outcome.seconds for outcome in outcomes.values())
            lines.append(f"{variant:<12} {implementation:<8} {_counts(outcomes)} {seconds:>8.0f}")
    for variant, by_implementation in results.items():
        ours, library = by_implementation.get("ours", {}), by_implementation.get("library", {})
        lost, failing, gained = differences(ours, library)
        also_failing = [outcome for outcome in library.values() if outcome.status == FAILED]
        sections = (
            ("passed by the library's class, not by ours", lost, True),
            ("failed by ours", failing, True),
            ("failed by the library's class", also_failing, True),
            ("passed by ours, not by the library's class", gained, False),
        )
        for title, outcomes, with_reason in sections:
            if outcomes:
                lines += ["", f"[{variant}] {title}: {len(outcomes)}"]
                for o in outcomes:
                    again = f"; in float32: {o.in_float32}" if o.in_float32 else ""
                    lines.append(f"  {o.test}" + (f" ({o.status}: {o.reason}{again})" if with_reason else ""))
    ours = [o for by in results.values() for o in by.get("ours", {}).values()]
    skipped = sorted({o.test for o in ours if o.status == SKIPPED and o.test in NOT_APPLICABLE})
    if skipped:
        lines += ["", "Skipped by ours because it has no use for what they test:"]
        lines += [f"  {test}: {NOT_APPLICABLE[test]}" for test in skipped]
    for implementation in ("ours", "library"):
        outcomes = next((by[implementation] for by in results.values() if implementation in by), None)
        if outcomes:
            lines += ["", f"Skipped, {implementation} ({next(iter(results))}), with the tests' own reasons:"]
            lines += _skip_reasons(outcomes)
    return "\n".join(lines)


def succeeded(results: dict[str, dict[str, dict[str, Outcome]]]) -> bool:
    """True when ours passes all that the library's class passes, and fails nothing that it does not fail too.

    Where the weights are large (a variant named "...-0.1"), a failure that is gone in float32 was rounding.
    """
    for variant, by_implementation in results.items():
        ours, library = by_implementation.get("ours", {}), by_implementation.get("library", {})
        lost, failing, _ = differences(ours, library)
        failing = [o for o in failing if library.get(o.test) is None or library[o.test].status != FAILED]
        if any(not (variant.endswith("-0.1") and o.in_float32 == PASSED) for o in lost + failing):
            return False
    return True
