"""Judges HRM-Text-Nano on fresh questions whose operands it was not trained on, and prints a table.

Beside the model as it is stands the same model with the prefix mask left out, and with one cycle of the slow or the
fast stack: what mask and recurrence are worth.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer

from .answers import answer
from .hub_folder import ROOT
from .nano_tasks import CONDITIONS, TASKS, draw, final_answer


# Name of a column, overrides of the config, whether prompts are prefix blocks.
VARIANTS: dict[str, tuple[dict[str, int], bool]] = {
    "Nano": ({}, True),
    "no prefix mask": ({}, False),
    "H_cycles 1": ({"H_cycles": 1}, True),
    "L_cycles 1": ({"L_cycles": 1}, True),
}

Table = dict[str, dict[str, float]]


def evaluate(
    model: Any, tokenizer: Any, count: int, seed: int, prefix: bool = True, tasks: Sequence[str] = TASKS
) -> dict[str, float]:
    """Share of right answers for each "task/condition", and their mean as "overall".

    Args:
        model, tokenizer: Nano's.
        count: questions for each task and condition.
        seed: seed of the questions.
        prefix: whether prompts are read in both directions.
        tasks: what to ask.
    """
    shares = {}
    for task in tasks:
        for condition in CONDITIONS:
            rng = Random(f"{seed} {task} {condition}")
            asked = [draw(task, rng, held_out=True) for _ in range(count)]
            encoded = tokenizer.encode_prompt([question.instruction for question in asked], condition)
            prompts = [
                {"input_ids": ids, "token_type_ids": types}
                for ids, types in zip(encoded["input_ids"], encoded["token_type_ids"])
            ]
            # Room for the longest right answer; what is still being written then is wrong.
            longest = max(len(tokenizer(question.response(condition))["input_ids"]) for question in asked) + 1
            texts = answer(model, tokenizer, prompts, longest, prefix=prefix, progress=f"{task}, {condition}")
            right = sum(final_answer(text, condition) == question.answer for text, question in zip(texts, asked))
            shares[f"{task}/{condition}"] = right / count
    shares["overall"] = sum(shares.values()) / len(shares)
    return shares


def markdown(table: Table) -> str:
    """A table in Markdown: a line for each task and condition, a column for each variant, in per cent."""
    columns = list(table)
    lines = [
        "| task | condition | " + " | ".join(columns) + " |",
        "| --- | --- |" + " ---: |" * len(columns),
    ]
    for name in table[columns[0]]:
        task, _, condition = name.partition("/")
        values = " | ".join(f"{100 * table[column][name]:.1f}" for column in columns)
        lines.append(f"| {task} | {condition} | {values} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit code: 0 done, 2 wrong arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m training.evaluate",
        description="Accuracy of HRM-Text-Nano on fresh held-out questions, in per cent.",
        epilog="example: python -m training.evaluate --count 500 --output nano.json",
    )
    parser.add_argument("--model", default=str(ROOT), help="model folder (default: the root of the repository)")
    parser.add_argument("--count", type=int, default=500, help="questions a task and condition (default %(default)s)")
    parser.add_argument("--seed", type=int, default=2024, help="seed of the questions (default %(default)s)")
    parser.add_argument(
        "--variant", action="append", choices=list(VARIANTS), help="column to compute, repeatable (default: all)"
    )
    parser.add_argument("--output", type=Path, help="write the table as JSON as well")
    options = parser.parse_args(arguments)
    if options.count < 1:
        parser.error(f"--count {options.count}: give at least 1")
    tokenizer = AutoTokenizer.from_pretrained(options.model, trust_remote_code=True)
    table: Table = {}
    for name in options.variant or VARIANTS:
        overrides, prefix = VARIANTS[name]
        model = AutoModelForCausalLM.from_pretrained(
            options.model, trust_remote_code=True, dtype="float32", **overrides
        )
        table[name] = evaluate(model, tokenizer, options.count, options.seed, prefix)
        print(f"{name}: {100 * table[name]['overall']:.1f} % overall", file=sys.stderr, flush=True)
    print(markdown(table))
    if options.output:
        options.output.write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
