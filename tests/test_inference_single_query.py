"""Attention of one new token as batched matrix products equals the stock kernel."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from .optimized_models import sibling
from .tiny import tiny_model


@pytest.fixture(scope="module")
def module():
    return sibling(tiny_model(), "kernels_hrm_text")


@pytest.fixture(params=["single_query_attention", "wide_single_query_attention"])
def attention(request, module):
    """In the dtype of the cache, and in float32."""
    return getattr(module, request.param)


def drawn(batch: int, keys: int, dtype: torch.dtype):
    """A query, and keys and values that are views of a longer storage."""
    query = torch.randn(batch, 3, 1, 16).to(dtype)
    key, value = (torch.randn(batch, 3, keys + 11, 16).to(dtype)[:, :, :keys] for _ in range(2))
    return query, key, value


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("keys", [1, 37, 600])
@pytest.mark.parametrize("masked", [False, True])
def test_it_equals_the_stock_kernel(attention, batch, keys, masked):
    query, key, value = drawn(batch, keys, torch.float32)
    mask = None
    if masked:
        mask = torch.rand(batch, 1, 1, keys) < 0.6
        mask[..., -1] = True
    wanted = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=0.3)
    assert torch.allclose(attention(query, key, value, mask, 0.3), wanted, atol=1e-5)


def test_bfloat16_stays_within_its_rounding(attention):
    query, key, value = drawn(2, 700, torch.bfloat16)
    exact = F.scaled_dot_product_attention(query.double(), key.double(), value.double())
    got = attention(query, key, value, None, 0.25).double()
    assert (got - exact).norm() / exact.norm() < 2e-2


def test_storage_is_read_in_place(module):
    query, key, value = drawn(2, 700, torch.float32)
    assert key.flatten(0, 1).data_ptr() == key.data_ptr()
    assert not key.is_contiguous()
    assert module.single_query_attention(query, key, value, None, 0.25).shape == query.shape


def test_the_room_of_the_copies_grows_and_serves_every_mode(module):
    """It is kept from call to call: no tensor of inference mode, and no answer depends on what is left in it."""
    answers = {}
    for inference in (True, False):
        with torch.inference_mode(inference), torch.no_grad():
            for keys in (600, 50, 900):
                torch.manual_seed(keys)
                given = drawn(1, keys, torch.bfloat16)
                got = module.wide_single_query_attention(*given, None, 0.25).clone()
                assert torch.equal(answers.setdefault(keys, got), got)


def test_when_it_serves(module, monkeypatch):
    monkeypatch.setattr(module, "fastest_attention", lambda head_dim, threads, keys: module.single_query_attention)
    query, key, _ = drawn(1, 600, torch.bfloat16)
    assert module.attention_of_one_query(query, key) is module.single_query_attention
    assert module.attention_of_one_query(query, key[:, :, :20]) is None
    assert module.attention_of_one_query(query.float(), key.float()) is None
    assert module.attention_of_one_query(query.expand(1, 3, 2, 16), key) is None
    query.requires_grad_()
    assert module.attention_of_one_query(query, key) is None


def test_the_choice_is_measured_once(module):
    first = module.fastest_attention(16, torch.get_num_threads(), 256)
    assert first in (None, module.single_query_attention, module.wide_single_query_attention)
    assert module.fastest_attention(16, torch.get_num_threads(), 256) is first
    assert module.fastest_attention.cache_info().hits


def test_large_caches_are_not_copied(module, monkeypatch):
    """From 4096 keys on, whatever is measured: the room of the copies would hold memory for as long as the thread."""
    monkeypatch.setattr(module, "least_seconds", lambda runs, times: [3.0, 2.0, 1.0][: len(runs)])
    choose = module.fastest_attention.__wrapped__
    assert choose(16, 1, 2048) is module.wide_single_query_attention
    assert choose(16, 1, 4096) is module.single_query_attention


def test_autocast_is_left_to_the_stock_kernel(module):
    query, key, _ = drawn(1, 600, torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert module.attention_of_one_query(query, key) is None


def test_many_rows_count_as_many_keys(module, monkeypatch):
    """The copies of float32 pay for as long as they fit into the caches, whichever way they are long."""
    asked = []
    monkeypatch.setattr(module, "fastest_attention", lambda head_dim, threads, keys: asked.append(keys))
    for batch, keys in ((1, 300), (16, 300), (64, 300), (1, 40)):
        query, key = torch.zeros(batch, 12, 1, 16), torch.zeros(batch, 12, keys, 16)
        module.attention_of_one_query(query.bfloat16(), key.bfloat16())
    assert asked == [256, 4096, 4096, 32]
