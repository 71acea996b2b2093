"""A call takes its cache as `past_key_values` or as `cache` (the name from transformers 5.24 on), on every version."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from transformers import DynamicCache

from .tiny import tiny_model


IDS = torch.tensor([[6, 20, 31, 7, 40, 41]])
TYPES = torch.tensor([[1, 1, 1, 1, 0, 0]])
NAMES = ("past_key_values", "cache")


@pytest.fixture(scope="module")
def model():
    return tiny_model(prefix_end_token_id=7)


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("base", [False, True])
def test_forward_takes_and_gives_either_name(model, name, base):
    network = model.model if base else model
    first = network(IDS[:, :4], token_type_ids=TYPES[:, :4], use_cache=True)
    assert first.cache is first.past_key_values is not None
    rest = network(IDS[:, 4:], token_type_ids=TYPES[:, 4:], **{name: first.cache})
    whole = network(IDS, token_type_ids=TYPES, use_cache=False)
    torch.testing.assert_close(rest[0], whole[0][:, 4:], atol=1e-5, rtol=0)
    assert whole.cache is None and whole.past_key_values is None


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_generate_takes_either_name(model, name):
    live = DynamicCache(config=model.config)
    settings = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None}
    given = model.generate(IDS, token_type_ids=TYPES, **settings, **{name: live})
    assert live.get_seq_length() == IDS.shape[1] + 2
    assert torch.equal(given, model.generate(IDS, token_type_ids=TYPES, use_cache=False, **settings))


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_prepare_inputs_takes_either_name(model, name):
    live = DynamicCache(config=model.config)
    prepared = model.prepare_inputs_for_generation(IDS, attention_mask=torch.ones_like(IDS), **{name: live})
    assert any(value is live for value in prepared.values())
    assert model(**prepared).logits.shape[:2] == IDS.shape


def test_two_different_caches_are_refused_and_one_given_twice_is_taken(model):
    one, other = DynamicCache(config=model.config), DynamicCache(config=model.config)
    for call in (model, model.model, lambda ids, **kwargs: model.generate(ids, max_new_tokens=1, **kwargs)):
        with pytest.raises(ValueError, match="two different caches were given"):
            call(IDS, past_key_values=one, cache=other)
    assert model(IDS, past_key_values=one, cache=one).cache is one


@pytest.mark.parametrize("wrong", [((torch.zeros(1), torch.zeros(1)),), "cache", 3])
@pytest.mark.parametrize("name", NAMES)
def test_what_is_no_cache_is_named(model, name, wrong):
    with pytest.raises(ValueError, match=f"the cache is a {type(wrong).__name__}: give a cache of transformers"):
        model(IDS, **{name: wrong})


@torch.no_grad()
def test_outputs_are_copied_and_pickled(model):
    output = model(IDS, use_cache=True)
    for again in (copy.deepcopy(output), pickle.loads(pickle.dumps(output))):
        assert type(again) is type(output)
        assert again.cache.get_seq_length() == IDS.shape[1]
        assert torch.equal(again.logits, output.logits)
