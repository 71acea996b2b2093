"""Every mode of the forward pass and of `generate` gives the logits of one plain, uncached forward."""

from __future__ import annotations

import pytest
import torch
from transformers import StoppingCriteriaList
from transformers.generation import BaseStreamer

from .harness import (
    CONVERSATION,
    GENERATE_MODES,
    MIXED,
    NOT_GREEDY,
    RAGGED,
    deviation,
    is_greedy,
    padded,
    reference_logits,
)
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


GREEDY = {"max_new_tokens": 6, "do_sample": False}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [({}, "HrmTextCache"), ({"cache_implementation": "dynamic"}, "DynamicCache"), ({"num_beams": 2}, "HrmTextCache")],
)
def test_default_cache(model, arguments, expected):
    output = model.generate(**padded(RAGGED), **GREEDY, **arguments, return_dict_in_generate=True)
    assert type(output.past_key_values).__name__ == expected


@pytest.mark.parametrize("arguments", [{"do_sample": True}, {"num_beams": 3}, {"num_beams": 3, "do_sample": True}])
@pytest.mark.parametrize("cache", [{}, {"cache_implementation": "static"}, {"cache_implementation": "dynamic"}])
def test_seeded_and_ranked_answers_do_not_depend_on_the_cache(model, arguments, cache):
    def sequences(**more):
        torch.manual_seed(3)
        return model.generate(**padded(MIXED), max_new_tokens=6, **arguments, **more).tolist()

    assert sequences(**cache) == sequences(use_cache=False)


def test_beams_are_scored_by_the_reference(model):
    """The score of a returned beam is the mean log-likelihood of its tokens under the reference."""
    rows, beams = RAGGED, 3
    output = model.generate(
        **padded(rows),
        max_new_tokens=6,
        do_sample=False,
        num_beams=beams,
        num_return_sequences=beams,
        return_dict_in_generate=True,
        output_scores=True,
    )
    for i, sequence in enumerate(output.sequences[:, -6:].tolist()):
        row = rows[i // beams].followed_by(sequence)
        likelihood = reference_logits(model, row).log_softmax(dim=-1)
        score = sum(likelihood[len(row) - 7 + step, token] for step, token in enumerate(sequence)) / 6
        assert output.sequences_scores[i].item() == pytest.approx(score.item(), abs=1e-3)


class Collector(BaseStreamer):
    """Keeps what it is given."""

    def __init__(self):
        self.tokens: list[int] = []
        self.ended = False

    def put(self, value):
        self.tokens += value.flatten().tolist()

    def end(self):
        self.ended = True


@pytest.mark.parametrize("arguments", [{}, {"prefill_chunk_size": 3}, {"cache_implementation": "static"}])
def test_streamer(model, arguments):
    streamer, batch = Collector(), padded(CONVERSATION)
    output = model.generate(**batch, **GREEDY, **arguments, streamer=streamer)
    assert streamer.ended and streamer.tokens == output[0].tolist()


def test_stopping_criteria(model):
    batch = padded(CONVERSATION)
    full = model.generate(**batch, **GREEDY)
    at = batch["input_ids"].shape[1] + 3

    def third_token(input_ids, scores, **kwargs):
        return torch.full((input_ids.shape[0],), input_ids.shape[1] >= at, device=input_ids.device)

    stopped = model.generate(**batch, **GREEDY, stopping_criteria=StoppingCriteriaList([third_token]))
    assert stopped.tolist() == full[:, :at].tolist()


def test_rows_that_end_early_do_not_disturb_the_others(model):
    batch = padded(RAGGED)
    full = model.generate(**batch, **GREEDY)[:, -6:]
    end = full[1, 1].item()
    ended = model.generate(**batch, **GREEDY, eos_token_id=end)[:, -6:].tolist()
    for row, expected in zip(ended, full.tolist()):
        stop = expected.index(end) + 1 if end in expected else 6
        assert row[:stop] == expected[:stop] and set(row[stop:]) <= {5}


def test_scores_are_those_of_the_logits(model):
    output = model.generate(
        **padded(RAGGED), **GREEDY, return_dict_in_generate=True, output_scores=True, output_logits=True
    )
    assert len(output.scores) == 6
    torch.testing.assert_close(torch.stack(output.scores), torch.stack(output.logits))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="offloading is between a GPU and its host")
@pytest.mark.parametrize("implementation", ["offloaded", "offloaded_static"])
def test_offloaded_caches(model, implementation):
    batch = padded(RAGGED)
    expected = model.generate(**batch, **GREEDY).tolist()
    on_gpu = one_answer_model().cuda()
    batch = {name: tensor.cuda() for name, tensor in batch.items()}
    assert on_gpu.generate(**batch, **GREEDY, cache_implementation=implementation).tolist() == expected


def test_a_length_that_the_caller_states_wins_over_the_folders(model):
    """lm-eval states `max_length`; the library would go on to the folder's `max_new_tokens`."""
    ids = torch.randint(20, 60, (1, 9))
    length = ids.shape[1]
    before = model.generation_config.max_new_tokens
    model.generation_config.max_new_tokens = 7
    try:
        for arguments, tokens in (({"max_length": length + 3}, 3), ({"max_new_tokens": 2}, 2), ({}, 7)):
            assert model.generate(ids, do_sample=False, **arguments).shape[1] == length + tokens
    finally:
        model.generation_config.max_new_tokens = before
