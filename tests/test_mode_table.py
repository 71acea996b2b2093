"""The program behind the table of modes tells right from wrong, and knows what the library's own class does."""

from __future__ import annotations

import pytest

from .harness import ONE_BLOCK, Answer, reference_logits
from .mode_table import MORE_MODES, SUMMARY, all_modes, main, outcome
from .one_answer_models import one_answer_model


@pytest.fixture(scope="module")
def model():
    return one_answer_model()


def refuse(model):
    raise ValueError("no: do something else")


def shifted(model, by: float):
    return [Answer(ONE_BLOCK[0], 0, reference_logits(model, ONE_BLOCK[0]) + by)]


OUTCOMES = {
    "same": lambda m: shifted(m, 1e-6),
    "**other logits**": lambda m: shifted(m, 0.5),
    "**other logits** (off by infinite or NaN)": lambda m: shifted(m, float("nan")),
    "refused: no": refuse,
    "fails: KeyError": lambda m: {}["nothing"],
}


@pytest.mark.parametrize("expected", OUTCOMES)
def test_outcomes(model, expected):
    assert outcome(model, model, "a mode", OUTCOMES[expected]).startswith(expected)


@pytest.mark.parametrize("mode", [*MORE_MODES][:2])
def test_the_modes_beyond_the_harness(model, mode):
    found = outcome(model, model, mode, MORE_MODES[mode])
    assert found == "same" if "flash" in mode else found.startswith("refused")


def test_summary_names_modes_that_exist():
    assert set(SUMMARY) <= set(all_modes())


def test_wrong_tokens_are_seen(model):
    row = ONE_BLOCK[0].followed_by([20, 20], 0)
    logits = reference_logits(model, row)[len(ONE_BLOCK[0]) - 1 : -1]
    assert logits.argmax(-1).tolist() != [20, 20]
    found = outcome(model, model, "greedy", lambda m: [Answer(row, len(ONE_BLOCK[0]) - 1, logits)])
    assert found == "**other tokens**"


def test_page(tmp_path):
    pytest.importorskip("transformers.models.hrm_text", reason="this transformers has no HRM-Text of its own")
    page = tmp_path / "modes.md"
    assert main(["--only", "block + response + block", "--output", str(page)]) == 0
    assert "| block + response + block | same | **other logits**" in page.read_text()
    assert main(["--only", "one new token", "--output", str(page)]) == 0
    assert "| one new token | same | same |" in page.read_text()


def test_wrong_arguments():
    with pytest.raises(SystemExit) as stop:
        main(["--only", "no such mode"])
    assert stop.value.code == 2
