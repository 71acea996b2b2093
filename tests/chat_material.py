"""Small texts for the tests of tokenizer, chats and pipelines: questions to train a vocabulary on, and hard texts."""

import random
from collections.abc import Iterator


NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "twenty", "ninety"]
WORDS = ["stone", "carrot", "river", "letter", "window", "garden", "silver", "mountain", "bottle", "orange", "yellow"]

QUESTIONS = [
    ("What is {a} + {b}?", "{sum}"),
    ("What is {a} plus {b}?", "We add {a} and {b}. The sum is {sum}. The answer is {sum}."),
    ("Add {x} and {y}.", "The numbers are {x} and {y}."),
    ("Which is larger, {a} or {b}?", "{larger}"),
    ("Sort {a}, {b}, {c} in ascending order.", "{ordered}"),
    ("Reverse the word {word}.", "{reversed}"),
    ("How many times does the letter {letter} occur in {word}?", "{count}"),
    ("Anna has {a} apples and buys {b} more. How many apples does she have?", "The answer is {sum}."),
]

# What tokenizers trip over: unusual white space, scripts, combining signs, emoji, control and private-use signs.
HARD_PIECES = [
    *("a", "Z", "word", "don't", "I'LL", "naïve", "e\u0301", "\u00e9", "\u1112\u1161\u11ab", "한국어", "中文", "ไทย"),
    *("עברית", "العربية", "\u200f", "0", "7", "42", "2026", "٣", "½", "²", " ", "  ", "\t", "\n", "\r\n", "\n\n"),
    *("\u00a0", "\u2003", "\u200b", "\ufeff", "\x00", "\x1b", ".", ",", "?!", "...", "<", ">", "|", "<|", "|>"),
    *(
        "<|im_",
        "end|>",
        "</",
        "😀",
        "👩\u200d👩\u200d👧",
        "🇩🇪",
        "\ue000",
        "\ufdd0",
        "\U000f0000",
        "'",
        '"',
        "\\n",
        "{{",
    ),
    *("%}", "{%", "Ġ", "Ċ"),
]


def questions(number: int, seed: int = 0) -> Iterator[tuple[str, str]]:
    """Pairs of question and answer about numbers and words."""
    draw = random.Random(seed)
    for _ in range(number):
        a, b, c = (draw.randrange(1000) for _ in range(3))
        word = draw.choice(WORDS)
        letter = draw.choice(word)
        values = {
            "a": a, "b": b, "c": c, "sum": a + b, "larger": max(a, b), "word": word, "reversed": word[::-1],
            "ordered": ", ".join(map(str, sorted((a, b, c)))), "letter": letter, "count": word.count(letter),
            "x": draw.choice(NUMBERS), "y": draw.choice(NUMBERS),
        }  # fmt: skip
        question, answer = draw.choice(QUESTIONS)
        yield question.format(**values), answer.format(**values)


def corpus(number: int = 2000) -> list[str]:
    """Questions and answers as single texts."""
    return [text for pair in questions(number) for text in pair]


def hard_texts(number: int, special_tokens: list[str], seed: int = 0) -> list[str]:
    """Texts of unusual pieces, one in four of them a special token spelled out, often those of the envelope."""
    draw = random.Random(seed)
    special_tokens = special_tokens + ["<|im_start|>", "<|im_end|>"] * (len(special_tokens) // 4)
    return [
        "".join(
            draw.choice(special_tokens if draw.random() < 0.25 else HARD_PIECES) for _ in range(draw.randrange(1, 30))
        )
        for _ in range(number)
    ]
