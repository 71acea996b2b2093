"""Decoding over static buffers: the same answers as plain decoding, and the graphs themselves where there is CUDA."""

from __future__ import annotations

import copy
import gc
import pickle

import pytest
import torch
from transformers import DynamicCache, StaticCache, TextIteratorStreamer

from .harness import GENERATE_MODES, NOT_GREEDY, deviation, is_greedy
from .one_answer_models import one_answer_model
from .optimized_models import decode_statically, sibling
from .tiny import load_class, tiny_model


IDS = torch.tensor([[6, 20, 31, 42, 7], [6, 9, 55, 60, 7], [6, 33, 8, 14, 7]])
TYPES = torch.ones_like(IDS)
GREEDY = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True, "eos_token_id": None}


@pytest.fixture
def short_buckets(monkeypatch):
    """A model whose buckets are a few positions long, so that a short answer crosses several of them."""
    model = decode_statically(one_answer_model())
    module = sibling(model, "decoding_hrm_text")
    monkeypatch.setattr(module, "CAPACITY_STEP", 8)
    monkeypatch.setattr(module, "ARENA_STEP", 24)
    return model


def served(model) -> int:
    """How many buckets of the decoder have been used."""
    return len(model._decoder._buckets)


def assert_same_logits(one, other):
    assert torch.equal(one.sequences, other.sequences)
    for left, right in zip(one.logits, other.logits):
        assert torch.allclose(left, right, atol=1e-5)


@pytest.mark.parametrize("mode", GENERATE_MODES)
def test_generate_gives_the_one_answer(short_buckets, mode):
    plain = one_answer_model()
    answers = GENERATE_MODES[mode](short_buckets)
    assert deviation(plain, answers) < 1e-4
    if mode not in NOT_GREEDY:
        assert is_greedy(plain, answers)


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_growing_through_buckets(short_buckets, rows):
    plain = one_answer_model()
    call = {"token_type_ids": TYPES[:rows], "max_new_tokens": 40, **GREEDY}
    assert_same_logits(short_buckets.generate(IDS[:rows], **call), plain.generate(IDS[:rows], **call))
    capacities = {capacity for _, capacity in short_buckets._decoder._buckets}
    assert max(capacities) == 48
    assert {rows for rows, _ in short_buckets._decoder._buckets} == {
        sibling(plain, "decoding_hrm_text").bucket_rows(rows)
    }


def test_left_padding(short_buckets):
    plain = one_answer_model()
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 1, 1, 1, 1]])
    call = {"token_type_ids": TYPES * mask, "attention_mask": mask, "max_new_tokens": 20, **GREEDY}
    assert_same_logits(short_buckets.generate(IDS, **call), plain.generate(IDS, **call))
    assert served(short_buckets)


def test_sampling_with_a_seed(short_buckets):
    plain = one_answer_model()
    sequences = []
    for model in (short_buckets, plain):
        torch.manual_seed(7)
        sequences.append(
            model.generate(IDS, token_type_ids=TYPES, max_new_tokens=16, do_sample=True, top_k=20, eos_token_id=None)
        )
    assert torch.equal(*sequences)


def test_streaming(short_buckets):
    class Collector(TextIteratorStreamer):
        def __init__(self):
            self.tokens = []

        def put(self, value):
            self.tokens += value.flatten().tolist()

        def end(self):
            self.tokens.append(-1)

    collector = Collector()
    output = short_buckets.generate(
        IDS[:1], token_type_ids=TYPES[:1], max_new_tokens=9, do_sample=False, eos_token_id=None, streamer=collector
    )
    assert collector.tokens == [*output[0].tolist(), -1]
    assert served(short_buckets)


def test_a_conversation_goes_on_with_its_cache(short_buckets):
    plain, answers = one_answer_model(), []
    for model in (short_buckets, plain):
        first = model.generate(IDS[:1], token_type_ids=TYPES[:1], max_new_tokens=6, use_cache=True, **GREEDY)
        ids = torch.cat([first.sequences, IDS[1:2]], dim=1)
        types = torch.cat([TYPES[:1], torch.zeros(1, 6, dtype=torch.long), TYPES[:1]], dim=1)
        cache = first.past_key_values
        answers.append(model.generate(ids, token_type_ids=types, past_key_values=cache, max_new_tokens=8, **GREEDY))
    assert_same_logits(*answers)


def test_two_caches_take_turns(short_buckets):
    plain = one_answer_model()
    results = []
    for model in (short_buckets, plain):
        caches, logits = [], []
        for row in range(2):
            out = model(IDS[row : row + 1], token_type_ids=TYPES[:1], use_cache=True)
            caches.append(out.past_key_values)
        for step in range(12):
            for cache in caches:
                token = torch.tensor([[20 + step]])
                logits.append(model(token, past_key_values=cache, use_cache=True, trusted_layout=True).logits)
        results.append((torch.cat(logits), [cache.layers[-1].keys for cache in caches]))
    assert torch.allclose(results[0][0], results[1][0], atol=1e-5)
    for ours, theirs in zip(results[0][1], results[1][1]):
        assert ours.shape == theirs.shape
        assert torch.allclose(ours, theirs, atol=1e-5)


def test_cropping_goes_back(short_buckets):
    plain, found = one_answer_model(), []
    for model in (short_buckets, plain):
        cache = model(IDS[:1], token_type_ids=TYPES[:1], use_cache=True).past_key_values
        for token in (30, 31, 32):
            model(torch.tensor([[token]]), past_key_values=cache, use_cache=True, trusted_layout=True)
        cache.crop(-2)
        assert cache.get_seq_length() == 6
        found.append(model(torch.tensor([[40]]), past_key_values=cache, use_cache=True, trusted_layout=True).logits)
    assert torch.allclose(*found, atol=1e-5)


def test_a_cache_outlives_the_decoder(short_buckets):
    cache = short_buckets(IDS[:1], token_type_ids=TYPES[:1], use_cache=True).past_key_values
    token = torch.tensor([[30]])
    short_buckets(token, past_key_values=cache, use_cache=True, trusted_layout=True)
    before = [layer.keys.clone() for layer in cache.layers]
    arena = short_buckets._decoder._arena
    short_buckets.undo_inference_optimization()
    arena.fill_(float("nan"))
    assert all(torch.equal(old, layer.keys) for old, layer in zip(before, cache.layers))


def test_a_dropped_cache_is_forgotten(short_buckets):
    cache = short_buckets(IDS[:1], token_type_ids=TYPES[:1], use_cache=True).past_key_values
    short_buckets(torch.tensor([[30]]), past_key_values=cache, use_cache=True, trusted_layout=True)
    assert short_buckets._decoder._cache() is cache
    del cache
    gc.collect()
    assert short_buckets._decoder._cache() is None


def test_changed_weights_are_noticed(short_buckets):
    call = {"token_type_ids": TYPES, "max_new_tokens": 6, **GREEDY}
    short_buckets.generate(IDS, **call)
    other = one_answer_model(seed=3)
    short_buckets.load_state_dict(copy.deepcopy(other.state_dict()), assign=True)
    assert_same_logits(short_buckets.generate(IDS, **call), other.generate(IDS, **call))


@pytest.mark.parametrize("cache_class", [StaticCache, DynamicCache])
def test_other_caches_are_left_alone(short_buckets, cache_class):
    plain, answers = one_answer_model(), []
    for model in (short_buckets, plain):
        more = {"max_cache_len": 32} if cache_class is StaticCache else {}
        cache = cache_class(config=model.config, **more)
        answers.append(
            model.generate(
                IDS, token_type_ids=TYPES, past_key_values=cache, max_new_tokens=6, disable_compile=True, **GREEDY
            )
        )
    assert_same_logits(*answers)
    assert served(short_buckets) == 0


def test_what_is_refused_says_why(short_buckets):
    refusal = sibling(short_buckets, "decoding_hrm_text").StaticDecoder.refusal
    cache = load_class("cache_hrm_text.HrmTextCache")
    assert "generate" in refusal(short_buckets, None, False, None)
    assert "DynamicCache" in refusal(short_buckets, DynamicCache(), True, None)
    own = short_buckets(IDS, token_type_ids=TYPES, use_cache=True).past_key_values
    assert type(own).__name__ == cache.__name__
    assert refusal(short_buckets, own, True, None) is None
    assert "4-D" in refusal(short_buckets, own, True, torch.ones(3, 1, 1, 6))
    short_buckets.set_attn_implementation("eager")
    assert "sdpa" in refusal(short_buckets, own, True, None)


def test_copies_and_pickles_start_without_buffers(short_buckets):
    short_buckets.generate(IDS, token_type_ids=TYPES, max_new_tokens=4)
    assert served(short_buckets)
    assert served(copy.deepcopy(short_buckets)) == 0
    assert pickle.loads(pickle.dumps(short_buckets._decoder))._arena is None


@pytest.mark.parametrize(("batch", "rows"), [(1, 1), (2, 2), (3, 4), (4, 4), (5, 8), (17, 32)])
def test_rows_are_bucketed(batch, rows):
    assert sibling(tiny_model(), "decoding_hrm_text").bucket_rows(batch) == rows


@pytest.mark.parametrize("products", [False, True])
def test_a_compiled_layer_serves_the_static_steps(short_buckets, products):
    plain = one_answer_model()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    short_buckets._set_compile_options((("backend", backend), ("dynamic", False), ("fullgraph", True)))
    call = {"token_type_ids": TYPES, "max_new_tokens": 7, **GREEDY}
    short_buckets.generate(IDS, **{**call, "max_new_tokens": 3})
    for bucket in short_buckets._decoder._buckets.values():
        bucket.plan.products = products
    assert_same_logits(short_buckets.generate(IDS, **call), plain.generate(IDS, **call))
    # One graph for each capacity and attention, whatever the layer, the slot and the step.
    assert 1 <= len(graphs) <= 3
    torch._dynamo.reset()


cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@cuda
@pytest.mark.parametrize("compile_layers", [False, True])
@pytest.mark.parametrize("rows", [1, 3])
def test_captured_steps_equal_plain_ones(compile_layers, rows):
    plain = one_answer_model().cuda()
    captured = one_answer_model().cuda().optimize_for_inference(compile_layers=compile_layers)
    call = {"token_type_ids": TYPES[:rows].cuda(), "max_new_tokens": 300, **GREEDY}
    ids = IDS[:rows].cuda()
    for _ in range(2):
        one, other = captured.generate(ids, **call), plain.generate(ids, **call)
        assert torch.equal(one.sequences, other.sequences)
        for left, right in zip(one.logits, other.logits):
            assert torch.allclose(left, right, atol=2e-3)
    graphs = [bucket.graph for bucket in captured._decoder._buckets.values()]
    assert len(graphs) == 2 and all(graphs)
