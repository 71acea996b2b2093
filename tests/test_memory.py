"""What a prompt and a cached token cost in memory, and transformers' quantized caches on our slots."""

from __future__ import annotations

import importlib
import importlib.util

import pytest
import torch
from transformers import QuantizedCache

from .one_answer_models import one_answer_model
from .optimized_models import sibling
from .tiny import load_class, tiny_config, tiny_model


IDS = torch.arange(20, 84)[None]


def largest_mask(monkeypatch, model, **call) -> int:
    """Elements of the largest mask that a forward pass hands to an attention call."""
    module, sizes = sibling(model, "modeling_hrm_text"), []
    plain = module.attend

    def noting(plan, *args, **kwargs):
        sizes.append(0 if plan.mask is None else plan.mask.numel())
        return plain(plan, *args, **kwargs)

    monkeypatch.setattr(module, "attend", noting)
    with torch.no_grad():
        model(**call)
    assert len(sizes) == model.config.num_hidden_layers
    return max(sizes)


def test_one_block_and_plain_causal_need_no_mask(monkeypatch):
    model = one_answer_model()
    assert largest_mask(monkeypatch, model, input_ids=IDS, token_type_ids=torch.ones_like(IDS)) == 0
    assert largest_mask(monkeypatch, model, input_ids=IDS) == 0


def test_prefix_and_response_mask_the_response_only(monkeypatch):
    model = one_answer_model()
    types = (torch.arange(64) < 48).long()[None]
    assert largest_mask(monkeypatch, model, input_ids=IDS, token_type_ids=types) == 16 * 64


def test_a_new_token_needs_no_mask(monkeypatch):
    model = one_answer_model()
    with torch.no_grad():
        cache = model(IDS, token_type_ids=torch.ones_like(IDS), use_cache=True).past_key_values
    assert largest_mask(monkeypatch, model, input_ids=IDS[:, :1], past_key_values=cache) == 0


def test_bytes_of_cache_a_token():
    one_billion = load_class("configuration_hrm_text.HrmTextConfig")()
    width = one_billion.num_attention_heads * one_billion.head_dim
    assert 2 * one_billion.num_hidden_layers * width * 2 == 786_432

    model = tiny_model()
    with torch.no_grad():
        cache = model(IDS, use_cache=True).past_key_values
    held = sum(2 * layer.keys.numel() * layer.keys.element_size() for layer in cache.layers)
    config = model.config
    assert held == 64 * 2 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * 4
    stored = sum(2 * layer._key_storage.numel() * 4 for layer in cache.layers)
    assert stored <= held * 1.5


def test_logits_are_kept_for_the_last_position_only(monkeypatch):
    model, shapes = one_answer_model(), []
    model.lm_head.register_forward_hook(lambda module, inputs, output: shapes.append(tuple(output.shape)))
    model.generate(IDS, token_type_ids=torch.ones_like(IDS), max_new_tokens=2, do_sample=False)
    assert shapes == [(1, 1, 96)] * len(shapes) and shapes


@pytest.mark.parametrize(
    ("backend", "bits", "tolerance"),
    [
        ("hqq", 8, 0.02),
        # The first use of quanto compiles a C++ extension.
        pytest.param("quanto", 4, 0.3, marks=pytest.mark.slow),
        pytest.param("quanto", 2, 1.5, marks=pytest.mark.slow),
    ],
)
def test_quantized_caches_serve_our_slots(backend, bits, tolerance):
    if importlib.util.find_spec({"hqq": "hqq", "quanto": "optimum"}[backend]) is None:
        pytest.skip(f"the extra `quantize` with {backend} is not installed")
    model = one_answer_model(hidden_size=128, num_attention_heads=2, intermediate_size=96, initializer_range=0.06)
    axis = 1 if backend == "hqq" else 0
    settings = {"nbits": bits, "axis_key": axis, "axis_value": axis, "q_group_size": 32, "residual_length": 16}
    call = {
        "token_type_ids": torch.ones_like(IDS),
        "max_new_tokens": 24,
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_logits": True,
    }
    plain = model.generate(IDS, **call)
    cache = QuantizedCache(backend=backend, config=model.config, **settings)
    quantized = model.generate(IDS, past_key_values=cache, **call)
    assert len(cache.layers) == model.config.num_hidden_layers
    assert all(layer.is_initialized for layer in cache.layers)
    assert quantized.sequences.shape == plain.sequences.shape
    # The prefill reads nothing from the cache; what follows is as close as the bits allow.
    assert torch.equal(plain.logits[0], quantized.logits[0])
    error = (plain.logits[1] - quantized.logits[1]).norm() / plain.logits[1].norm()
    assert 0 < error < tolerance


def test_the_default_cache_is_ours():
    cache = load_class("cache_hrm_text.HrmTextCache")(config=tiny_config())
    assert len(cache.layers) == tiny_config().num_hidden_layers
