"""Fused operations beside the plain formulas: values, derivatives of every kind, and the switch."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

from .optimized_models import pack_all, packed_layers, sibling
from .tiny import ROOT, load_class, tiny_model


norm, swiglu = load_class("modeling_hrm_text.norm"), load_class("modeling_hrm_text.swiglu")
split_and_rotate = load_class("modeling_hrm_text.split_and_rotate")
rotate, rotary_tables = load_class("modeling_hrm_text.rotate"), load_class("modeling_hrm_text.rotary_tables")
gated = load_class("attention_hrm_text.gated")
serves, use_kernels = load_class("kernels_hrm_text.serves"), load_class("kernels_hrm_text.use_kernels")
IDS = torch.tensor([[6, 20, 31, 42, 7], [6, 9, 55, 60, 7]])

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1, 48), (1, 7, 48), (3, 1, 48), (2, 5, 48)]


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def both(function, *inputs: torch.Tensor) -> list[torch.Tensor]:
    """What a function gives plainly, fused with gradients and fused without; the inputs have to be as they were."""
    before = [tensor.clone() for tensor in inputs]
    with torch.no_grad(), use_kernels(False):
        plain = function(*inputs)
    recorded = function(*(tensor.clone().requires_grad_() for tensor in inputs)).detach()
    with torch.no_grad():
        fused = function(*inputs)
    for tensor, old in zip(inputs, before):
        assert torch.equal(tensor, old)
    for got in (plain, recorded, fused):
        assert got.dtype == inputs[0].dtype and got.shape == plain.shape
    return [plain, recorded, fused]


def close(dtype: torch.dtype) -> dict[str, float]:
    if dtype is torch.float32:
        return {"atol": 1e-6, "rtol": 1e-5}
    return {"atol": 1e-3, "rtol": 2 * torch.finfo(dtype).eps}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_norm(shape, dtype):
    x = 3 * draw(*shape, dtype=dtype)
    found = both(lambda x: norm(x, 1e-6), x)
    wide = x.double()
    exact = wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    for got in found:
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
    tables = rotary_tables(*(torch.cat((half, half), dim=-1) for half in (angles.cos(), angles.sin())))
    found = both(lambda whole: torch.stack(split_and_rotate(whole, tables)[1:3], dim=2).transpose(1, 3), whole)
    pairs = torch.complex(*whole[:, :, 1:3].double().chunk(2, dim=-1))
    turned = pairs * torch.polar(torch.ones_like(angles, dtype=torch.float64), angles.double())[:, :, None, None]
    exact = torch.cat((turned.real, turned.imag), dim=-1)
    for got in found:
        torch.testing.assert_close(got.double(), exact, **close(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_swiglu_and_gate(dtype):
    gate_up = draw(2, 5, 96, dtype=dtype)
    found = both(swiglu, gate_up)
    gate, up = gate_up.double().chunk(2, dim=-1)
    for got in found:
        torch.testing.assert_close(got.double(), F.silu(gate) * up, **close(dtype))
    output, gate = draw(2, 5, 4, 8, dtype=dtype), draw(2, 5, 4, 8, dtype=dtype, seed=1)
    found = both(gated, output, gate)
    for got in found:
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
    fused = load_class("kernels_hrm_text.fused_swiglu")
    x = draw(2, 3, 8).double().requires_grad_()
    assert torch.autograd.gradcheck(fused, x)
    assert torch.autograd.gradgradcheck(fused, x)


@pytest.mark.parametrize("tokens", [1, 6])
def test_derivatives_of_split_and_rotate(tokens):
    """The function of its own gives what autograd makes of the plain steps, and is differentiable again."""
    angles = draw(2, tokens, 4, seed=1)
    tables = rotary_tables(*(torch.cat((half, half), dim=-1) for half in (angles.cos(), angles.sin())))
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


# ---- every way to differentiate, batch and trace a model ------------------------------------------------------------


def loss_of(model, parameters=None):
    call = {"token_type_ids": torch.ones_like(IDS), "labels": IDS}
    if parameters is None:
        return model(IDS, **call).loss
    return torch.func.functional_call(model, parameters, (IDS,), call).loss


def gradients_of(model) -> dict[str, torch.Tensor]:
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    return dict(zip(trained, torch.autograd.grad(loss_of(model), list(trained.values()))))


def test_a_model_computes_the_same_with_kernels_and_without():
    model = tiny_model()
    with use_kernels(False):
        plain, of_plain = loss_of(model), gradients_of(model)
    torch.testing.assert_close(loss_of(model), plain, atol=1e-6, rtol=1e-6)
    for name, gradient in gradients_of(model).items():
        torch.testing.assert_close(gradient, of_plain[name], atol=1e-6, rtol=1e-4)


def step_of(model, ids: torch.Tensor, **call: torch.Tensor) -> torch.Tensor:
    """The logits of one more token in each row."""
    cache = model(ids, use_cache=True, **call).past_key_values
    return model(ids[:, 1:2], past_key_values=cache).logits


PADDING = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
MODEL_CALLS = {
    "one row": lambda model: model(IDS[:1]).logits,
    "one token": lambda model: model(IDS[:1, :1]).logits,
    "padded": lambda model: model(IDS, attention_mask=PADDING).logits[PADDING.bool()],
    "packed": lambda model: model(IDS, position_ids=torch.tensor([[0, 1, 2, 0, 1]])).logits,
    "a block and the rest": lambda model: model(IDS, token_type_ids=torch.tensor([[1, 1, 1, 0, 0]] * 2)).logits,
    "a step of one row": lambda model: step_of(model, IDS[:1]),
    "a step of two rows": lambda model: step_of(model, IDS),
    "states": lambda model: torch.stack(model(IDS, output_hidden_states=True).hidden_states),
    "generated tokens": lambda model: model.generate(IDS, max_new_tokens=8, do_sample=False),
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", MODEL_CALLS)
def test_calls_of_a_model_with_kernels_and_without(name, implementation, packed):
    model = tiny_model(prefix_end_token_id=7, attn_implementation=implementation)
    model = pack_all(model) if packed else model
    with torch.no_grad():
        with use_kernels(False):
            plain = MODEL_CALLS[name](model)
        with use_kernels(True):
            fast = MODEL_CALLS[name](model)
    torch.testing.assert_close(fast, plain, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("packed", [False, True])
def test_functional_gradients(packed):
    """`torch.func.grad` over `functional_call`, of parameters taken from the model as it is."""
    model = tiny_model()
    wanted = gradients_of(model)
    if packed:
        pack_all(model)
    parameters = {name: value.detach() for name, value in model.named_parameters() if value.requires_grad}
    got = torch.func.grad(lambda parameters: loss_of(model, parameters))(parameters)
    for name, gradient in wanted.items():
        torch.testing.assert_close(got[name], gradient, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("packed", [False, True])
def test_transforms_of_the_inputs(packed):
    """Reverse and forward mode of a model give the gradient of a plain backward pass through all module calls."""
    model = tiny_model(attn_implementation="eager").requires_grad_(False)
    model.set_gradient_steps(model.config.H_cycles * (model.config.L_cycles + 1))
    embeds = model.get_input_embeddings()(IDS)
    types, direction = torch.ones_like(IDS), draw(*embeds.shape, seed=3)

    def output(embeds: torch.Tensor) -> torch.Tensor:
        return model(inputs_embeds=embeds, token_type_ids=types, use_cache=False).logits.float().sin().sum()

    plain = embeds.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(output(plain), plain)
    slope = (gradient * direction).sum()
    if packed:
        pack_all(model)
    torch.testing.assert_close(torch.func.grad(output)(embeds), gradient, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(torch.func.jvp(output, (embeds,), (direction,))[1], slope, atol=1e-3, rtol=1e-3)
    with forward_ad.dual_level():
        dual = output(forward_ad.make_dual(embeds, direction))
        torch.testing.assert_close(forward_ad.unpack_dual(dual).tangent, slope, atol=1e-3, rtol=1e-3)
    if packed:
        assert not packed_layers(model), "a transform sees the plain weights"


def test_vmap_over_an_operation():
    rows = draw(4, 3, 16)
    torch.testing.assert_close(torch.vmap(lambda row: norm(row, 1e-6))(rows), norm(rows, 1e-6))
    torch.testing.assert_close(torch.vmap(swiglu)(rows), swiglu(rows))


def test_batched_gradients():
    """`is_grads_batched` runs the backward of a recorded graph under an older kind of vmap."""
    found = []
    for enabled in (False, True):
        with use_kernels(enabled):
            x = draw(2, 3, 4, 2, 8).requires_grad_()
            tables = rotary_tables(
                *(torch.cat((half, half), dim=-1) for half in (draw(1, 3, 4).cos(), draw(1, 3, 4).sin()))
            )
            gate, query, key, value = split_and_rotate(x, tables)
            merged = torch.cat((gate.transpose(1, 2), query, key, value), dim=-1)
            output = swiglu(norm(merged, 1e-6))
            eye = draw(5, *output.shape, seed=2)
            found.append(torch.autograd.grad(output, x, eye, is_grads_batched=True)[0])
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-4)


def test_tracing_sees_plain_operations():
    graph = make_fx(lambda x: swiglu(norm(x, 1e-6)))(draw(2, 3, 8))
    for seed in (0, 1):
        x = 3 * draw(2, 3, 8, seed=seed)
        torch.testing.assert_close(graph(x), swiglu(norm(x, 1e-6)))


# ---- the switch -----------------------------------------------------------------------------------------------------


def test_what_is_served():
    x = draw(2, 3)
    assert serves(x) and serves(x.bfloat16()) and serves(x.clone().requires_grad_())
    assert not serves(x.double()) and not serves(x.to("meta")) and not serves(nn.Parameter(x))
    seen = []
    torch.vmap(lambda row: seen.append(serves(row)) or row)(x)
    torch.func.grad(lambda x: seen.append(serves(x)) or x.sum())(x)
    torch.jit.trace(lambda x: seen.append(serves(x)) or x + 1, (x,), check_trace=False)
    with forward_ad.dual_level():
        seen.append(serves(x))
    assert seen and not any(seen)


def test_the_switch_as_a_call_and_as_a_block():
    x = draw(2, 3)
    with use_kernels(False):
        assert not serves(x)
        with use_kernels(True):
            assert serves(x)
        assert not serves(x)
    assert serves(x)
    use_kernels(False)
    assert not serves(x)
    use_kernels(True)
    assert serves(x)
    model = tiny_model()
    with pytest.raises(RuntimeError, match="inside"), model.use_fast_kernels(False):
        assert not serves(x)
        raise RuntimeError("inside")
    assert serves(x)


def test_the_environment_switches_it_off():
    code = "import torch, kernels_hrm_text as k; print(k.serves(torch.zeros(2)))"
    for value, served in (("0", "False"), ("1", "True")):
        environment = {**os.environ, "HRM_TEXT_KERNELS": value}
        run = [sys.executable, "-c", code]
        done = subprocess.run(run, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=True)
        assert done.stdout.strip() == served


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def test_deterministic_mode_measures_nothing(deterministic, monkeypatch):
    module = sibling(tiny_model(), "kernels_hrm_text")
    monkeypatch.setattr(module, "least_seconds", lambda *arguments, **more: pytest.fail("a timing decides"))
    packed = sibling(tiny_model(), "packed_hrm_text")
    for room, name in ((module, "vector_is_faster"), (module, "fastest_attention"), (packed, "packing_pays")):
        monkeypatch.setattr(room, name, lambda *arguments: pytest.fail("a measured choice is made"))
    monkeypatch.setattr(module, "_LEAST_ELEMENTS", 1)
    monkeypatch.setattr(module, "_LEAST_KEYS", 1)
    model = tiny_model().to(torch.bfloat16)
    assert not serves(draw(2, 3))
    model.optimize_for_inference()
    assert not model.is_optimized_for_inference
    model.generate(IDS, token_type_ids=torch.ones_like(IDS), max_new_tokens=3)


def test_switched_off_a_packed_model_multiplies_plainly():
    model = tiny_model().to(torch.bfloat16)
    with torch.no_grad(), use_kernels(False):
        wanted = model(IDS).logits
        pack_all(model)
        assert torch.equal(model(IDS).logits, wanted)
    assert len(packed_layers(model)) == 17
