"""Flash attention for machines without a GPU: the signature, the checks and the semantics of the real kernels."""

from __future__ import annotations

import math

import torch


def flash_stand_in(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False
):
    """Variable-length flash attention, with the checks and the lower-right causal mask of the real one.

    q [total queries, heads, head_dim], k and v [total keys, heads, head_dim], offsets int32 [entries + 1].
    """
    assert q.dim() == k.dim() == v.dim() == 3 and k.shape == v.shape
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    starts, key_starts = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    assert starts[0] == key_starts[0] == 0 and starts[-1] == len(q) and key_starts[-1] == len(k)
    out = torch.empty_like(q)
    queries, keys = [], []
    for begin, end, key_begin, key_end in zip(starts, starts[1:], key_starts, key_starts[1:]):
        queries.append(end - begin)
        keys.append(key_end - key_begin)
        scores = torch.einsum("qhd,khd->hqk", q[begin:end], k[key_begin:key_end])
        scores = scores * (q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale)
        if causal:
            hidden = torch.ones(queries[-1], keys[-1]).triu(keys[-1] - queries[-1] + 1).bool()
            scores = scores.masked_fill(hidden, -math.inf)
        out[begin:end] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v[key_begin:key_end])
    assert (max(queries), max(keys)) == (max_seqlen_q, max_seqlen_k)
    return out


def flash_3_stand_in(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale=None, causal=False
):
    """The third generation knows no dropout and may return the log-sum-exp too."""
    lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    return flash_stand_in(q, k, v, *lengths, softmax_scale=softmax_scale, causal=causal), None
