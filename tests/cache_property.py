"""Random sequences of cache operations beside a plain model of the facts: `python -m tests.cache_property --help`.

An operation is a kind and a seed, from which it draws what it does in the state it meets; so a list of operations can
be shortened and replayed. After each of them the next call's logits equal the truth of `tests/facts.py`, or the call
is refused with a ValueError and the cache is what it was.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections import Counter
from dataclasses import dataclass
from typing import Any

from .cache_operations import DO, Row, State
from .facts import CACHES, facts_model


KINDS = {
    "forward": 10,
    "infer": 4,
    "refeed": 3,
    "crop": 4,
    "reorder": 2,
    "select": 1,
    "repeat": 1,
    "copy": 1,
    "pickle": 1,
    "move": 1,
    "reset": 1,
    "generate": 3,
    "switch": 1,
}
EPILOG = """examples:
  python -m tests.cache_property --sequences 50000 --seed 7
  python -m tests.cache_property --replay HrmTextCache forward:12 crop:5 forward:3

exit status: 0 when every step was right or refused, 1 otherwise.
"""


@dataclass(frozen=True)
class Operation:
    kind: str
    seed: int

    def __str__(self) -> str:
        return f"{self.kind}:{self.seed}"


def property_model() -> Any:
    """Hidden 32, one layer a stack, H 2, L 2: six attention calls."""
    return facts_model(num_layers_per_stack=1, H_cycles=2, L_cycles=2)


def draw_sequence(rng: random.Random) -> tuple[str, list[Operation]]:
    kind = rng.choice(("HrmTextCache",) * 6 + tuple(CACHES)[1:])
    first = rng.choice(("forward", "forward", "infer", "generate"))
    kinds = [first, *rng.choices(list(KINDS), weights=list(KINDS.values()), k=rng.randint(2, 7)), "forward"]
    return kind, [Operation(kind, rng.randrange(10**6)) for kind in kinds]


def play(model: Any, kind: str, operations: list[Operation]) -> tuple[str | None, State]:
    """What went wrong in a sequence, None where nothing did, and the state it ended in."""
    rows = random.Random(f"{kind}{operations[:1]}").randint(1, 3)
    state = State(model, kind, CACHES[kind](model), [Row() for _ in range(rows)])
    for operation in operations:
        state.log.append(str(operation))
        try:
            DO[operation.kind](state, random.Random(operation.seed))
        except Exception as error:
            state.log[-1] += f" -> {type(error).__name__}: {str(error)[:300]}"
            return state.log[-1], state
    return None, state


def shrunk(model: Any, kind: str, operations: list[Operation]) -> list[Operation]:
    """A shorter sequence that still goes wrong: operations are taken out one by one for as long as any can be."""
    again = True
    while again:
        again = False
        for i in range(len(operations)):
            fewer = operations[:i] + operations[i + 1 :]
            if fewer and play(model, kind, fewer)[0] is not None:
                operations, again = fewer, True
                break
    return operations


def run(sequences: int, seed: int, model: Any = None, progress: Any = iter) -> tuple[Counter, str | None]:
    """Plays sequences until one goes wrong.

    Args:
        sequences: how many.
        seed: of the first; sequence i has the seed `seed + i`.
        model: None makes `property_model()`.
        progress: wraps the range of sequences, as tqdm does.

    Returns:
        How many calls were answered and refused, and of those that a sane caller makes on an HrmTextCache how many
        were refused; and the report of the sequence that went wrong, or None.
    """
    model = property_model() if model is None else model
    counts: Counter = Counter()
    for number in progress(range(seed, seed + sequences)):
        kind, operations = draw_sequence(random.Random(number))
        wrong, state = play(model, kind, operations)
        if wrong is not None:
            fewer = shrunk(model, kind, operations)
            _, state = play(model, kind, fewer)
            lines = "\n  ".join(state.log)
            replay = f"python -m tests.cache_property --replay {kind} {' '.join(map(str, fewer))}"
            return counts, f"sequence of seed {number} on {kind}:\n  {lines}\n{replay}"
        counts += state.counts
    return counts, None


def main(arguments: list[str] | None = None) -> int:
    from tqdm import tqdm

    parser = argparse.ArgumentParser(
        prog="python -m tests.cache_property",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--sequences", type=int, default=2000, help="how many to play (2000)")
    parser.add_argument("--seed", type=int, default=0, help="of the first one (0)")
    parser.add_argument("--replay", nargs="+", metavar=("CACHE", "OPERATION"), help="play one sequence, step by step")
    chosen = parser.parse_args(arguments)
    if chosen.replay:
        kind, *words = chosen.replay
        try:
            operations = [Operation(word.split(":")[0], int(word.split(":")[1])) for word in words]
        except (IndexError, ValueError):
            parser.error("--replay takes a class of cache and operations, each KIND:SEED")
        if kind not in CACHES or not operations or any(operation.kind not in DO for operation in operations):
            parser.error(f"a class of cache is one of {', '.join(CACHES)}; a kind one of {', '.join(DO)}")
        wrong, state = play(property_model(), kind, operations)
        print("\n".join(state.log))
        return int(wrong is not None)
    if chosen.sequences < 1:
        parser.error("--sequences takes a number from 1 up")
    counts, report = run(chosen.sequences, chosen.seed, progress=tqdm)
    print(", ".join(f"{name}: {count:,}" for name, count in sorted(counts.items())))
    if report is not None:
        print(report, file=sys.stderr)
    return int(report is not None)


if __name__ == "__main__":
    sys.exit(main())
