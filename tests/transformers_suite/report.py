"""What became of the tests, and the report: per variant ours beside the library's class, then every difference."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass


PASSED, SKIPPED, FAILED = "passed", "skipped", "failed"


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
        if outcome.status != PASSED and there == PASSED:
            lost.append(outcome)
        elif outcome.status == FAILED:
            failing.append(outcome)
        elif outcome.status == PASSED and there in (SKIPPED, FAILED):
            gained.append(outcome)
    return lost, failing, gained


def _baseline(results: dict[str, dict[str, dict[str, Outcome]]], variant: str) -> tuple[dict[str, Outcome], str]:
    """The library's outcomes to hold a variant of ours against, and the variant that they come from.

    Where the library's class did not run in that variant, what it passed in another one has to pass; what it skipped
    or failed there excuses nothing here.
    """
    for other in (variant, *results):
        if library := results[other].get("library"):
            kept = (PASSED,) if other != variant else (PASSED, SKIPPED, FAILED)
            return {name: outcome for name, outcome in library.items() if outcome.status in kept}, other
    return {}, variant


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
        library, source = _baseline(results, variant)
        lost, failing, gained = differences(by_implementation.get("ours", {}), library)
        also_failing = [o for o in by_implementation.get("library", {}).values() if o.status == FAILED]
        if source != variant:
            lines += ["", f"[{variant}] ours is held against what the library's class passes in {source}"]
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
        library, _ = _baseline(results, variant)
        lost, failing, _ = differences(by_implementation.get("ours", {}), library)
        failing = [o for o in failing if library.get(o.test) is None or library[o.test].status != FAILED]
        if any(not (variant.endswith("-0.1") and o.in_float32 == PASSED) for o in lost + failing):
            return False
    return True
