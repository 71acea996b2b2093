"""A linear layer of one row as a product of a matrix and a vector, where that is the faster way."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from .optimized_models import sibling
from .tiny import tiny_model


@pytest.fixture
def module(monkeypatch):
    module = sibling(tiny_model(), "kernels_hrm_text")
    monkeypatch.setattr(module, "vector_is_faster", lambda outputs, inputs, threads: True)
    monkeypatch.setattr(module, "_LEAST_ELEMENTS", 1)
    return module


@pytest.fixture
def products(monkeypatch):
    """Counts the products of a matrix and a vector."""
    calls = []
    stock = torch.mv
    monkeypatch.setattr(torch, "mv", lambda *arguments: calls.append(arguments) or stock(*arguments))
    return calls


def layer(inputs: int = 1536, outputs: int = 700) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(inputs, outputs, bias=False).to(torch.bfloat16).requires_grad_(False)


@pytest.mark.parametrize("shape", [(1, 1), (1,), ()])
def test_it_is_as_exact_as_the_stock_call(module, products, shape):
    linear = layer()
    x = torch.randn(*shape, 1536).to(torch.bfloat16)
    exact = F.linear(x.double(), linear.weight.double())
    got, stock = module.linear(linear, x), linear(x)
    assert len(products) == 1 and got.shape == stock.shape and got.dtype is stock.dtype
    error, of_stock = ((y.double() - exact).norm() / exact.norm() for y in (got, stock))
    assert error < 1.1 * of_stock


def _hooked(linear):
    linear.register_forward_hook(lambda module, inputs, output: output + 1)
    return linear


def _prepared(linear):
    linear.register_forward_pre_hook(lambda module, inputs: (inputs[0] + 1,))
    return linear


def _offloaded(linear):
    linear.forward = lambda x: F.linear(x, linear.weight) + 1
    return linear


class _Adapted(nn.Linear):
    def forward(self, x):
        return super().forward(x) + 1


def _adapted(linear):
    linear.__class__ = _Adapted
    return linear


def _biased(linear):
    linear.bias = nn.Parameter(torch.ones(700, dtype=torch.bfloat16), requires_grad=False)
    return linear


@pytest.mark.parametrize("change", [_hooked, _prepared, _offloaded, _adapted, _biased])
def test_whatever_is_more_than_the_product_is_called(module, products, change):
    linear = change(layer())
    x = torch.randn(1, 1, 1536).to(torch.bfloat16)
    assert torch.equal(module.linear(linear, x), linear(x)) and not products


def test_hooks_of_all_modules_are_called(module, products):
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, inputs, output: seen.append(module))
    try:
        module.linear(layer(), torch.randn(1, 1536).to(torch.bfloat16))
    finally:
        handle.remove()
    assert len(seen) == 1 and not products


def test_when_it_does_not_serve(module, products):
    linear, x = layer(), torch.randn(1, 1, 1536).to(torch.bfloat16)
    module.linear(linear, x.expand(1, 2, 1536))
    module.linear(layer().float(), x.float())
    module.linear(linear, x.clone().requires_grad_())
    torch.use_deterministic_algorithms(True)
    try:
        module.linear(linear, x)
    finally:
        torch.use_deterministic_algorithms(False)
    assert not products
    module.linear(linear, x)
    assert len(products) == 1


@torch.no_grad()
def test_decoding_takes_it_and_answers_the_same(module, products):
    """Four products in each layer call, and one for the head."""
    model = tiny_model().to(torch.bfloat16)
    ids = torch.randint(12, 96, (1, 9))
    cache = model(ids[:, :-1], use_cache=True).past_key_values
    products.clear()
    step = model(ids[:, -1:], past_key_values=cache).logits[0, -1].double()
    config = model.config
    assert len(products) == 4 * config.num_layers_per_stack * config.H_cycles * (config.L_cycles + 1) + 1
    exact = tiny_model().double()(ids).logits[0, -1]
    plain = model(ids).logits[0, -1].double()
    assert (step - exact).norm() < 1.5 * (plain - exact).norm() + 0.01 * exact.norm()


def test_the_choice_is_measured_once():
    module = sibling(tiny_model(), "kernels_hrm_text")
    threads = torch.get_num_threads()
    first = module.vector_is_faster(64, 64, threads)
    assert isinstance(first, bool) and module.vector_is_faster(64, 64, threads) is first
    assert module.vector_is_faster.cache_info().hits
