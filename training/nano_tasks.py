"""Questions that HRM-Text-Nano is trained and judged on, made by a seeded generator.

A question is a task (addition, sorting, ...), operands and a wording. It is answered under two conditions: `direct`,
the result and nothing else, and `synth,cot`, steps line by line that end with `The answer is RESULT.`

The split is by construction: a hash of the operands, not of the wording, decides whether a question may be trained on
or is held out for judging, and a word problem is held out with the bare sum that it asks for. Facts of one digit
(3 + 9, 7 times 8) are what a school teaches by heart: they are always trained on and never judged.

Part of the questions to train on are drills, drawn where a plain draw seldom goes and mistakes were found: differences
of close numbers, sums that carry through many columns, products of three digits, words of few letters. What is judged
is never a drill.
"""

import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from hashlib import blake2b
from random import Random
from typing import NamedTuple

from .nano_words import ITEMS, NAMES, PSEUDO_CODAS, PSEUDO_ONSETS, PSEUDO_VOWELS, WORDS


CONDITIONS = ("direct", "synth,cot")
HELD_OUT_PERCENT = 10
DRILLED = 0.35

WORDINGS = {
    "addition": (
        "What is {a} + {b}?",
        "What is {a} plus {b}?",
        "Add {a} and {b}.",
        "How much is {a} + {b}?",
        "What is the sum of {a} and {b}?",
        "{a} + {b} = ?",
    ),
    "subtraction": (
        "What is {a} - {b}?",
        "What is {a} minus {b}?",
        "Subtract {b} from {a}.",
        "How much is {a} - {b}?",
        "Take {b} away from {a}.",
        "{a} - {b} = ?",
    ),
    "multiplication": (
        "What is {a} times {b}?",
        "What is {a} * {b}?",
        "Multiply {a} by {b}.",
        "How much is {a} times {b}?",
        "What is the product of {a} and {b}?",
        "{a} * {b} = ?",
    ),
    "comparison": (
        "Which is {larger}, {a} or {b}?",
        "Which number is {larger}, {a} or {b}?",
        "What is the {larger} of {a} and {b}?",
        "{a} or {b}: which is {larger}?",
    ),
    "sorting": (
        "Sort {numbers} in {ascending} order.",
        "Put {numbers} in {ascending} order.",
        "Write {numbers} in {ascending} order.",
        "What is {numbers} in {ascending} order?",
    ),
    "reversal": (
        "Reverse the word {word}.",
        "Spell {word} backwards.",
        "Write the word {word} backwards.",
        "What is {word} spelled backwards?",
    ),
    "letters": (
        "How many times does the letter {letter} occur in {word}?",
        "How many times is the letter {letter} in the word {word}?",
        "Count the letter {letter} in {word}.",
        "How often does {letter} occur in the word {word}?",
    ),
}

# Word problems by the operation that they hide.
STORIES = {
    "addition": (
        "{name} has {a} {items} and buys {b} more. How many {items} does {name} have now?",
        "{name} has {a} {items} and gets {b} more from {other}. How many {items} does {name} have now?",
        "There are {a} {items} in one box and {b} in another. How many {items} are there?",
        "{name} has {a} {items} and {other} has {b}. How many {items} do they have together?",
    ),
    "subtraction": (
        "{name} has {a} {items} and gives {b} to {other}. How many {items} does {name} have left?",
        "{name} has {a} {items} and loses {b}. How many {items} are left?",
        "There are {a} {items} in a box. {name} takes {b} of them. How many {items} are left in the box?",
        "{name} has {a} {items} and {other} has {b}. How many more {items} does {name} have?",
    ),
    "multiplication": (
        "There are {b} boxes with {a} {items} each. How many {items} are there?",
        "{name} has {b} boxes with {a} {items} in each box. How many {items} does {name} have?",
        "One box has {a} {items}. How many {items} are in {b} boxes?",
        "{name} buys {a} {items} on each of {b} days. How many {items} does {name} have now?",
    ),
}

TASKS = (*WORDINGS, "story")
SIGNS = {"addition": "+", "subtraction": "-", "multiplication": "*"}


class Question(NamedTuple):
    """One question: `steps` are the lines of reasoning before `The answer is ...`, `answer` the bare result."""

    task: str
    instruction: str
    steps: tuple[str, ...]
    answer: str

    def response(self, condition: str) -> str:
        """The text to answer with under `direct` or `synth,cot`."""
        if condition == "direct":
            return self.answer
        if condition == "synth,cot":
            return "\n".join((*self.steps, f"The answer is {self.answer}."))
        raise ValueError(f"condition={condition!r} is not one Nano is trained with: use one of {CONDITIONS}")

    def row(self, condition: str) -> dict[str, str]:
        """The question as a row that `training.data` reads."""
        return {"instruction": self.instruction, "response": self.response(condition), "condition": condition}


def final_answer(response: str, condition: str) -> str | None:
    """The result that a response states, None if it states none (under `direct` the whole text is the result)."""
    if condition == "direct":
        return response.strip()
    stated = re.search(r"The answer is (.+)\.$", response.strip())
    return stated.group(1) if stated else None


@lru_cache(maxsize=1 << 16)
def is_held_out(key: str) -> bool:
    """Whether the operands spelled by `key` belong to the held-out part."""
    return int.from_bytes(blake2b(key.encode(), digest_size=4).digest(), "big") % 100 < HELD_OUT_PERCENT


def draw(task: str, rng: Random, *, held_out: bool) -> Question:
    """One question of a task, from the held-out part or from the part to train on.

    Raises:
        ValueError: the task is not one of `TASKS`.
    """
    if task not in TASKS:
        raise ValueError(f"task={task!r} is unknown: use one of {', '.join(TASKS)}")
    if task == "story":
        return _story(rng, held_out)
    return {
        "addition": _arithmetic,
        "subtraction": _arithmetic,
        "multiplication": _arithmetic,
        "comparison": _comparison,
        "sorting": _sorting,
        "reversal": _reversal,
        "letters": _letters,
    }[task](task, rng, held_out)


def questions(
    seed: int, *, held_out: bool, tasks: Sequence[str] = TASKS, weights: Sequence[float] | None = None
) -> Iterator[Question]:
    """Questions without end; the same arguments give the same ones. `weights` are the shares of the tasks."""
    rng = Random(seed)
    while True:
        (task,) = rng.choices(tasks, weights)
        yield draw(task, rng, held_out=held_out)


# Arithmetic


def _number(rng: Random, digits: int, weights: Sequence[int]) -> int:
    (length,) = rng.choices(range(1, digits + 1), weights)
    return rng.randrange(10 ** (length - 1) if length > 1 else 0, 10**length)


def _operands(operation: str, rng: Random, held_out: bool, digits: int) -> tuple[int, int]:
    """Two operands of one part of the split, in the order in which the question names them."""
    while True:
        if not held_out and rng.random() < DRILLED:
            a, b = _drilled_operands(operation, rng, digits)
        elif operation == "multiplication":
            a, b = _number(rng, 2, (1, 6)), rng.randrange(0, 10)
        else:
            a, b = (_number(rng, digits, (1, 2, 4, 8)[:digits]) for _ in range(2))
        if operation == "subtraction":
            a, b = max(a, b), min(a, b)
        low, high = min(a, b), max(a, b)
        taught = high < 10
        if held_out == (not taught and is_held_out(f"{operation} {high} {low}")):
            return a, b


def _drilled_operands(operation: str, rng: Random, digits: int) -> tuple[int, int]:
    if operation == "multiplication":
        return rng.randrange(100, 1000), rng.randrange(2, 10)
    a = _number(rng, digits, (0, 2, 4, 8)[:digits])
    width = len(str(a))
    if operation == "subtraction":  # the first digits vanish from the result
        return a, max(0, a - rng.randrange(10 ** rng.randrange(1, width)))
    # Columns of 9 hand a carry on.
    return a, int("".join(str(9 - int(digit)) if rng.random() < 0.5 else rng.choice("0123456789") for digit in str(a)))


def _arithmetic(operation: str, rng: Random, held_out: bool) -> Question:
    a, b = _operands(operation, rng, held_out, digits=4)
    steps, result = solve(operation, a, b)
    if operation == "multiplication" and rng.random() < 0.5:
        a, b = b, a
    return Question(operation, rng.choice(WORDINGS[operation]).format(a=a, b=b), steps, str(result))


def _story(rng: Random, held_out: bool) -> Question:
    operation = rng.choice(tuple(STORIES))
    while min(operands := _operands(operation, rng, held_out, digits=3)) < 2:
        pass  # no "1 boxes", and nobody loses 0 of something
    a, b = operands
    name, other = rng.sample(NAMES, 2)
    text = rng.choice(STORIES[operation]).format(a=a, b=b, name=name, other=other, items=rng.choice(ITEMS))
    steps, result = solve(operation, a, b)
    return Question("story", text, (f"{a} {SIGNS[operation]} {b}", *steps), str(result))


def solve(operation: str, a: int, b: int) -> tuple[tuple[str, ...], int]:
    """Steps on paper and result of an addition, a subtraction (a >= b >= 0) or a product with a one-digit `b`."""
    if operation == "multiplication":
        if a < 10:
            return (f"{a}*{b}={a * b}",), a * b
        parts = [int(digit) * 10**place for place, digit in enumerate(reversed(str(a)))]
        products = [f"{part}*{b}={part * b}" for part in parts]
        sums, total = [], parts[0] * b
        for part in parts[1:]:
            sums.append(f"{part * b}+{total}={part * b + total}")
            total += part * b
        return (*products, *sums), total
    columns = zip(*(reversed(f"{value:0{len(str(max(a, b)))}d}") for value in (a, b)), strict=True)
    steps, carry = [], 0
    for top, bottom in ((int(x), int(y)) for x, y in columns):
        if operation == "addition":
            total = top + bottom + carry
            steps.append(f"{top}+{bottom}{'+1' if carry else ''}={total}")
            carry = total // 10
        else:
            top -= carry
            carry = int(top < bottom)
            top += 10 * carry
            steps.append(f"{top}-{bottom}={top - bottom}")
    return tuple(steps), a + b if operation == "addition" else a - b


# Order


def _comparison(task: str, rng: Random, held_out: bool) -> Question:
    while True:
        a, b = _number(rng, 4, (1, 3, 4, 4)), _number(rng, 4, (1, 3, 4, 4))
        if rng.random() < 0.6:  # the same first digits, so that the later ones have to be read
            places = 10 ** rng.randrange(1, 3)
            b = a // places * places + rng.randrange(places)
        taught = max(a, b) < 10
        if a != b and held_out == (not taught and is_held_out(f"compare {max(a, b)} {min(a, b)}")):
            break
    steps = []
    width = len(str(max(a, b)))
    for x, y in zip(f"{a:0{width}d}", f"{b:0{width}d}", strict=True):
        steps.append(f"{x}{'=' if x == y else '<' if x < y else '>'}{y}")
        if x != y:
            break
    word, answer = rng.choice((("larger", max(a, b)), ("smaller", min(a, b))))
    return Question(task, rng.choice(WORDINGS[task]).format(a=a, b=b, larger=word), tuple(steps), str(answer))


def _sorting(task: str, rng: Random, held_out: bool) -> Question:
    while True:
        count = rng.choice((3, 3, 4))
        numbers = [_number(rng, 3, (1, 4, 4)) for _ in range(count)]
        key = "sort " + " ".join(map(str, sorted(numbers)))
        if len(set(numbers)) == count and held_out == is_held_out(key):
            break
    word, sign, descending = rng.choice((("ascending", "<", False), ("descending", ">", True)))
    steps, rest = [], list(numbers)
    while len(rest) > 1:
        first = (max if descending else min)(rest)
        rest.remove(first)
        steps.append(f"{first} {sign} {', '.join(map(str, rest))}")
    text = rng.choice(WORDINGS[task]).format(numbers=", ".join(map(str, numbers)), ascending=word)
    return Question(task, text, tuple(steps), ", ".join(map(str, sorted(numbers, reverse=descending))))


# Letters


def _word(rng: Random, held_out: bool, drilled: bool = False) -> str:
    """An English word, or a made-up one, so that letters have to be read and words cannot be learned by heart."""
    while True:
        if drilled and rng.random() < DRILLED:
            letters = rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.choice((2, 3, 4)))
            word = "".join(rng.choices(letters, k=rng.randrange(3, 9)))
        elif rng.random() < 0.35:
            word = rng.choice(WORDS)
        else:
            parts = (
                part
                for _ in range(rng.choice((1, 2, 2, 3)))
                for part in (rng.choice(PSEUDO_ONSETS), rng.choice(PSEUDO_VOWELS), rng.choice(PSEUDO_CODAS))
            )
            word = "".join(parts)
        if 3 <= len(word) <= 8 and held_out == is_held_out(f"word {word}"):
            return word


def _reversal(task: str, rng: Random, held_out: bool) -> Question:
    word = _word(rng, held_out)
    text = rng.choice(WORDINGS[task]).format(word=word)
    return Question(task, text, (" ".join(word), " ".join(reversed(word))), word[::-1])


def _letters(task: str, rng: Random, held_out: bool) -> Question:
    word = _word(rng, held_out, drilled=not held_out)
    letter = rng.choice(word) if rng.random() < 0.85 else rng.choice("abcdefghijklmnopqrstuvwxyz")
    repeated = [each for each in word if word.count(each) > 1]
    if repeated and rng.random() < 0.5:
        letter = rng.choice(repeated)
    # The count so far stands behind every letter, so that each step looks one step back.
    steps = " ".join(f"{each}{word[: place + 1].count(letter)}" for place, each in enumerate(word))
    text = rng.choice(WORDINGS[task]).format(letter=letter, word=word)
    return Question(task, text, (steps,), str(word.count(letter)))


# Vocabulary


def tokenizer_corpus() -> list[str]:
    """Texts from which `training.tokenizer.train_tokenizer` makes Nano's vocabulary.

    They hold every word of the questions and answers but no operand, and every beginning of such a word, the shorter
    the more often. Merges then grow from the left end of known words, and nearly all letters inside an operand stay
    single tokens, as its digits do.
    """
    texts = (
        *(wording for wordings in (*WORDINGS.values(), *STORIES.values()) for wording in wordings),
        *(f" {name}" for name in NAMES),
        *NAMES,
        *(f" {item}" for item in ITEMS),
        *(f" {letter}" for letter in "abcdefghijklmnopqrstuvwxyz"),
        " larger smaller ascending descending",
        "The answer is",
    )
    pieces = {piece for text in texts for piece in re.findall(r" ?[A-Za-z]+", re.sub(r"\{[a-z]+\}", "", text))}
    corpus = []
    for piece in sorted(pieces):
        for length in range(2, len(piece) + 1):
            corpus += [piece[:length]] * 2 * 3 ** min(len(piece) - length, 7)
    return corpus
