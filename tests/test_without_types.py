"""Calls that lose the layout are told so, once, and with the remedy."""

from __future__ import annotations

import pytest
import torch

from .facts import END, facts_model


BLOCK = torch.tensor([[6, 30, 31, 32, END]])
BARE = torch.tensor([[30, 31, 32]])
ANSWERED = torch.tensor([[6, 30, 31, END, 40, 41, 42, 11]])


@pytest.fixture
def log(caplog):
    return caplog


@pytest.fixture(scope="module")
def model():
    return facts_model()


def warnings_of(log) -> list[str]:
    """What the model said; that the library renames arguments is not of interest here."""
    said = [record.getMessage() for record in log.records if record.levelname == "WARNING"]
    return [text for text in said if "deprecated" not in text]


def embeds_of(model, ids: torch.Tensor) -> torch.Tensor:
    return model.get_input_embeddings()(ids).detach()


# ---- warnings -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_embeddings_without_types(model, log):
    for _ in range(2):
        model(inputs_embeds=embeds_of(model, BLOCK))
    said = [text for text in warnings_of(log) if "inputs_embeds" in text]
    assert len(said) == 1 and "token_type_ids" in said[0]


def test_embeddings_without_types_in_generate(model, log):
    model.generate(inputs_embeds=embeds_of(model, BLOCK), max_new_tokens=3, do_sample=False)
    said = warnings_of(log)
    assert len(said) == 1 and "token_type_ids" in said[0]


@torch.no_grad()
def test_a_forward_without_any_block(model, log):
    """What a harness does that scores bare text."""
    for _ in range(2):
        model(BARE)
    said = warnings_of(log)
    assert len(said) == 1
    assert "<|im_start|>" in said[0] or "token_type_ids" in said[0]


@pytest.mark.parametrize("call", ["inferred", "explicit"])
def test_labels_inside_a_block(model, log, call):
    more = {"token_type_ids": torch.tensor([[1, 1, 1, 1, 0, 0, 0, 0]])} if call == "explicit" else {}
    for _ in range(2):
        model(ANSWERED, labels=ANSWERED, **more)
    said = [text for text in warnings_of(log) if "label" in text.lower()]
    assert len(said) == 1 and "-100" in said[0]


@torch.no_grad()
def test_no_warning_where_none_is_due(model, log):
    masked = ANSWERED.masked_fill(torch.arange(8) < 4, -100)
    model(ANSWERED, labels=masked)
    model(BLOCK)
    model(inputs_embeds=embeds_of(model, BLOCK), token_type_ids=torch.ones_like(BLOCK))
    model(BARE, token_type_ids=torch.zeros_like(BARE))
    live = model(BLOCK, use_cache=True).past_key_values
    live = model(BARE, past_key_values=live).past_key_values
    model(inputs_embeds=embeds_of(model, BARE), token_type_ids=torch.zeros_like(BARE), past_key_values=live)
    model.generate(BLOCK, max_new_tokens=3, do_sample=False)
    facts_model(prefix_lm=False)(BARE)
    facts_model(prefix_lm=False)(inputs_embeds=embeds_of(model, BARE))
    assert not warnings_of(log)


@torch.no_grad()
def test_the_last_token_of_a_block_may_be_labelled_where_the_response_follows(model, log):
    """The label of the first response token belongs to the block's last position, and leaks nothing."""
    labels = ANSWERED.masked_fill(torch.arange(8) < 4, -100)
    labels[0, 4] = ANSWERED[0, 4]
    model(ANSWERED, labels=labels)
    assert not warnings_of(log)
