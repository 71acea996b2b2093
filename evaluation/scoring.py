"""Scores generated answers by the rules of the authors' evaluation."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any


LETTERS = "ABCDEFGH"


def boxed(text: str) -> str | None:
    r"""What the last `\boxed{...}` (or `\fbox{...}`) of a text holds, braces inside included; None without one."""
    begin = text.rfind("\\boxed")
    begin = text.rfind("\\fbox") if begin < 0 else begin
    opened = text.find("{", begin) if begin >= 0 else -1
    if opened < 0:
        return None
    depth = 0
    for place in range(opened, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return text[opened + 1 : place].strip()
    return None


def whole_number(text: str) -> int | None:
    """The number in an answer of GSM8K: the boxed text, else the whole text. None if that is not a number."""
    content = boxed(text) or text
    try:
        return int(float(content.replace(",", "").replace("$", "").strip()))
    except (ValueError, OverflowError):
        return None


def score_gsm8k(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    found = whole_number(results[0])
    right = int(doc["answer"].split("####")[-1].strip().replace(",", ""))
    return {"acc": float(found == right), "invalid": float(found is None)}


def score_math(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Equality of two formulas, by math-verify."""
    from math_verify import parse, verify

    right, found = boxed(doc["solution"]), boxed(results[0])
    same = verify(parse(f"${right}$"), parse(results[0] if found is None else f"${found}$"))
    return {"acc": float(same), "invalid": float(found is None)}


def score_drop(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Exact match and F1 over words, as lm-eval computes them for DROP."""
    from lm_eval.tasks.drop.utils import process_results

    return {name: float(value) for name, value in process_results(doc, [results[0].strip()]).items()}


def score_letter(doc: dict[str, Any], results: list[str], choices: Callable[[dict[str, Any]], tuple[list[str], int]]):
    """A letter is right or wrong; anything else counts as a guess among the choices."""
    texts, right = choices(doc)
    letters = LETTERS[: len(texts)]
    found = results[0].strip().upper()
    valid = len(found) == 1 and found in letters
    return {"acc": float(found == letters[right]) if valid else 1 / len(texts), "invalid": float(not valid)}


def require_math_verify() -> None:
    """Raises an ImportError that says what to install."""
    try:
        import math_verify  # noqa: F401
    except ImportError as error:
        raise ImportError(
            'answers of MATH are compared with math-verify: pip install "math-verify[antlr4_13_2]", or leave MATH out '
            "with --only"
        ) from error


def letter_scorer(choices: Callable[[dict[str, Any]], tuple[list[str], int]]) -> Callable[..., dict[str, float]]:
    """`score_letter` for one data set's columns."""
    return functools.partial(score_letter, choices=choices)
