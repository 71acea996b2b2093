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


def drawn(batch: int, keys: int, dtype: torch.dtype):
    """A query, and keys and values that are views of a longer storage."""
    query = torch.randn(batch, 3, 1, 16).to(dtype)
    key, value = (torch.randn(batch, 3, keys + 11, 16).to(dtype)[:, :, :keys] for _ in range(2))
    return query, key, value


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("keys", [1, 37, 600])
@pytest.mark.parametrize("masked", [False, True])
def test_it_equals_the_stock_kernel(module, batch, keys, masked):
    query, key, value = drawn(batch, keys, torch.float32)
    mask = None
    if masked:
        mask = torch.rand(batch, 1, 1, keys) < 0.6
        mask[..., -1] = True
    wanted = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=0.3)
    assert torch.allclose(module.single_query_attention(query, key, value, mask, 0.3), wanted, atol=1e-5)


def test_bfloat16_stays_within_its_rounding(module):
    query, key, value = drawn(2, 700, torch.bfloat16)
    exact = F.scaled_dot_product_attention(query.double(), key.double(), value.double())
    got = module.single_query_attention(query, key, value, None, 0.25).double()
    assert (got - exact).norm() / exact.norm() < 2e-2


def test_storage_is_read_in_place(module):
    query, key, value = drawn(2, 700, torch.float32)
    assert key.flatten(0, 1).data_ptr() == key.data_ptr()
    assert not key.is_contiguous()
    assert module.single_query_attention(query, key, value, None, 0.25).shape == query.shape


def test_when_it_serves(module, monkeypatch):
    monkeypatch.setattr(module, "products_are_faster", lambda head_dim, threads, keys: True)
    query, key, _ = drawn(1, 600, torch.bfloat16)
    assert module.single_query_pays(query, key)
    assert not module.single_query_pays(query, key[:, :, :100])
    assert not module.single_query_pays(query.float(), key.float())
    assert not module.single_query_pays(query.expand(1, 3, 2, 16), key)
    query.requires_grad_()
    assert not module.single_query_pays(query, key)


def test_the_choice_is_measured_once(module):
    first = module.products_are_faster(16, torch.get_num_threads(), 256)
    assert isinstance(first, bool)
    assert module.products_are_faster(16, torch.get_num_threads(), 256) is first
    assert module.products_are_faster.cache_info().hits
