"""Every attention backend gives the answer of the reference, in every mode of the forward pass."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import modeling_flash_attention_utils as flash_utils

from .harness import (
    FORWARD_MODES,
    GENERATE_MODES,
    NOT_GREEDY,
    deviation,
    is_greedy,
)
from .one_answer_models import one_answer_model


# Attention of a response that goes through other kernels than the reference's may differ by more than one of float32.
TOLERANCE = {"eager": 1e-4, "sdpa": 1e-4, "flex_attention": 2e-3, "flash_attention_2": 1e-4, "flash_attention_3": 1e-4}
GENERATE_SUBSET = (
    "greedy, block + response + block",
    "ragged batch of all layouts",
    "static cache",
    "beam search",
    "assisted by itself",
    "chunks of 3, ragged batch",
    "second turn of a ragged batch",
)


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


@pytest.fixture(scope="module")
def reference():
    return one_answer_model()


@pytest.fixture
def backend_model(request, monkeypatch):
    """A model with the backend of the test's parameter, switched to at run time."""
    name = request.param
    model = one_answer_model()
    if name.startswith("flash"):
        kernel = flash_stand_in if name.endswith("2") else flash_3_stand_in
        monkeypatch.setattr(flash_utils, "lazy_import_flash_attention", lambda *args, **kwargs: None)
        monkeypatch.setattr(flash_utils, "_flash_varlen_fn", kernel, raising=False)
        # The library refuses flash attention without its package; everything below that check is real.
        model.config._attn_implementation = name
    else:
        model.set_attn_implementation(name)
    model.backend = name
    return model


@pytest.mark.parametrize("backend_model", list(TOLERANCE), indirect=True)
@pytest.mark.parametrize("mode", FORWARD_MODES)
@torch.no_grad()
def test_forward(reference, backend_model, mode):
    assert deviation(reference, FORWARD_MODES[mode](backend_model)) < TOLERANCE[backend_model.backend]


@pytest.mark.parametrize("backend_model", [name for name in TOLERANCE if name != "sdpa"], indirect=True)
@pytest.mark.parametrize("mode", GENERATE_SUBSET)
def test_generate(reference, backend_model, mode):
    answers = GENERATE_MODES[mode](backend_model)
    assert deviation(reference, answers) < TOLERANCE[backend_model.backend]
    assert mode in NOT_GREEDY or is_greedy(reference, answers)
