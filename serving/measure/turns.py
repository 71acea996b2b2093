"""Seconds to the first token of a fourth turn, with prefix caching and without: `python -m serving.measure.turns`."""

from __future__ import annotations

import statistics
import time
from typing import Any

from .engine import ROOT, prepare, running
from .material import Reference, generate


TURN = 200
REPEATS = 9


def conversation(reference: Reference, seed: int) -> list[list[int]]:
    """The prompts of four turns, each the one before with an answer and a new envelope."""
    text = reference.tokenizer(f"{seed} " + "Which number is larger, 41 or 52? " * 40)["input_ids"]
    turn = [6, 8, *text[: TURN - 3], 7]
    prompts = [turn]
    for _ in range(3):
        prompts.append([*prompts[-1], 50, 51, 11, *turn])
    return prompts


def fourth_turn(llm: Any, prompts: list[list[int]]) -> tuple[float, int]:
    """Seconds until the fourth turn's first token, and how many of its tokens were cached."""
    for prompt in prompts[:-1]:
        generate(llm, [prompt], max_tokens=1)
    begun = time.perf_counter()
    (result,) = generate(llm, [prompts[-1]], max_tokens=1)
    return time.perf_counter() - begun, result.num_cached_tokens or 0


def main() -> int:
    """Prints a line for each setting."""
    prepare()
    reference = Reference(ROOT)
    for caching in (True, False):
        with running(enable_prefix_caching=caching) as llm:
            fourth_turn(llm, conversation(reference, 0))
            found = [fourth_turn(llm, conversation(reference, seed)) for seed in range(1, REPEATS + 1)]
        seconds, cached = statistics.median(time for time, _ in found), found[0][1]
        length = len(conversation(reference, 1)[-1])
        found_there = f"{cached} of {length} tokens from the cache"
        print(f"prefix caching {caching}: {1000 * seconds:.0f} ms, {found_there}", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
