"""Every mode of the forward pass and of `generate` gives the logits of one plain, uncached forward."""

from __future__ import annotations

import pytest

from .harness import GENERATE_MODES, NOT_GREEDY, deviation, is_greedy
from .one_answer_models import one_answer_model


@pytest.fixture(scope="module")
def model():
    return one_answer_model()


@pytest.mark.parametrize("mode", GENERATE_MODES)
def test_generate(model, mode):
    answers = GENERATE_MODES[mode](model)
    assert deviation(model, answers) < 1e-4
    if mode not in NOT_GREEDY:
        assert is_greedy(model, answers)
