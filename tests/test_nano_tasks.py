"""The questions: right answers, true steps, the asked wordings, and a split that no question crosses."""

from __future__ import annotations

import re
from itertools import islice
from random import Random

import pytest

from training.nano import POOL, STAGES, TOKENS_PER_STEP, VOCABULARY, QuestionGroups, make_tokenizer
from training.nano_tasks import (
    CONDITIONS,
    STORIES,
    TASKS,
    WORDINGS,
    draw,
    final_answer,
    is_held_out,
    questions,
    solve,
    tokenizer_corpus,
)
from training.nano_words import ITEMS, NAMES, WORDS


@pytest.fixture(scope="module")
def asked() -> dict[bool, list]:
    return {held_out: list(islice(questions(7, held_out=held_out), 3000)) for held_out in (False, True)}


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def operands(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


def word_of(question) -> str:
    """The word that is spelled, found by where the wordings have it."""
    patterns = r"Reverse the word (\w+)|Spell (\w+)|Write the word (\w+)|What is (\w+)|in the word (\w+)|in (\w+)"
    return next(filter(None, re.search(patterns, question.instruction).groups()))


def expected(question) -> str:
    """The answer, found from the text of the question alone."""
    text, numbers = question.instruction, operands(question.instruction)
    if question.task == "addition":
        return str(sum(numbers))
    if question.task == "subtraction":
        return str(max(numbers) - min(numbers))
    if question.task == "multiplication":
        return str(numbers[0] * numbers[1])
    if question.task == "comparison":
        return str(max(numbers) if "larger" in text else min(numbers))
    if question.task == "sorting":
        return ", ".join(map(str, sorted(numbers, reverse="descending" in text)))
    if question.task == "story":
        if any(word in text for word in ("more from", "buys", "another", "together")) and "each of" not in text:
            return str(sum(numbers))
        if "each" in text or "One box" in text:
            return str(numbers[0] * numbers[1])
        return str(max(numbers) - min(numbers))
    word = word_of(question)
    if question.task == "reversal":
        return "".join(reversed(word))
    letter = re.search(r"letter ([a-z])\b|does ([a-z]) occur", text)
    return str(word.count(letter.group(1) or letter.group(2)))


def test_every_answer_is_right(asked):
    for question in (*asked[False], *asked[True]):
        assert question.answer == expected(question), question


def test_every_step_is_true(asked):
    checked = 0
    for question in asked[False]:
        for step in question.steps:
            if equation := re.fullmatch(r"(\d+)([+*-])(\d+)(?:\+1)?=(\d+)", step):
                a, sign, b, result = equation.groups()
                carry = "+1=" in step and not (sign == "+" and b == "1" and step.count("+") == 1)
                value = {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b)}[sign] + carry
                assert value == int(result), question
                checked += 1
            elif comparison := re.fullmatch(r"(\d)([<>=])(\d)", step):
                a, sign, b = comparison.groups()
                assert {"<": a < b, ">": a > b, "=": a == b}[sign], question
                checked += 1
    assert checked > 3000


def test_the_last_step_and_the_answer_agree():
    for operation, a, b, steps in (
        ("addition", 148, 2977, ("8+7=15", "4+7+1=12", "1+9+1=11", "0+2+1=3")),
        ("subtraction", 1000, 1, ("10-1=9", "9-0=9", "9-0=9", "0-0=0")),
        ("subtraction", 4821, 2794, ("11-4=7", "11-9=2", "7-7=0", "4-2=2")),
        ("multiplication", 47, 8, ("7*8=56", "40*8=320", "320+56=376")),
    ):
        found, result = solve(operation, a, b)
        assert result == {"addition": a + b, "subtraction": a - b, "multiplication": a * b}[operation]
        if (operation, a) != ("subtraction", 1000):
            assert found == steps
        elif operation == "subtraction":
            columns = "".join(reversed([step.split("=")[1] for step in found]))
            assert int(columns) == result


def test_the_wordings_that_are_promised():
    asked = {
        "What is 48 + 27?": WORDINGS["addition"][0].format(a=48, b=27),
        "What is 148 minus 27?": WORDINGS["subtraction"][1].format(a=148, b=27),
        "What is 7 times 8?": WORDINGS["multiplication"][0].format(a=7, b=8),
        "Which is larger, 481 or 418?": WORDINGS["comparison"][0].format(larger="larger", a=481, b=418),
        "Sort 52, 7, 19 in ascending order.": WORDINGS["sorting"][0].format(
            numbers="52, 7, 19", ascending="ascending"
        ),
        "Reverse the word stone.": WORDINGS["reversal"][0].format(word="stone"),
        "How many times does the letter r occur in carrot?": WORDINGS["letters"][0].format(letter="r", word="carrot"),
    }
    for promised, made in asked.items():
        assert promised == made
    assert {"stone", "carrot"} <= set(WORDS)
    assert all(len(set(wordings)) >= 4 for wordings in (*WORDINGS.values(), *STORIES.values()))
    rng = Random(0)
    taught = {tuple(sorted(operands(draw("multiplication", rng, held_out=False).instruction))) for _ in range(20000)}
    assert {(a, b) for b in range(10) for a in range(b + 1)} <= taught  # whatever the hash says
    assert any(is_held_out(f"multiplication {b} {a}") for b in range(10) for a in range(b + 1))


def test_no_operands_are_on_both_sides(asked):
    def key(question):
        if question.task in ("reversal", "letters"):
            return "word", word_of(question)
        numbers = tuple(sorted(operands(question.instruction)))
        kind = question.task
        if kind == "story":
            sign = question.steps[0].split()[1]
            kind = {"+": "addition", "-": "subtraction", "*": "multiplication"}[sign]
        return kind, numbers

    taught, judged = ({key(question) for question in asked[side]} for side in (False, True))
    assert len(judged) > 1500 and not taught & judged
    assert all(max(numbers) > 9 for kind, numbers in judged if kind not in ("word", "sorting"))


def test_the_same_seed_asks_the_same(asked):
    assert list(islice(questions(7, held_out=False), 100)) == asked[False][:100]
    assert list(islice(questions(8, held_out=False), 100)) != asked[False][:100]
    with pytest.raises(ValueError, match="unknown"):
        draw("division", Random(0), held_out=False)


def test_conditions(asked):
    for question in asked[True][:500]:
        direct, cot = (question.response(condition) for condition in CONDITIONS)
        assert direct == question.answer == final_answer(direct, "direct")
        assert cot.endswith(f"\nThe answer is {question.answer}.") and final_answer(cot, "synth,cot") == direct
    with pytest.raises(ValueError, match="use one of"):
        question.response("noisy")
    assert final_answer("12\nThe answer is", "synth,cot") is None


def test_operands_are_read_letter_by_letter_and_digit_by_digit(tokenizer, asked):
    assert len(tokenizer) == VOCABULARY
    for question in asked[False][:1000]:
        pieces = [tokenizer.decode([token]) for token in tokenizer(question.instruction)["input_ids"]]
        assert "".join(pieces) == question.instruction
        assert all(len(piece.strip()) == 1 for piece in pieces if any(sign.isdigit() for sign in piece))
    spelled = [question.answer for question in asked[False] if question.task == "reversal"]
    pieces = [len(tokenizer(word)["input_ids"]) for word in spelled]
    assert sum(pieces) > 0.95 * sum(map(len, spelled))
    texts = " ".join(wording for wordings in WORDINGS.values() for wording in wordings)
    words = set(re.findall(r" [a-z]+", texts))
    for word in (*words, *(f" {word}" for word in (*NAMES, *ITEMS))):
        assert len(tokenizer(word)["input_ids"]) == 1, word
    assert tokenizer_corpus() == tokenizer_corpus()


def test_groups_to_train_on(tokenizer):
    groups = list(islice(QuestionGroups(tokenizer, seed=3), 8))
    assert groups == list(islice(QuestionGroups(tokenizer, seed=3), 8))
    assert groups != list(islice(QuestionGroups(tokenizer, seed=4), 8))
    for group in groups:
        longest = max(len(example["input_ids"]) for example in group)
        assert longest * len(group) <= TOKENS_PER_STEP
        assert all(sum(example["token_type_ids"]) == example["labels"].count(-100) for example in group)
    assert POOL % 2 == 0 and all(set(shares) == set(TASKS) for _, shares in STAGES)
