"""Rows that teach the use of a calculator: a question, the call of the tool, what it gave, and the answer.

    python -m training.tools --output runs/calculator.jsonl
    python -m training.sft --model . --data runs/calculator.jsonl --output runs/caller --tools ...

`training.sft --tools` marks the tokenizer of its result as trained on tools, so that chats take `tools=` from then on.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any


CALCULATOR: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "calculate",
        "description": "Works out a sum.",
        "parameters": {"type": "object", "properties": {"sum": {"type": "string"}}},
    },
}
_OPERATIONS = {"+": "plus", "-": "minus"}
# Of 100 sums, how many are never in the rows: those whose digits give a small remainder.
HELD_OUT = 10


def is_held_out(a: int, b: int, operation: str) -> bool:
    """Whether a sum is kept for judging."""
    return (a * 31 + b * 17 + ord(operation)) % 100 < HELD_OUT


def calculate(text: str) -> str:
    """What the tool gives for a sum of two numbers, as "48+27".

    Raises:
        ValueError: it is no such sum.
    """
    for operation, sign in (("+", 1), ("-", -1)):
        a, found, b = text.replace(" ", "").partition(operation)
        if found and a.isdecimal() and b.isdecimal():
            return str(int(a) + sign * int(b))
    raise ValueError(f"{text!r} is no sum of two numbers")


def conversation(a: int, b: int, operation: str, in_words: bool = False) -> list[dict[str, Any]]:
    """A question about two numbers that is answered with the tool, in OpenAI's form."""
    question = f"What is {a} {_OPERATIONS[operation] if in_words else operation} {b}?"
    text = f"{a}{operation}{b}"
    call = {"type": "function", "function": {"name": "calculate", "arguments": {"sum": text}}}
    return [
        {"role": "user", "content": question},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": calculate(text)},
        {"role": "assistant", "content": calculate(text)},
    ]


def rows(count: int, seed: int = 0) -> Iterator[dict[str, Any]]:
    """Rows for `training.sft`, none of a sum that is held out."""
    draw = Random(seed)
    made = 0
    while made < count:
        a, b, operation = draw.randrange(10, 100), draw.randrange(10, 100), draw.choice("+-")
        if operation == "-":
            a, b = max(a, b), min(a, b)
        if not is_held_out(a, b, operation):
            made += 1
            messages = conversation(a, b, operation, in_words=draw.random() < 0.3)
            yield {"messages": messages, "tools": [CALCULATOR], "condition": "direct"}


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m training.tools", description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="JSON Lines to write")
    parser.add_argument("--count", type=int, default=3000, help="rows (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the draw (default %(default)s)")
    options = parser.parse_args(arguments)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(row) + "\n" for row in rows(options.count, options.seed))
    options.output.write_text("".join(lines), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
