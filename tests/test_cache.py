"""HrmTextCache and transformers' own caches: one slot a call, in place, and the same logits at every step."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer

from .tiny import load_class, tiny_config, tiny_model


Cache = load_class("cache_hrm_text.HrmTextCache")
Layer = load_class("cache_hrm_text.GrowingLayer")


def states(tokens: int, rows: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(rows, 3, tokens, 4), torch.randn(rows, 3, tokens, 4)


def filled(tokens: int) -> tuple[Layer, torch.Tensor]:
    layer = Layer()
    keys, values = states(tokens)
    layer.update(keys, values)
    return layer, keys


@torch.no_grad()
def test_appending_copies_nothing_until_a_block_is_full():
    layer, keys = filled(100)
    reallocations, pointer, history = 0, layer.keys.data_ptr(), [keys]
    for _ in range(2000):
        new, value = states(1)
        returned, _ = layer.update(new, value)
        history.append(new)
        reallocations += layer.keys.data_ptr() != pointer
        pointer = layer.keys.data_ptr()
        capacity = layer._key_storage.shape[2]
        assert capacity - layer.get_seq_length() <= max(256, layer.get_seq_length() / 4)
    assert reallocations <= 2000 / 256 + 8
    assert torch.equal(returned, torch.cat(history, dim=2)) and torch.equal(layer.keys, returned)
    assert layer.keys.untyped_storage().data_ptr() == layer._key_storage.untyped_storage().data_ptr()


@torch.no_grad()
def test_where_one_slot_needs_room_all_get_it():
    """Storages that are made one by one between the layers of a prompt leave holes in the heap."""
    cache = Cache(config=tiny_config())
    for tokens in (40, 60):
        before = {layer._key_storage.data_ptr() for layer in cache.layers if layer.is_initialized}
        cache.update(*states(tokens), 0)
        storages = [layer._key_storage for layer in cache.layers]
        assert {storage.shape for storage in storages} == {storages[0].shape}
        assert not before & {storage.data_ptr() for storage in storages}
        for slot in range(1, len(cache.layers)):
            assert cache.layers[slot].get_seq_length() == cache.layers[0].get_seq_length() - tokens
            cache.update(*states(tokens), slot)
        assert all(layer._key_storage is storage for layer, storage in zip(cache.layers, storages))


@torch.no_grad()
def test_a_slot_lies_on_the_device_of_its_layer():
    cache = Cache(config=tiny_config())
    cache.update(*states(5), 0)
    cache.update(*(tensor.to("meta") for tensor in states(5)), 1)
    assert [layer.keys.device.type for layer in cache.layers[:2]] == ["cpu", "meta"]
    assert [layer.get_seq_length() for layer in cache.layers[:3]] == [5, 5, 0]


@torch.no_grad()
def test_crop_then_append():
    layer, keys = filled(20)
    layer.crop(-5)
    assert layer.get_seq_length() == 15
    new, value = states(2)
    layer.update(new, value)
    assert torch.equal(layer.keys, torch.cat([keys[:, :, :15], new], dim=2))
    layer.crop(10)
    assert torch.equal(layer.keys, keys[:, :, :10])
    theirs = DynamicLayer()
    theirs.update(keys[:, :, :10], keys[:, :, :10])
    for each in (layer, theirs):
        each.crop(0)  # nothing, or everything in older releases
    assert layer.get_seq_length() == theirs.get_seq_length()


@torch.no_grad()
def test_rows():
    layer, keys = filled(7)
    layer.reorder_cache(torch.tensor([1, 1]))
    assert torch.equal(layer.keys, keys[[1, 1]])
    layer.batch_repeat_interleave(2)
    assert torch.equal(layer.keys, keys[[1, 1, 1, 1]])
    layer.batch_select_indices(torch.tensor([0, 3]))
    new, value = states(1)
    layer.update(new, value)
    assert torch.equal(layer.keys, torch.cat([keys[[1, 1]], new], dim=2))
    layer.reset()
    assert layer.get_seq_length() == 0 and not layer.is_initialized
    layer.update(new, value)
    assert torch.equal(layer.keys, new)


@torch.no_grad()
def test_copies_are_independent():
    layer, keys = filled(7)
    twin = copy.deepcopy(layer)
    layer.update(*states(1))
    twin.update(*states(1))
    assert torch.equal(twin.keys[:, :, :7], keys) and not torch.equal(twin.keys, layer.keys)


def test_gradients_flow_through_the_cache():
    model = tiny_model()
    ids = torch.randint(12, 96, (1, 8))
    whole = model(ids, labels=ids).logits[:, 4:].square().sum()
    whole.backward()
    expected = model.model.H_module.layers[0].attn.gqkv_proj.weight.grad.clone()
    model.zero_grad()
    first = model(ids[:, :4])
    model(ids[:, 4:], past_key_values=first.past_key_values).logits.square().sum().backward()
    torch.testing.assert_close(
        model.model.H_module.layers[0].attn.gqkv_proj.weight.grad, expected, rtol=1e-4, atol=1e-4
    )


CACHES = {
    "own": lambda model: Cache(config=model.config),
    "own without config": lambda model: Cache(),
    "dynamic": lambda model: DynamicCache(config=model.config),
    "static": lambda model: StaticCache(config=model.config, max_cache_len=40),
}


@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@torch.no_grad()
def test_every_step_equals_the_uncached_forward(kind, implementation):
    model = tiny_model(attn_implementation=implementation)
    ids = torch.randint(12, 96, (2, 24))
    types = torch.zeros_like(ids)
    types[:, :9] = 1
    whole = model(ids, token_type_ids=types, use_cache=False).logits
    cache = CACHES[kind](model)
    logits = [model(ids[:, :9], token_type_ids=types[:, :9], past_key_values=cache).logits]
    for i in range(9, 24):
        logits.append(model(ids[:, i : i + 1], past_key_values=cache).logits)
        assert int(cache.get_seq_length()) == i + 1
    torch.testing.assert_close(torch.cat(logits, dim=1), whole, atol=1e-5, rtol=0)


def test_generate_uses_our_cache_and_the_model_too():
    model = tiny_model()
    ids = torch.randint(12, 96, (1, 6))
    assert isinstance(model(ids).past_key_values, Cache)
    generated = model.generate(ids, max_new_tokens=3, return_dict_in_generate=True, do_sample=False)
    assert isinstance(generated.past_key_values, Cache)
    assert len(generated.past_key_values.layers) == model.config.num_hidden_layers


def test_slots_follow_the_loop():
    """Each attention call writes the slot of its place in the loop: (h * (L_cycles + 1) + l) * n + layer."""
    model = tiny_model(H_cycles=2, L_cycles=3)
    seen = []

    class Recording(Cache):
        def update(self, key_states, value_states, layer_idx, *args, **kwargs):
            seen.append(layer_idx)
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    model(torch.randint(12, 96, (1, 4)), past_key_values=Recording(config=model.config))
    assert seen == list(range(model.config.num_hidden_layers))


def test_too_short_static_cache():
    model = tiny_model()
    with pytest.raises(ValueError, match="max_cache_len"):
        model(torch.randint(12, 96, (1, 9)), past_key_values=StaticCache(config=model.config, max_cache_len=8))
