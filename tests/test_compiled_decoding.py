"""Decoding with compiled layers on a processor: the same answers, one function for all, and what is left to others."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from .harness import FORWARD_MODES, GENERATE_MODES, deviation
from .one_answer_models import one_answer_model
from .optimized_models import sibling
from .test_decoding import IDS, decode, whole
from .test_quantized_weights import ONE_STEP
from .tiny import tiny_model


BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 3e-2}


def compiled_model(weights=None, dtype=torch.float32, **options):
    model = tiny_model(**options).to(dtype).optimize_for_inference(compile_layers=True, weights=weights)
    assert model.compiles_decoding and model.is_optimized_for_inference
    return model


@pytest.fixture
def served(monkeypatch):
    """Says of each stack call of one token, and of each of the head, whether a compiled function served it."""
    calls = []

    def watched(real):
        def call(*arguments):
            output = real(*arguments)
            calls.append(output is not None)
            return output

        return call

    for room, name in (("decoding", "compiled_token_through"), ("compiled", "_compiled_product")):
        module = sibling(tiny_model(), f"{room}_hrm_text")
        monkeypatch.setattr(module, name, watched(getattr(module, name)))
    return calls


def is_near(found, wanted, bound=1e-4):
    return bool((found - wanted).norm() <= bound * wanted.norm())


@pytest.mark.parametrize(
    ("weights", "dtype"),
    [
        (None, torch.float32),
        (None, torch.bfloat16),
        ("int8", torch.float32),
        ("int8", torch.bfloat16),
        ("int4", torch.bfloat16),
    ],
)
def test_it_answers_as_a_plain_forward(served, weights, dtype):
    model = compiled_model(weights, dtype)
    assert is_near(decode(model), whole(model), ONE_STEP if weights else BOUNDS[dtype])
    assert len(served) == 3 * (model.config.H_cycles * (model.config.L_cycles + 1) + 1) and all(served)


def test_weights_in_rows_are_the_same_weights():
    model, packed = compiled_model("int8"), tiny_model().optimize_for_inference(weights="int8")
    assert torch.equal(model.state_dict()["lm_head.weight"], packed.state_dict()["lm_head.weight"])
    for rows in (1, 3):
        ids = IDS.expand(rows, -1)
        assert is_near(whole(model, ids), whole(packed, ids), ONE_STEP)
    matrix = model.model.L_module.layers[0].mlp.down_proj.weight._packed
    other = packed.model.L_module.layers[0].mlp.down_proj.weight._packed
    assert torch.equal(matrix.values(), other.values()) and torch.equal(matrix.scale, other.scale)


def test_what_cannot_be_compiled_is_said(monkeypatch, caplog):
    model = tiny_model().optimize_for_inference(compile_layers=True, weights="int4")
    assert not model.compiles_decoding and "weights that only their own operator multiplies" in caplog.text
    assert is_near(decode(model), whole(model), ONE_STEP)
    monkeypatch.setenv("TORCH_COMPILE_DISABLE", "1")
    model = tiny_model().optimize_for_inference(compile_layers=True)
    assert not model.compiles_decoding and "switches `torch.compile` off" in caplog.text
    assert is_near(decode(model), whole(model))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_one_function_serves_every_length(served, mode):
    model, other = compiled_model(), compiled_model(seed=1)
    options = {"max_new_tokens": 90, "do_sample": False, "eos_token_id": None}
    with torch._dynamo.config.patch(error_on_recompile=True), mode():
        tokens = model.generate(IDS, **options)
        again = other.generate(IDS, **options)
    assert all(served) and len(served) > 2 * 89
    assert torch.equal(tokens, tiny_model().generate(IDS, **options))
    assert torch.equal(again, tiny_model(seed=1).generate(IDS, **options))


def test_another_number_of_threads():
    model = compiled_model()
    wanted, threads = decode(model), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert is_near(decode(model), wanted)
    finally:
        torch.set_num_threads(threads)


def hook(model):
    model.model.L_module.layers[0].mlp.down_proj.register_forward_hook(lambda module, inputs, output: 2 * output)


def adapter(model):
    attn = model.model.L_module.layers[0].attn
    attn.o_proj = nn.Sequential(attn.o_proj, nn.Tanh())


@pytest.mark.parametrize("change", [hook, adapter])
@pytest.mark.parametrize("weights", [None, "int8"])
def test_layers_that_do_more_are_called(served, change, weights):
    model = compiled_model(weights)
    before = decode(model)
    served.clear()
    change(model)
    assert is_near(decode(model), whole(model), ONE_STEP if weights else 1e-4)
    assert not is_near(decode(model), before, 2e-3)
    assert any(served) and not all(served), "the other stack and the head alone are served"
    reason = "an adapter, a hook"
    assert reason in sibling(model, "compiled_hrm_text").compile_model(model, [model.model.L_module], None)


def test_new_weights_are_seen():
    model = compiled_model()
    other = tiny_model(seed=3)
    model.load_state_dict(other.state_dict())
    assert is_near(decode(model), decode(other))
    model.lm_head.weight = nn.Parameter(2 * model.lm_head.weight.detach())
    assert is_near(decode(model), 2 * decode(other))


def test_rows_masks_and_short_caches_are_left_to_the_layers(served):
    model = compiled_model()
    ids = torch.cat((IDS, IDS.flip(1)))
    assert is_near(decode(model, ids), whole(model, ids))
    assert not any(served)
    with torch.no_grad():
        cache = model(IDS[:, :1], token_type_ids=torch.zeros_like(IDS[:, :1]), use_cache=True).past_key_values
        steps = [model(IDS[:, i : i + 1], past_key_values=cache, use_cache=True).logits for i in range(1, 8)]
        wanted = model(IDS, token_type_ids=torch.zeros_like(IDS), use_cache=False).logits[:, 1:]
    assert is_near(torch.cat(steps, dim=1), wanted)


def test_with_gradient_autocast_and_switched_off(served):
    model = compiled_model()
    wanted = decode(model)
    served.clear()
    with type(model).use_fast_kernels(False):
        assert is_near(decode(model), wanted)
    assert not served
    with torch.autocast("cpu", torch.bfloat16):
        assert is_near(decode(model), wanted, 5e-2)
    assert not any(served)
    cache = model(IDS[:, :5], token_type_ids=torch.ones_like(IDS[:, :5]), use_cache=True).past_key_values
    model(IDS[:, 5:6], past_key_values=cache, use_cache=True).logits.sum().backward()
    assert all(parameter.grad is not None for parameter in model.model.L_module.parameters())


def test_a_compiler_that_is_missing(monkeypatch, caplog):
    room = sibling(tiny_model(), "compiled_hrm_text")

    def missing(formulas, **options):
        def call(*arguments):
            raise RuntimeError("No working C++ compiler found")

        return call

    room._function.cache_clear()
    monkeypatch.setattr(torch, "compile", missing)
    try:
        model = tiny_model().to(torch.bfloat16).optimize_for_inference(compile_layers=True, weights="int8")
    finally:
        room._function.cache_clear()
    assert not model.compiles_decoding
    assert "needs a C++ compiler" in caplog.text and "No working C++ compiler found" in caplog.text
    matrix = model.lm_head.weight._packed
    assert not matrix.in_rows and is_near(decode(model), whole(model), ONE_STEP)


def test_a_compiler_that_computes_something_else(monkeypatch, caplog):
    room = sibling(tiny_model(), "compiled_hrm_text")
    room._function.cache_clear()
    monkeypatch.setattr(torch, "compile", lambda formulas, **options: lambda *arguments: 1.01 * formulas(*arguments))
    try:
        model = tiny_model().optimize_for_inference(compile_layers=True)
    finally:
        room._function.cache_clear()
    assert not model.compiles_decoding and "computes something else" in caplog.text


def test_a_compiler_that_fails_later(monkeypatch, served, caplog):
    model = compiled_model()
    wanted = decode(model)
    room = sibling(model, "compiled_hrm_text")
    step, _ = room._step_of(model.model.H_module.layers[1], torch.float32)
    calls = []

    def fail(*arguments):
        calls.append(arguments)
        raise RuntimeError("out of space")

    served.clear()
    with monkeypatch.context() as patch:
        patch.setattr(step, "_compiled", fail)
        assert is_near(decode(model), wanted)
        assert len(calls) == 1 and "out of space" in caplog.text and step.has_failed
        assert sum(served) == 3, "the head alone"
        assert not tiny_model().optimize_for_inference(compile_layers=True).compiles_decoding, "nothing is tried again"
    step.has_failed = False
    assert is_near(decode(model), wanted)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("weights", [None, "int8"])
def test_copies(copied, weights):
    model = compiled_model(weights)
    twin = copied(model)
    assert twin.compiles_decoding and is_near(decode(twin), decode(model))


@pytest.mark.parametrize("weights", [None, "int8"])
def test_undone(served, weights):
    model = compiled_model(weights)
    model.undo_inference_optimization()
    assert not model.compiles_decoding and not model.is_optimized_for_inference
    served.clear()
    assert torch.allclose(decode(model), decode(tiny_model()), atol=1e-5) and not served
    model.optimize_for_inference(compile_layers=True)
    assert model.compiles_decoding and not model.train().compiles_decoding


def test_saved_and_moved(tmp_path, served):
    model = compiled_model("int8")
    model.save_pretrained(tmp_path)
    reloaded = type(model).from_pretrained(tmp_path)
    assert all(torch.equal(value, reloaded.state_dict()[name]) for name, value in tiny_model().state_dict().items())
    model.to(torch.bfloat16)
    assert is_near(decode(model), whole(model), ONE_STEP) and all(served)


# ---- the one rule ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [None, "int8"])
@pytest.mark.parametrize("mode", [*FORWARD_MODES, *GENERATE_MODES])
def test_one_answer(weights, mode):
    model = one_answer_model().optimize_for_inference(compile_layers=True, weights=weights)
    answers = {**FORWARD_MODES, **GENERATE_MODES}[mode](model)
    assert model.compiles_decoding and deviation(model, answers) < (ONE_STEP if weights else 1e-4)
