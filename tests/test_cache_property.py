"""2,000 random sequences of cache operations: every step is right, or refused; and little is refused."""

from __future__ import annotations

import random

import pytest

from .cache_property import DO, KINDS, Operation, draw_sequence, main, play, property_model, run


SEQUENCES, PARTS = 2000, 4


@pytest.fixture(scope="module")
def model():
    return property_model()


@pytest.mark.parametrize("part", range(PARTS))
def test_sequences(model, part):
    count = SEQUENCES // PARTS
    counts, report = run(count, seed=part * count, model=model)
    assert report is None, report
    assert counts["answered"] > 2 * count
    # Refusing everything is no answer: a sane caller of our own cache is hardly ever turned away.
    assert counts["sane"] > count
    assert counts["sane, refused"] < 0.15 * counts["sane"], counts


def test_every_operation_is_drawn():
    drawn = {operation.kind for seed in range(100) for operation in draw_sequence(random.Random(seed))[1]}
    assert drawn == set(KINDS) == set(DO)


def test_a_sequence_replays(model, capsys):
    operations = [Operation("forward", 1), Operation("crop", 3), Operation("forward", 2)]
    first, again = (play(model, "HrmTextCache", operations)[1] for _ in range(2))
    assert first.log == again.log and first.history() == again.history()
    assert main(["--replay", "HrmTextCache", "copy:1", "pickle:2"]) == 0
    assert capsys.readouterr().out.splitlines() == ["copy:1", "pickle:2"]


@pytest.mark.parametrize(
    "arguments", [["--replay", "NoCache", "crop:1"], ["--replay", "HrmTextCache", "fly:1"], ["--sequences", "0"]]
)
def test_bad_arguments(arguments):
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
