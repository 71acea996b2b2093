"""Prompts that an adapter of peft prepends, as embeddings or as keys, belong to the prompt's block."""

from __future__ import annotations

import pytest
import torch
from transformers.utils import logging

from .facts import END, GREEDY, facts_model


peft = pytest.importorskip("peft")
ANSWERED = torch.tensor([[6, 30, 31, END, 40, 41, 42, 11]])
VIRTUAL = 4
CONFIGS = {
    "prompt tuning": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=VIRTUAL),
    "p-tuning": lambda: peft.PromptEncoderConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=VIRTUAL, encoder_hidden_size=16
    ),
    "prefix tuning": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=VIRTUAL),
}
TYPES = torch.tensor([[1, 1, 1, 1, 0, 0, 0, 0]])


@pytest.fixture
def log(caplog):
    logging.warning_once.cache_clear()
    return caplog


def is_said(log) -> bool:
    return any("token_type_ids" in record.getMessage() for record in log.records if record.levelname == "WARNING")


def adapted(kind: str):
    torch.manual_seed(3)
    tuned = peft.get_peft_model(facts_model(), CONFIGS[kind]())
    with torch.no_grad():
        for parameter in tuned.prompt_encoder.parameters():
            parameter.normal_(std=0.3)
    return tuned.eval()


def right_logits(tuned, kind: str, ids: torch.Tensor, types: torch.Tensor) -> torch.Tensor:
    """One plain forward: virtual embeddings in front, of the prompt's block; or virtual keys, which are the past."""
    base = tuned.get_base_model()
    with torch.no_grad():
        if kind == "prefix tuning":
            past = tuned.get_prompt(batch_size=ids.shape[0])
            count = ids.shape[1]
            allowed = torch.ones(count, count, dtype=torch.bool).tril()
            inside = types[0] == 1
            allowed |= inside[:, None] & inside[None]
            mask = torch.cat([torch.ones(count, VIRTUAL, dtype=torch.bool), allowed], dim=1)[None, None]
            positions = torch.arange(VIRTUAL, VIRTUAL + count)[None]
            return base(ids, attention_mask=mask, position_ids=positions, past_key_values=past).logits
        prompts = tuned.get_prompt(batch_size=ids.shape[0])
        embeds = torch.cat([prompts, base.get_input_embeddings()(ids)], dim=1)
        types = torch.nn.functional.pad(types, (VIRTUAL, 0), value=1)
        return base(inputs_embeds=embeds, token_type_ids=types, use_cache=False).logits[:, VIRTUAL:]


@pytest.mark.parametrize("types", [True, False], ids=["types", "inferred"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_adapted_forward(kind, types, log):
    """peft drops `token_type_ids` on the way: the answer is right all the same, or the loss of them is said."""
    tuned = adapted(kind)
    wanted = right_logits(tuned, kind, ANSWERED, TYPES)
    log.clear()
    logging.warning_once.cache_clear()
    more = {"token_type_ids": TYPES} if types else {}
    with torch.no_grad():
        logits = tuned(ANSWERED, attention_mask=torch.ones_like(ANSWERED), **more).logits[:, -8:]
    assert (logits - wanted).abs().max() < 1e-4 or is_said(log)


@pytest.mark.parametrize("kind", CONFIGS)
def test_adapted_training(kind, log):
    tuned = adapted(kind).train()
    labels = ANSWERED.masked_fill(TYPES == 1, -100)
    wanted = torch.nn.functional.cross_entropy(right_logits(tuned, kind, ANSWERED, TYPES)[0, 3:-1], ANSWERED[0, 4:])
    log.clear()
    logging.warning_once.cache_clear()
    loss = tuned(ANSWERED, attention_mask=torch.ones_like(ANSWERED), token_type_ids=TYPES, labels=labels).loss
    assert (loss.detach() - wanted).abs() < 1e-4 or is_said(log)
    loss.backward()
    trained = [parameter for parameter in tuned.parameters() if parameter.requires_grad]
    assert trained and any(p.grad is not None and p.grad.abs().max() > 0 for p in trained)


@pytest.mark.parametrize("kind", ("prompt tuning", "p-tuning"))
def test_training_on_embeddings_with_types(kind):
    """A trainer that prepends the prompt itself and keeps the types: right, with a gradient to the prompt."""
    tuned = adapted(kind).train()
    base = tuned.get_base_model()
    prompts = tuned.get_prompt(batch_size=1)
    embeds = torch.cat([prompts, base.get_input_embeddings()(ANSWERED)], dim=1)
    types = torch.nn.functional.pad(TYPES, (VIRTUAL, 0), value=1)
    labels = torch.nn.functional.pad(ANSWERED.masked_fill(TYPES == 1, -100), (VIRTUAL, 0), value=-100)
    base.set_gradient_steps(4)
    loss = base(inputs_embeds=embeds, token_type_ids=types, labels=labels, use_cache=False).loss
    wanted = right_logits(tuned, kind, ANSWERED, TYPES)[0, 3:-1]
    torch.testing.assert_close(
        loss.detach(), torch.nn.functional.cross_entropy(wanted, ANSWERED[0, 4:]), atol=1e-4, rtol=1e-4
    )
    loss.backward()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in tuned.prompt_encoder.parameters())


@pytest.mark.parametrize("types", [True, False], ids=["types", "inferred"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_adapted_generate(kind, types):
    tuned = adapted(kind)
    prompt = ANSWERED[:, :4]
    more = {"token_type_ids": torch.ones_like(prompt)} if types else {}
    output = tuned.generate(
        input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=3, **GREEDY, **more
    )
    answer = output.sequences[:, -3:]
    whole = torch.cat([prompt, answer], dim=1)
    layout = torch.nn.functional.pad(torch.ones_like(prompt), (0, 3))
    wanted = right_logits(tuned, kind, whole, layout)[:, 3:-1]
    torch.testing.assert_close(torch.stack(output.logits, dim=1), wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", CONFIGS)
def test_packed_rows_and_virtual_tokens_are_refused(kind):
    """Only the first sequence of a row would see the virtual tokens, without a word."""
    tuned = adapted(kind)
    packed, positions = ANSWERED.repeat(1, 2), torch.arange(8).repeat(1, 2)
    offsets = torch.tensor([0, 8, 16])
    with pytest.raises(ValueError, match=r"virtual tokens.*`packing` and `padding_free`"):
        tuned(packed, position_ids=positions, cu_seq_lens_q=offsets, cu_seq_lens_k=offsets)
    one = torch.tensor([0, 8])
    alone = tuned(ANSWERED, attention_mask=torch.ones_like(ANSWERED)).logits
    torch.testing.assert_close(tuned(ANSWERED, position_ids=positions[:, :8], cu_seq_lens_q=one).logits, alone)


def test_a_sequence_of_its_own_behind_unseen_keys_is_read():
    """It begins at position 0, so it does not count on what is there."""
    tuned = adapted("prefix tuning")
    base, past = tuned.get_base_model(), tuned.get_prompt(batch_size=1)
    with torch.no_grad():
        logits = base(ANSWERED, position_ids=torch.arange(8)[None], past_key_values=past).logits
        torch.testing.assert_close(logits, base(ANSWERED).logits, atol=1e-4, rtol=1e-4)
