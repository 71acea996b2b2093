"""Every mode of the forward pass and of `generate` gives the logits of one plain, uncached forward."""

from __future__ import annotations

import pytest
import torch

from .harness import FORWARD_MODES, GENERATE_MODES, NOT_GREEDY, deviation, is_greedy
from .tiny import tiny_model


def one_answer_model(seed: int = 0, **overrides):
    model = tiny_model(seed, num_layers_per_stack=1, **overrides)
    # Generation to the full length makes answers comparable; what ends it is tested on its own.
    model.generation_config.eos_token_id = None
    return model


@pytest.fixture(scope="module")
def model():
    return one_answer_model()


@pytest.mark.parametrize("mode", GENERATE_MODES)
def test_generate(model, mode):
    answers = GENERATE_MODES[mode](model)
    assert deviation(model, answers) < 1e-4
    if mode not in NOT_GREEDY:
        assert is_greedy(model, answers)


@pytest.mark.parametrize("mode", FORWARD_MODES)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@torch.no_grad()
def test_forward(model, implementation, mode):
    other = one_answer_model(attn_implementation=implementation)
    assert deviation(model, FORWARD_MODES[mode](other)) < 1e-4
