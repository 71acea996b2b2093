"""The figures that the training code computed, reproduced from a converted checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from convert_weights import convert


FIXTURE = Path(__file__).parent / "fixtures" / "reference"
EXPECTED = np.load(FIXTURE / "expected.npz")
GRADIENTS = json.loads((FIXTURE / "gradients.json").read_text())


def expected(name: str) -> torch.Tensor:
    values = torch.from_numpy(EXPECTED[name])
    return values.long() if not values.is_floating_point() else values


def packed_row() -> dict[str, torch.Tensor]:
    runs = zip(EXPECTED["prefix_lens"], EXPECTED["causal_lens"])
    types = [kind for prefix, causal in runs for kind in [1] * int(prefix) + [0] * int(causal)]
    return {
        "input_ids": expected("inputs")[None],
        "position_ids": expected("position_ids")[None],
        "token_type_ids": torch.tensor([types]),
    }


@pytest.fixture(scope="module", params=["ema", "raw"])
def weights(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(weights, tmp_path_factory):
    folder = tmp_path_factory.mktemp("reference") / weights
    convert(FIXTURE / "checkpoint", folder, weights=weights)
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()


@pytest.mark.parametrize("implementation", ["sdpa", "eager", "flex_attention"])
@torch.no_grad()
def test_packed_logits(model, weights, implementation):
    model.set_attn_implementation(implementation)
    logits = model(**packed_row()).logits[0]
    model.set_attn_implementation("sdpa")
    torch.testing.assert_close(logits, expected(f"{weights}_packed_logits"), atol=1e-5, rtol=0)


@torch.no_grad()
def test_prefill_and_decode_logits(model, weights):
    prompt = expected("prompt")[None]
    outputs = model(prompt, token_type_ids=torch.ones_like(prompt))
    torch.testing.assert_close(outputs.logits, expected(f"{weights}_prefill_logits"), atol=1e-5, rtol=0)
    tokens, logits = expected(f"{weights}_decode_tokens"), expected(f"{weights}_decode_logits")
    assert outputs.logits[0, -1].argmax() == tokens[0]
    for token, after in zip(tokens, logits):
        outputs = model(token.view(1, 1), past_key_values=outputs.past_key_values)
        torch.testing.assert_close(outputs.logits[0, -1], after, atol=1e-5, rtol=0)


def test_greedy_tokens(model, weights):
    prompt = expected("prompt")[None]
    tokens = expected(f"{weights}_decode_tokens")
    generated = model.generate(
        prompt,
        token_type_ids=torch.ones_like(prompt),
        max_new_tokens=len(tokens),
        do_sample=False,
        eos_token_id=None,
    )
    assert torch.equal(generated[0, prompt.shape[1] :], tokens)


def test_the_prompt_block_matters(model, weights):
    causal = model(**{**packed_row(), "token_type_ids": torch.zeros(1, 38, dtype=torch.long)}).logits[0]
    assert (causal - expected(f"{weights}_packed_logits")).abs().max() > 0.1


def name_in_training(name: str) -> str:
    name = name.replace("model.embed_tokens.weight", "embed_tokens.embedding_weight")
    name = name.replace("H_module.", "H_level.core.").replace("L_module.", "L_level.core.")
    return name.replace("z_L_init", "zL_init")


@pytest.mark.parametrize("weights", ["raw"], indirect=True)
@pytest.mark.parametrize("bp_steps", [2, 3, 4, 5])
def test_loss_and_gradients(model, bp_steps):
    figures = {
        key.split(":", 1)[1]: value for key, value in GRADIENTS.items() if key.startswith(f"gradnorm_bp{bp_steps}:")
    }
    model.set_gradient_steps(bp_steps)
    model.zero_grad(set_to_none=True)
    labels = expected("labels")[None]
    # The labels of the figures are the next tokens already.
    loss = model(**packed_row(), labels=labels, shift_labels=labels, use_cache=False).loss
    loss.backward()
    model.set_gradient_steps(None)
    assert loss.item() == pytest.approx(GRADIENTS[f"loss_bp{bp_steps}"], abs=1e-5)
    compared = 0
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        norm = 0.0 if parameter.grad is None else parameter.grad.double().norm().item()
        figure = figures[name_in_training(name)]
        assert norm == pytest.approx(figure, rel=1e-4) if figure else norm == 0.0, name
        compared += 1
    assert compared == sum(1 for name in figures if "zL_init" not in name)
    if bp_steps == 2:
        assert figures["embed_tokens.embedding_weight"] == 0
