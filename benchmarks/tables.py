"""Prints the tables of a result file in Markdown, as benchmarks/README.md has them."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.models import VARIANTS


Rows = list[dict[str, Any]]

EPILOG = """example:
  python -m benchmarks.tables benchmarks/results/cpu_bits.json

exit status: 0 printed, 2 wrong arguments"""
# A section of `benchmarks.compare`, and what stands above its table.
_TITLES = {
    "llama.cpp": "seconds, batch 1",
    "decode": "seconds a step",
    "prefill": "seconds",
    "drafts": "seconds a step",
    "memory": "GB above the weights",
}


def figure(value: float) -> str:
    """Three digits, as far as they are behind the point."""
    return f"{value:.3f}" if value < 1 else f"{value:.2f}" if value < 10 else f"{value:.1f}"


def markdown(head: list[str], lines: list[list[str]]) -> str:
    """A table in Markdown."""
    cells = [head, ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def short(case: str) -> str:
    """A case in as few words as a column's head has room for."""
    for long, brief in (("step at context", "context"), ("prompt of", "prompt"), (" tokens at once", " at once")):
        case = case.replace(long, brief)
    return case


def table(rows: Rows, section: str, show: Callable[[dict[str, Any]], str]) -> str:
    """A line for each variant and a column for each case of a section."""
    mine = [row for row in rows if row["section"] == section and "median" in row]
    # By their numbers: runs may have been joined in any order.
    cases = sorted({row["case"] for row in mine}, key=lambda case: (re.sub(r"\d+", "", case), _numbers(case)))
    if section == "llama.cpp":
        cases.sort(key=lambda case: "prompt" in case)
    variants = list(dict.fromkeys(row["variant"] for row in sorted(mine, key=lambda row: _rank(row["variant"]))))
    found = {(row["variant"], row["case"]): show(row) for row in mine}
    lines = [[name, *(found.get((name, case), "") for case in cases)] for name in variants]
    return markdown([_TITLES[section], *map(short, cases)], lines)


def _numbers(case: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", case)]


def _rank(variant: str) -> tuple[bool, int]:
    """Ours first, from many bits to few."""
    order = (*VARIANTS, "BF16", "Q8_0", "Q4_0", "Q4_K_M")
    name = variant.removeprefix("llama.cpp ")
    return variant.startswith("llama.cpp"), order.index(name) if name in order else len(order)


def quality(rows: Rows) -> str:
    """Bytes of the weights and divergence from float32, a line for each variant."""
    kinds = {
        ("1b", "bytes"): ("GB of the 1B", lambda value: f"{value / 1e9:.2f}"),
        ("nano", "quality"): ("KL, trained Nano", lambda value: f"{value:.1e}"),
        ("1b", "quality"): ("KL, random 1B", lambda value: f"{value:.1e}"),
    }
    found = {
        (row["variant"], (row["size"], row["section"])): row["median"]
        for row in rows
        if (row["size"], row["section"]) in kinds
    }
    variants = sorted({variant for variant, _ in found}, key=_rank)
    lines = [
        [name, *(show(found[name, kind]) if (name, kind) in found else "" for kind, (_, show) in kinds.items())]
        for name in variants
    ]
    return markdown(["weights", *(title for title, _ in kinds.values())], lines)


def speculation(rows: Rows) -> str:
    """What `benchmarks.speculation` measured."""
    lines = [
        [
            row["variant"],
            f"{row['tokens_a_step']:.2f}",
            "" if row["accepted"] is None else f"{row['accepted']:.0%}",
            f"{1000 * row['median']:.2f}",
            f"{row['times_greedy']:.2f}",
        ]
        for row in rows
    ]
    return markdown(["way", "tokens a step", "drafts accepted", "ms a token", "times plain greedy"], lines)


def tables(result: dict[str, Any]) -> list[str]:
    """Every table of a result: of `benchmarks.compare`, or of `benchmarks.speculation`."""
    rows = result["rows"]
    if any(row["section"] == "speculation" for row in rows):
        return [speculation(rows)]
    found = []
    for size in dict.fromkeys(row["size"] for row in rows):
        mine = [row for row in rows if row["size"] == size]
        for section in _TITLES:
            if any(row["section"] == section for row in mine):
                scale = 1e9 if section == "memory" else 1
                found.append(table(mine, section, lambda row, scale=scale: figure(row["median"] / scale)))
    if any(row["section"] == "quality" for row in rows):
        found.append(quality(rows))
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tables",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("file", type=Path, help="JSON of an earlier run")
    options = parser.parse_args(arguments)
    if not options.file.is_file():
        parser.error(f"there is no file {options.file}")
    result = json.loads(options.file.read_text(encoding="utf-8"))
    machine = result["machine"]
    print(
        f"{machine['processor']}, {machine['threads']} threads, torch {machine['torch']}, "
        f"transformers {machine['transformers']}, {machine['date'][:10]}\n"
    )
    print("\n\n".join(tables(result)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
