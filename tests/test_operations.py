"""The elementwise operations: their fast forms beside the ones that autograd takes, and their derivatives."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from .tiny import load_class


norm = load_class("operations_hrm_text.norm")
rotate, rotary_tables = load_class("operations_hrm_text.rotate"), load_class("operations_hrm_text.rotary_tables")
split_and_rotate = load_class("operations_hrm_text.split_and_rotate")
swiglu, gated = load_class("operations_hrm_text.swiglu"), load_class("operations_hrm_text.gated")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1, 48), (1, 7, 48), (3, 1, 48), (2, 5, 48)]


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def both(function, *inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What a function gives with gradients and without; the inputs have to be as they were."""
    before = [tensor.clone() for tensor in inputs]
    with torch.enable_grad():
        slow = function(*(tensor.clone().requires_grad_() for tensor in inputs)).detach()
    with torch.no_grad():
        fast = function(*inputs)
    for tensor, old in zip(inputs, before):
        assert torch.equal(tensor, old)
    assert slow.dtype == fast.dtype == inputs[0].dtype and slow.shape == fast.shape
    return slow, fast


def close(dtype: torch.dtype) -> dict[str, float]:
    if dtype is torch.float32:
        return {"atol": 1e-6, "rtol": 1e-5}
    return {"atol": 1e-3, "rtol": 2 * torch.finfo(dtype).eps}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_norm(shape, dtype):
    x = 3 * draw(*shape, dtype=dtype)
    slow, fast = both(lambda x: norm(x, 1e-6), x)
    wide = x.double()
    exact = wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    for got in (slow, fast):
        torch.testing.assert_close(got.double(), exact, **close(dtype))


@pytest.mark.parametrize("eps", [0.0, 1e-6, 0.1])
@pytest.mark.parametrize("tokens", [1, 3])
def test_norm_of_nothing(tokens, eps):
    x = torch.zeros(1, tokens, 16)
    with torch.no_grad():
        torch.testing.assert_close(norm(x, eps), F.rms_norm(x, (16,), eps=eps), equal_nan=True)


def test_norm_of_double_keeps_its_precision():
    x = draw(1, 1, 32).double()
    with torch.no_grad():
        got = norm(x, 1e-6)
    torch.testing.assert_close(got, x / (x.square().mean() + 1e-6).sqrt(), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch, tokens", [(1, 1), (1, 6), (3, 1), (2, 6)])
def test_rotate(batch, tokens, dtype):
    """A pair (i, i + half) is a complex number that is turned by the angle of its position and frequency."""
    whole = draw(batch, tokens, 4, 3, 16, dtype=dtype)
    angles = draw(batch, tokens, 8, seed=1)
    tables = rotary_tables(angles.cos(), angles.sin())
    slow, fast = both(lambda whole: rotate(whole[:, :, 1:3], tables), whole)
    pairs = torch.complex(*whole[:, :, 1:3].double().chunk(2, dim=-1))
    turned = pairs * torch.polar(torch.ones_like(angles, dtype=torch.float64), angles.double())[:, :, None, None]
    exact = torch.cat((turned.real, turned.imag), dim=-1)
    for got in (slow, fast):
        torch.testing.assert_close(got.double(), exact, **close(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_swiglu_and_gate(dtype):
    gate_up = draw(2, 5, 96, dtype=dtype)
    slow, fast = both(swiglu, gate_up)
    gate, up = gate_up.double().chunk(2, dim=-1)
    for got in (slow, fast):
        torch.testing.assert_close(got.double(), F.silu(gate) * up, **close(dtype))
    output, gate = draw(2, 5, 4, 8, dtype=dtype), draw(2, 5, 4, 8, dtype=dtype, seed=1)
    slow, fast = both(gated, output, gate)
    for got in (slow, fast):
        torch.testing.assert_close(got.double(), output.double() * gate.double().sigmoid(), **close(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_gradient_of_norm(shape, dtype):
    """The function of its own is as near to the exact gradient as autograd is, and differentiable again."""
    x, weight = (3 * draw(*shape, seed=seed).to(dtype) for seed in (0, 1))
    exact, plain, ours = (x.to(kind).clone().requires_grad_() for kind in (torch.float64, dtype, dtype))
    F.rms_norm(exact, shape[-1:], eps=1e-6).backward(weight.double())
    F.rms_norm(plain, shape[-1:], eps=1e-6).backward(weight)
    output = norm(ours, 1e-6)
    assert output.grad_fn.name() == "_NormBackward"
    output.backward(weight)
    assert ours.grad.dtype is dtype
    plain_error, our_error = ((y.grad.double() - exact.grad).norm() for y in (plain, ours))
    assert our_error <= 1.5 * plain_error + 1e-6 * exact.grad.norm()
    with torch.no_grad():
        torch.testing.assert_close(output, norm(x, 1e-6), **close(dtype))


def test_second_derivative_of_norm():
    found = []
    for function in (lambda x: norm(x, 1e-6), lambda x: F.rms_norm(x, (16,), eps=1e-6)):
        x = draw(2, 3, 16).requires_grad_()
        (first,) = torch.autograd.grad(function(x).sin().sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), x)
        found.append((first, second))
    for got, wanted in zip(*found):
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


def test_derivatives_of_swiglu():
    x = draw(2, 3, 8).double().requires_grad_()
    assert torch.autograd.gradcheck(swiglu, x)
    assert torch.autograd.gradgradcheck(swiglu, x)
    plain = draw(2, 3, 8).double().requires_grad_()
    gate, up = plain.chunk(2, dim=-1)
    (F.silu(gate) * up).square().sum().backward()
    swiglu(x).square().sum().backward()
    torch.testing.assert_close(x.grad, plain.grad)


@pytest.mark.parametrize("tokens", [1, 6])
def test_derivatives_of_split_and_rotate(tokens):
    """The function of its own gives what autograd makes of the plain steps, and is differentiable again."""
    angles = draw(2, tokens, 4, seed=1)
    tables = rotary_tables(angles.cos(), angles.sin())
    weights = [draw(2, tokens, 3, 8, seed=2), *(draw(2, 3, tokens, 8, seed=3 + i) for i in range(3))]

    def plain(whole):
        query, key = (rotate(whole[:, :, i : i + 1], tables).squeeze(2).transpose(1, 2) for i in (1, 2))
        return whole[:, :, 0], query, key, whole[:, :, 3].transpose(1, 2)

    def scalar(parts):
        return sum((weight * part.sin()).sum() for weight, part in zip(weights, parts))

    found = []
    for function in (plain, lambda whole: split_and_rotate(whole, tables)):
        whole = draw(2, tokens, 4, 3, 8).requires_grad_()
        parts = function(whole)
        (first,) = torch.autograd.grad(scalar(parts), whole, retain_graph=True)
        (again,) = torch.autograd.grad(scalar(parts), whole, create_graph=True)
        (second,) = torch.autograd.grad(again.square().sum(), whole)
        found.append([*parts, first, again, second])
    for wanted, got in zip(*found):
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        for wanted, got in zip(found[0], split_and_rotate(draw(2, tokens, 4, 3, 8), tables)):
            torch.testing.assert_close(got, wanted, atol=1e-6, rtol=1e-5)
