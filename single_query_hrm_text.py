"""Attention of one new token on the CPU, where the stock kernel reads the cache slowly.

For a single query the stock kernel calls a small matrix product of MKL for each head and 512 keys. On processors that
MKL does not favour this reads a bfloat16 cache at a tenth of the memory's speed, and two batched matrix products of
oneDNN are several times faster; on others the stock kernel is the faster one. So both are timed once.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F

from .timing_hrm_text import least_seconds, may_choose


# Below this many keys there is little to gain. The products round the scores to the cache's dtype, which the stock
# kernel does not: they have to be clearly faster, which also keeps the choice the same from run to run.
_LEAST_KEYS, _MARGIN = 512, 1.5
_TIMED_KEYS, _TIMED_HEADS, _TIMED_RUNS = 1024, 8, 5


def single_query_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scaling: float
) -> torch.Tensor:
    """Attention of one query a row as two batched matrix products, softmax in float32.

    Args:
        query: [batch, heads, 1, head_dim].
        key, value: [batch, heads, keys, head_dim], also views of a longer storage.
        mask: broadcasting to [batch, heads, 1, keys]; bool, True where the query sees the key, or floats that are
            added to the scores; None for all.
        scaling: factor on the scores.

    Returns:
        [batch, heads, 1, head_dim].
    """
    batch, heads, _, head_dim = query.shape
    # Batch and heads merge without a copy: rows of a storage lie at equal distances.
    scores = torch.bmm(key.flatten(0, 1), query.reshape(batch * heads, head_dim, 1)).view(batch, heads, 1, -1).float()
    scores = scores * scaling
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype is torch.bool else scores + mask
    weights = scores.softmax(dim=-1).to(value.dtype)
    return torch.bmm(weights.flatten(0, 1), value.flatten(0, 1)).view(query.shape)


def single_query_pays(query: torch.Tensor, key: torch.Tensor) -> bool:
    """Whether `single_query_attention` is to serve this call instead of the stock kernel."""
    if query.shape[2] != 1 or key.shape[2] < _LEAST_KEYS or query.device.type != "cpu":
        return False
    if query.dtype is not torch.bfloat16 or (torch.is_grad_enabled() and query.requires_grad) or not may_choose():
        return False
    return products_are_faster(query.shape[3], torch.get_num_threads())


@functools.cache
def products_are_faster(head_dim: int, threads: int) -> bool:
    """Times both ways on bfloat16 keys and values, once in a process; takes some milliseconds.

    Args:
        head_dim: of the model.
        threads: of torch, to measure again when it changes.
    """
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        query, key, value = (
            torch.randn(1, _TIMED_HEADS, length, head_dim, generator=generator).to(torch.bfloat16)
            for length in (1, _TIMED_KEYS, _TIMED_KEYS)
        )
        runs = (
            lambda: F.scaled_dot_product_attention(query, key, value),
            lambda: single_query_attention(query, key, value, None, head_dim**-0.5),
        )
        stock, products = least_seconds(runs, times=_TIMED_RUNS)
    return products * _MARGIN < stock


__all__ = ["products_are_faster", "single_query_attention", "single_query_pays"]
