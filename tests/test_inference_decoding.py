"""Decoding over static buffers: the same answers as plain decoding, and the graphs themselves where there is CUDA."""

from __future__ import annotations

import copy
import gc
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import DynamicCache, StaticCache, TextIteratorStreamer

from .harness import GENERATE_MODES, NOT_GREEDY, deviation, is_greedy
from .one_answer_models import one_answer_model
from .optimized_models import ReplayedStep, captured, decode_statically, sibling
from .tiny import load_class, tiny_model


IDS = torch.tensor([[6, 20, 31, 42, 7], [6, 9, 55, 60, 7], [6, 33, 8, 14, 7]])
TYPES = torch.ones_like(IDS)
GREEDY = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True, "eos_token_id": None}


@pytest.fixture
def short_buckets(monkeypatch):
    """A model whose buckets are a few positions long, so that a short answer crosses several of them."""
    model = decode_statically(one_answer_model())
    module = sibling(model, "inference_hrm_text")
    monkeypatch.setattr(module, "CAPACITY_STEP", 8)
    monkeypatch.setattr(module, "ARENA_STEP", 24)
    return model


# What `generate` says of a decoding step.
STEP = load_class("layout_hrm_text.StepLayout")(padded=False)


def cache_of(model, *caches):
    """An HrmTextCache as a call of `generate` gets it."""
    given = caches[0] if caches else None
    return model._captured_cache(model.generation_config, given) or load_class("cache_hrm_text.HrmTextCache")(
        config=model.config
    )


def step(model, cache, token: int) -> torch.Tensor:
    return model(torch.tensor([[token]]), past_key_values=cache, use_cache=True, layout=STEP).logits


def assert_same_logits(one, other, atol: float = 1e-5):
    assert torch.equal(one.sequences, other.sequences)
    for left, right in zip(one.logits, other.logits):
        assert torch.allclose(left, right, atol=atol)


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
    # Six buckets of 8 positions, each with either attention for single queries, and twice in a larger arena.
    assert captured(short_buckets) == 12
    assert {arena.rows for arena in short_buckets._decoder._free} == {
        sibling(plain, "inference_hrm_text").bucket_rows(rows)
    }


def test_left_padding(short_buckets):
    plain = one_answer_model()
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 1, 1, 1, 1]])
    call = {"token_type_ids": TYPES * mask, "attention_mask": mask, "max_new_tokens": 20, **GREEDY}
    assert_same_logits(short_buckets.generate(IDS, **call), plain.generate(IDS, **call))
    assert captured(short_buckets)


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
    assert captured(short_buckets)


def test_a_conversation_goes_on_with_its_cache(short_buckets):
    plain, answers = one_answer_model(), []
    for model in (short_buckets, plain):
        first = model.generate(IDS[:1], token_type_ids=TYPES[:1], max_new_tokens=6, use_cache=True, **GREEDY)
        ids = torch.cat([first.sequences, IDS[1:2]], dim=1)
        types = torch.cat([TYPES[:1], torch.zeros(1, 6, dtype=torch.long), TYPES[:1]], dim=1)
        cache = first.past_key_values
        answers.append(model.generate(ids, token_type_ids=types, past_key_values=cache, max_new_tokens=8, **GREEDY))
    assert_same_logits(*answers)


@torch.no_grad()
def test_two_caches_take_turns(short_buckets):
    plain = one_answer_model()
    results = []
    for model in (short_buckets, plain):
        caches, logits = [cache_of(model), cache_of(model)], []
        for row, cache in enumerate(caches):
            model(IDS[row : row + 1], token_type_ids=TYPES[:1], past_key_values=cache)
        for token in range(20, 32):
            logits += [step(model, cache, token) for cache in caches]
        results.append((torch.cat(logits), [cache.layers[-1].keys for cache in caches]))
    assert captured(short_buckets)
    assert torch.allclose(results[0][0], results[1][0], atol=1e-5)
    for ours, theirs in zip(results[0][1], results[1][1]):
        assert ours.shape == theirs.shape
        assert torch.allclose(ours, theirs, atol=1e-5)


def test_threads_generate_on_one_model(short_buckets):
    """Each call has an arena of its own: eight threads get eight right answers, twice over the same arenas."""
    plain = one_answer_model()
    call = {"max_new_tokens": 12, **GREEDY}
    prompts = [torch.tensor([[6, 20 + i, 31, 42, 7]]) for i in range(8)]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(2):
            got = list(pool.map(lambda ids: short_buckets.generate(ids, token_type_ids=TYPES[:1], **call), prompts))
            for ids, answer in zip(prompts, got):
                assert_same_logits(answer, plain.generate(ids, token_type_ids=TYPES[:1], **call))
    assert captured(short_buckets)


@torch.no_grad()
def test_cropping_goes_back(short_buckets):
    plain, found = one_answer_model(), []
    for model in (short_buckets, plain):
        cache = cache_of(model)
        model(IDS[:1], token_type_ids=TYPES[:1], past_key_values=cache)
        for token in (30, 31, 32):
            step(model, cache, token)
        cache.crop(-2)
        assert cache.get_seq_length() == 6
        found.append(step(model, cache, 40))
    assert torch.allclose(*found, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("change", ["crop", "reorder", "select", "repeat", "reset"])
def test_a_changed_cache_goes_on(short_buckets, change):
    """Whatever happens to the storages of a cache between steps, the next one reads what it holds now."""
    plain, found = one_answer_model(), []
    for model in (short_buckets, plain):
        cache, rows = cache_of(model), 3
        model(IDS, token_type_ids=TYPES, past_key_values=cache)
        for token in (30, 31):
            model(torch.full((3, 1), token), past_key_values=cache, layout=STEP)
        if change == "crop":
            cache.crop(-1)
        elif change == "reorder":
            cache.reorder_cache(torch.tensor([2, 0, 0]))
        elif change == "select":
            cache.batch_select_indices(torch.tensor([2, 1]))
            rows = 2
        elif change == "repeat":
            cache.batch_repeat_interleave(2)
            rows = 6
        else:
            cache.reset()
            model(IDS.flip(0), token_type_ids=TYPES, past_key_values=cache)
        for token in (40, 41):
            call = {"past_key_values": cache, "layout": STEP}
            found.append(model(torch.full((rows, 1), token), **call).logits)
    assert torch.allclose(found[0], found[2], atol=1e-5) and torch.allclose(found[1], found[3], atol=1e-5)


@torch.no_grad()
def test_a_cache_outlives_the_decoder(short_buckets):
    cache = cache_of(short_buckets)
    short_buckets(IDS[:1], token_type_ids=TYPES[:1], past_key_values=cache)
    step(short_buckets, cache, 30)
    before = [layer.keys.clone() for layer in cache.layers]
    short_buckets.undo_inference_optimization()
    gc.collect()
    assert all(torch.equal(old, layer.keys) for old, layer in zip(before, cache.layers))
    step(short_buckets, cache, 31)
    assert all(torch.equal(old, layer.keys[:, :, :6]) for old, layer in zip(before, cache.layers))


def test_arenas_serve_again_once_nobody_looks_at_them(short_buckets):
    call = {"token_type_ids": TYPES, "max_new_tokens": 6, **GREEDY}
    short_buckets.generate(IDS, **call)
    gc.collect()
    decoder, steps = short_buckets._decoder, captured(short_buckets)
    (arena,) = decoder._free
    kept = short_buckets.generate(IDS, **call).past_key_values.layers[3].keys
    gc.collect()
    assert captured(short_buckets) == steps and decoder._free == [arena]
    before = kept.clone()
    short_buckets.generate(IDS.flip(1), **call)
    assert torch.equal(kept, before), "keys that a user kept were overwritten"
    assert arena not in decoder._free


def test_numbers_of_earlier_conversations_are_gone(short_buckets):
    plain = one_answer_model()
    call = {"token_type_ids": TYPES, "max_new_tokens": 12, **GREEDY}
    short_buckets.generate(IDS, **call)
    gc.collect()
    (arena,) = short_buckets._decoder._free
    arena.storage.fill_(float("nan"))
    assert_same_logits(short_buckets.generate(IDS, **call), plain.generate(IDS, **call))
    gc.collect()
    assert arena in short_buckets._decoder._free


def test_a_crop_hides_what_is_not_finite(short_buckets):
    plain, found = one_answer_model(), []
    for model in (short_buckets, plain):
        with torch.no_grad():
            cache = cache_of(model)
            model(IDS[:1], token_type_ids=TYPES[:1], past_key_values=cache)
            for token in (30, 31):
                step(model, cache, token)
            for layer in cache.layers:
                layer.values[:, :, -1] = float("nan")
            cache.crop(-1)
            found.append(step(model, cache, 32))
    assert torch.allclose(*found, atol=1e-5)


# ---- what decides which steps are replayed --------------------------------------------------------------------------


def adapted():
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, target_modules=["gqkv_proj", "down_proj"], init_lora_weights=False)
    return peft.get_peft_model(one_answer_model(), config).eval()


def test_a_replayed_step_is_blind():
    """The stand-in of these tests is as blind as a CUDA graph, or they would show nothing."""
    model = decode_statically(one_answer_model(), ReplayedStep)
    cache = cache_of(model)
    with torch.no_grad():
        model(IDS[:1], token_type_ids=TYPES[:1], past_key_values=cache)
        step(model, cache, 30)
        before = step(model, cache, 31)
        cache.crop(-1)
        model.config.H_cycles = 1
        assert torch.allclose(step(model, cache, 31), before, atol=1e-6)


def test_adapters_are_switched_and_scaled():
    model = adapted()
    base = decode_statically(model.base_model.model, ReplayedStep)
    call = {"token_type_ids": TYPES, "max_new_tokens": 4, **GREEDY}
    layers = [module for module in base.modules() if hasattr(module, "set_scale")]

    def both() -> tuple:
        decoder, steps = base._decoder, captured(base)
        one = model.generate(input_ids=IDS, **call)
        new = captured(base) > steps
        base._decoder = None
        other = model.generate(input_ids=IDS, **call)
        base._decoder = decoder
        assert_same_logits(one, other, atol=1e-3)
        return one.logits[-1], new

    with_adapter, new = both()
    assert new
    with model.disable_adapter():
        without, new = both()
    assert new and not torch.allclose(without, with_adapter, atol=1e-1)
    again, new = both()
    assert not new and torch.allclose(again, with_adapter, atol=1e-5)
    for layer in layers:
        layer.set_scale("default", 5.0)
    scaled, new = both()
    assert new and not torch.allclose(scaled, with_adapter, atol=1e-1)
    model.merge_adapter()
    merged, new = both()
    assert new and torch.allclose(merged, scaled, atol=1e-3)


@pytest.mark.parametrize("change", ["cycles", "scale", "weights", "moved", "layer"])
def test_a_changed_model_is_noticed(change):
    model, plain = decode_statically(one_answer_model(), ReplayedStep), one_answer_model()
    call = {"token_type_ids": TYPES, "max_new_tokens": 4, **GREEDY}
    assert_same_logits(model.generate(IDS, **call), plain.generate(IDS, **call))
    for each in (model, plain):
        if change == "cycles":
            each.config.L_cycles = 1
        elif change == "scale":
            each.config.embedding_scale = 3.0
        elif change == "weights":
            each.lm_head.weight.data.mul_(-1)  # in place: the graphs see it
        elif change == "moved":
            each.lm_head.weight.data = -each.lm_head.weight.data
        else:
            each.model.H_module.layers = torch.nn.ModuleList(reversed(each.model.H_module.layers))
            each.model.H_module.layers.append(each.model.L_module.layers[0])
            each.model.H_module.layers = each.model.H_module.layers[1:]
    got, wanted = model.generate(IDS, **call), plain.generate(IDS, **call)
    assert_same_logits(got, wanted)


def test_hooks_fire_at_every_step(short_buckets):
    layer, seen = short_buckets.model.L_module.layers[0], []
    call = {"token_type_ids": TYPES, "max_new_tokens": 4, **GREEDY}
    for register in ("register_forward_hook", "register_forward_pre_hook"):
        seen.clear()
        handle = getattr(layer, register)(lambda *arguments: seen.append(arguments) and None)
        short_buckets.generate(IDS, **call)
        handle.remove()
        assert len(seen) == 4 * short_buckets.config.H_cycles * short_buckets.config.L_cycles
        assert captured(short_buckets) == 0
    short_buckets.generate(IDS, **call)
    assert captured(short_buckets)


def test_hooks_of_accelerate_are_called(short_buckets):
    accelerate = pytest.importorskip("accelerate")

    class Counting(accelerate.hooks.ModelHook):
        calls = 0

        def pre_forward(self, module, *args, **kwargs):
            Counting.calls += 1
            return args, kwargs

    layer = short_buckets.model.L_module.layers[0]
    accelerate.hooks.add_hook_to_module(layer, Counting())
    short_buckets.generate(IDS, token_type_ids=TYPES, max_new_tokens=4, **GREEDY)
    assert Counting.calls == 4 * short_buckets.config.H_cycles * short_buckets.config.L_cycles


def test_deterministic_mode_chooses_no_attention(short_buckets):
    torch.use_deterministic_algorithms(True)
    try:
        short_buckets.generate(IDS, token_type_ids=TYPES, max_new_tokens=3, **GREEDY)
    finally:
        torch.use_deterministic_algorithms(False)
    assert captured(short_buckets) == 1


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
    assert captured(short_buckets) == 0


def test_what_is_refused_says_why(short_buckets):
    model, config = short_buckets, short_buckets.generation_config

    def reason(given=None, **changes):
        changed = copy.deepcopy(config)
        changed.update(**changes)
        return model._why_not_captured(changed, given)

    assert reason() is None and reason(cache_of(model)) is None
    assert "DynamicCache" in reason(DynamicCache())
    assert "static" in reason(cache_implementation="static")
    assert "use_cache" in reason(use_cache=False)
    assert "hidden states" in reason(output_hidden_states=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert "autocast" in reason()
    model.model.register_forward_hook(lambda *arguments: None)
    assert "hooks" in reason()
    model.set_attn_implementation("eager")
    assert "sdpa" in reason()
    assert model._captured_cache(config, None) is None


def test_only_calls_of_generate_are_captured(short_buckets):
    """A cache that has been captured is an ordinary one for every other call."""
    plain = one_answer_model()
    call = {"token_type_ids": TYPES, "max_new_tokens": 4, **GREEDY}
    caches = [model.generate(IDS, **call).past_key_values for model in (short_buckets, plain)]
    steps = captured(short_buckets)
    with torch.no_grad():
        found = [model(IDS[:, 1:2], past_key_values=cache) for model, cache in zip((short_buckets, plain), caches)]
    assert torch.allclose(found[0].logits, found[1].logits, atol=1e-5) and captured(short_buckets) == steps


def test_copies_and_pickles_start_without_buffers(short_buckets):
    output = short_buckets.generate(IDS, token_type_ids=TYPES, max_new_tokens=4, **GREEDY)
    twin = pickle.loads(pickle.dumps(sibling(short_buckets, "inference_hrm_text").CapturedDecoder({"dynamic": True})))
    assert twin.options == {"dynamic": True} and twin._free == []
    assert copy.deepcopy(short_buckets)._decoder._free == []
    for cache in (copy.deepcopy(output.past_key_values), pickle.loads(pickle.dumps(output.past_key_values))):
        assert cache._captured is None
        for ours, theirs in zip(cache.layers, output.past_key_values.layers):
            assert torch.equal(ours.keys, theirs.keys)


@pytest.mark.parametrize(("batch", "rows"), [(1, 1), (2, 2), (3, 4), (4, 4), (5, 8), (17, 32)])
def test_rows_are_bucketed(batch, rows):
    assert sibling(tiny_model(), "inference_hrm_text").bucket_rows(batch) == rows


def test_a_compiled_layer_serves_the_static_steps(short_buckets):
    plain = one_answer_model()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    decode_statically(short_buckets, options={"backend": backend, "dynamic": False, "fullgraph": True})
    call = {"token_type_ids": TYPES, "max_new_tokens": 7, **GREEDY}
    assert_same_logits(short_buckets.generate(IDS, **call), plain.generate(IDS, **call))
    # One graph for each capacity and attention, whatever the layer, the slot and the step.
    assert 1 <= len(graphs) <= 4
    torch._dynamo.reset()


cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@cuda
@pytest.mark.parametrize("compile_layers", [False, True])
@pytest.mark.parametrize("rows", [1, 3])
def test_captured_steps_equal_plain_ones(compile_layers, rows):
    plain = one_answer_model().cuda()
    fast = one_answer_model().cuda().optimize_for_inference(compile_layers=compile_layers)
    call = {"token_type_ids": TYPES[:rows].cuda(), "max_new_tokens": 300, **GREEDY}
    ids = IDS[:rows].cuda()
    for _ in range(2):
        one, other = fast.generate(ids, **call), plain.generate(ids, **call)
        assert torch.equal(one.sequences, other.sequences)
        for left, right in zip(one.logits, other.logits):
            assert torch.allclose(left, right, atol=2e-3)
    del one
    gc.collect()
    (arena,) = fast._decoder._free
    assert [len(steps) for steps in arena._steps.values()] == [2]
