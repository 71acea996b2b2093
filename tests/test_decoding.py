"""One token through a stack in one function: what it serves, and that it answers as the layers do."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import DynamicCache

from .optimized_models import pack_all, sibling
from .tiny import tiny_model


IDS = torch.tensor([[7, 21, 22, 23, 8, 30, 31, 32]])


@pytest.fixture
def served(monkeypatch):
    """Says of each stack call of one token whether it was served."""
    module = sibling(tiny_model(), "modeling_hrm_text")
    calls, real = [], module.one_token_through

    def watched(stack, x, *others):
        output = real(stack, x, *others)
        if x.shape[1] == 1:
            calls.append(output is not None)
        return output

    monkeypatch.setattr(module, "one_token_through", watched)
    return calls


def decode(model, ids=IDS, cache=None, **more):
    """Logits of the last three tokens, each in a call of its own on a live cache."""
    types = torch.ones_like(ids)
    with torch.no_grad():
        types[:, 5:] = 0
        cache = model(ids[:, :5], token_type_ids=types[:, :5], past_key_values=cache, use_cache=True).past_key_values
        steps = [model(ids[:, i : i + 1], past_key_values=cache, use_cache=True, **more) for i in range(5, 8)]
    return torch.cat([step.logits for step in steps], dim=1)


def whole(model, ids=IDS):
    types = torch.ones_like(ids)
    types[:, 5:] = 0
    with torch.no_grad():
        return model(ids, token_type_ids=types, use_cache=False).logits[:, 5:]


@pytest.mark.parametrize("prepare", [lambda model: model, pack_all], ids=["plain", "packed"])
def test_it_answers_as_a_plain_forward(served, prepare):
    model = prepare(tiny_model())
    assert torch.allclose(decode(model), whole(model), atol=1e-4)
    assert len(served) == 3 * model.config.H_cycles * (model.config.L_cycles + 1) and all(served)


@pytest.mark.parametrize("weights", [None, "int8", "int4"])
def test_in_bfloat16_it_is_what_the_layers_compute(monkeypatch, weights):
    model = tiny_model().to(torch.bfloat16)
    model.optimize_for_inference(weights=weights) if weights else pack_all(model)
    fast = decode(model)
    monkeypatch.setattr(sibling(model, "modeling_hrm_text"), "one_token_through", lambda *arguments: None)
    assert (fast - decode(model)).norm() < 1e-2 * fast.norm()


def hook(model):
    model.model.L_module.layers[0].mlp.register_forward_hook(lambda module, inputs, output: 2 * output)


def other_forward(model):
    attn = model.model.L_module.layers[0].attn
    attn.forward = lambda *arguments, **more: tuple(type(attn).forward(attn, *arguments, **more))


def other_layer(model):
    class Layer(type(model.model.L_module.layers[0])):
        def forward(self, *arguments, **more):
            return 2 * super().forward(*arguments, **more)

    model.model.L_module.layers[0].__class__ = Layer


def training(model):
    model.model.L_module.train()


@pytest.mark.parametrize("change", [hook, other_forward, other_layer, training])
def test_layers_that_do_more_are_called(served, change):
    model = tiny_model()
    before = decode(model)
    served.clear()
    change(model)
    changed = decode(model)
    assert torch.allclose(changed, whole(model), atol=1e-4)
    assert sum(served) == 3 * model.config.H_cycles, "the other stack alone is served"
    assert torch.allclose(changed, before, atol=1e-4) is (change in (other_forward, training))


def test_linear_layers_that_do_more_are_called(served):
    """An adapter, a hook: they take part, and the rest of the stack is served."""
    model = tiny_model()
    model.model.L_module.layers[0].mlp.down_proj.register_forward_hook(lambda module, inputs, output: output + 0.1)
    model.model.H_module.layers[0].attn.o_proj = nn.Sequential(model.model.H_module.layers[0].attn.o_proj, nn.Tanh())
    assert torch.allclose(decode(model), whole(model), atol=1e-4)
    assert all(served)


@pytest.mark.parametrize(
    ("more", "cache"),
    [({"output_attentions": True}, None), ({"output_hidden_states": True}, None), ({}, DynamicCache())],
    ids=["weights", "hidden states", "another cache"],
)
def test_what_is_left_to_the_layers(served, more, cache):
    model = tiny_model(attn_implementation="eager") if "output_attentions" in more else tiny_model()
    assert torch.allclose(decode(model, cache=cache, **more), whole(model), atol=1e-4)
    assert not any(served)


def test_rows_are_left_to_the_layers(served):
    model = tiny_model()
    ids = torch.cat((IDS, IDS.flip(1)))
    assert torch.allclose(decode(model, ids), whole(model, ids), atol=1e-4)
    assert not any(served)


def test_a_mask_that_hides_is_left_to_the_layers(served):
    model = tiny_model()
    mask = torch.ones_like(IDS)
    mask[0, 5] = 0
    types = (torch.arange(8) < 5).long()[None]
    with torch.no_grad():
        cache = model(IDS[:, :7], attention_mask=mask[:, :7], token_type_ids=types[:, :7], use_cache=True)
        step = model(IDS[:, 7:], attention_mask=mask, past_key_values=cache.past_key_values, use_cache=True)
        wanted = model(IDS, attention_mask=mask, token_type_ids=types, use_cache=False).logits[:, 7:]
    assert torch.allclose(step.logits, wanted, atol=1e-4)
    assert not any(served)


def test_with_gradient_and_switched_off(served):
    model = tiny_model()
    with type(model).use_fast_kernels(False):
        wanted = decode(model)
    assert not any(served)
    with torch.no_grad():
        cache = model(IDS[:, :7], token_type_ids=torch.ones_like(IDS[:, :7]), use_cache=True).past_key_values
    model(IDS[:, 7:], past_key_values=cache, use_cache=True).logits.sum().backward()
    assert not all(served), "the passes that take part in backward"
    assert all(parameter.grad is not None for parameter in model.model.L_module.parameters())
    assert torch.allclose(decode(model), wanted, atol=1e-4)
