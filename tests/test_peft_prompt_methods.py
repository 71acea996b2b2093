"""peft's other methods: virtual tokens before a prompt lie in its block, or a sentence refuses."""

from __future__ import annotations

import pytest
import torch

from .tiny import tiny_model


peft = pytest.importorskip("peft")

VIRTUAL = 4
PROMPT, ANSWER = [6, 8, 20, 21, 22, 7], [30, 31, 11]
IDS = torch.tensor([PROMPT + ANSWER])
LABELS = torch.tensor([[-100] * len(PROMPT) + ANSWER])
PROMPT_METHODS = {
    "prompt tuning": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=VIRTUAL),
    "p-tuning": lambda: peft.PromptEncoderConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=VIRTUAL, encoder_hidden_size=16
    ),
    "prefix tuning": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=VIRTUAL),
}
LAYERS = ["gqkv_proj", "o_proj", "gate_up_proj", "down_proj"]
LAYER_METHODS = {
    "ia3": lambda: peft.IA3Config(task_type="CAUSAL_LM", target_modules=LAYERS, feedforward_modules=["down_proj"]),
    "vera": lambda: peft.VeraConfig(task_type="CAUSAL_LM", target_modules=["o_proj"], r=4),
    "dora": lambda: peft.LoraConfig(task_type="CAUSAL_LM", target_modules=LAYERS, r=4, use_dora=True),
}


def adapted(config):
    torch.manual_seed(1)
    return peft.get_peft_model(tiny_model(prefix_end_token_id=7), config)


def is_refusal(error: ValueError) -> bool:
    """Whether an error is a sentence of ours: it names what was met and says what to do instead."""
    return "virtual" in str(error) or ("peft" in str(error).lower() and len(str(error)) > 60)


def embedded(model, ids):
    """The virtual tokens and a prompt as embeddings of a plain call, and their types, for the methods that embed."""
    embeddings = model.get_base_model().get_input_embeddings()(ids)
    inputs = torch.cat([model.get_prompt(batch_size=ids.shape[0]).to(embeddings), embeddings], dim=1)
    inside = [1] * (VIRTUAL + len(PROMPT)) + [0] * (ids.shape[1] - len(PROMPT))
    return inputs, torch.tensor([inside] * ids.shape[0])


@pytest.mark.parametrize("method", ["prompt tuning", "p-tuning"])
def test_virtual_tokens_lie_in_the_block(method):
    model = adapted(PROMPT_METHODS[method]()).train()
    try:
        output = model(input_ids=IDS, attention_mask=torch.ones_like(IDS), labels=LABELS)
    except ValueError as error:
        assert is_refusal(error), error
        return
    inputs, types = embedded(model, IDS)
    labels = torch.cat([torch.full((1, VIRTUAL), -100), LABELS], dim=1)
    plain = model.get_base_model()(inputs_embeds=inputs, token_type_ids=types, labels=labels)
    torch.testing.assert_close(output.logits, plain.logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(output.loss, plain.loss, atol=1e-4, rtol=1e-4)
    output.loss.backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.prompt_encoder.parameters())


def test_prefix_tuning_answers_as_its_cache_says_or_refuses():
    """Its virtual keys precede the prompt, whose tokens must still see one another."""
    model = adapted(PROMPT_METHODS["prefix tuning"]())
    last = torch.tensor([[*PROMPT[:2], 40, *PROMPT[3:], *ANSWER]])
    mask = torch.ones_like(IDS)
    try:
        with torch.no_grad():
            first, second = (model(input_ids=ids, attention_mask=mask).logits for ids in (IDS, last))
    except ValueError as error:
        assert is_refusal(error), error
        return
    # A change of the third token reaches the second position only inside a block.
    assert not torch.allclose(first[0, 1], second[0, 1], atol=1e-4)


@pytest.mark.parametrize("method", PROMPT_METHODS)
def test_generate_save_and_load(method, tmp_path):
    model = adapted(PROMPT_METHODS[method]()).eval()
    prompt = torch.tensor([PROMPT, PROMPT])
    try:
        written = model.generate(
            input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=4, do_sample=False
        )
    except ValueError as error:
        assert is_refusal(error), error
        return
    if method != "prefix tuning":
        inputs, types = embedded(model, prompt)
        plain = model.get_base_model().generate(
            inputs_embeds=inputs, token_type_ids=types, max_new_tokens=4, do_sample=False
        )
        assert torch.equal(written[:, -plain.shape[1] :], plain)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(tiny_model(prefix_end_token_id=7), tmp_path).eval()
    repeated = again.generate(
        input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=4, do_sample=False
    )
    assert torch.equal(repeated, written)


@pytest.mark.parametrize("method", LAYER_METHODS)
def test_methods_on_layers_read_blocks_as_the_model_does(method, tmp_path):
    model = adapted(LAYER_METHODS[method]()).train()
    output = model(input_ids=IDS, labels=LABELS)
    plain = model(input_ids=IDS, token_type_ids=(LABELS == -100).long(), labels=LABELS)
    torch.testing.assert_close(output.logits, plain.logits, atol=1e-5, rtol=1e-5)
    output.loss.backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert trained and all(p.requires_grad for name, p in model.named_parameters() if name in trained)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    optimizer.step()
    model.save_pretrained(tmp_path)
    model.eval()
    again = peft.PeftModel.from_pretrained(tiny_model(prefix_end_token_id=7), tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(input_ids=IDS).logits, model(input_ids=IDS).logits, atol=1e-5, rtol=1e-5)
    prompt = torch.tensor([PROMPT])
    assert again.generate(input_ids=prompt, max_new_tokens=3, do_sample=False).shape[1] <= len(PROMPT) + 3
