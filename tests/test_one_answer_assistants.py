"""Assisted decoding: whoever drafts, the tokens and logits are those of the model alone."""

from __future__ import annotations

import json
import random
import shutil

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from .harness import CAUSAL, CONVERSATION, ONE_BLOCK, deviation, generated, is_greedy, padded
from .one_answer_models import one_answer_model
from .tiny import ROOT


@pytest.fixture(scope="module")
def model():
    return one_answer_model()


def word_tokenizer(size: int, seed: int) -> PreTrainedTokenizerFast:
    """A tokenizer of `size` words, in an order of its own."""
    words = [f"w{i}" for i in range(size)]
    random.Random(seed).shuffle(words)
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="w5", unk_token="w0")


def small_llama(vocab_size: int) -> LlamaForCausalLM:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=vocab_size, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4
    )
    model = LlamaForCausalLM(config).eval()
    model.generation_config.eos_token_id = 0
    return model


ASSISTANTS = {
    "a smaller HRM-Text": lambda: one_answer_model(4, hidden_size=16, intermediate_size=32),
    "an HRM-Text of another depth": lambda: one_answer_model(5, H_cycles=1, L_cycles=2),
    "a Llama of the same vocabulary": lambda: small_llama(96),
}


@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize("rows", [ONE_BLOCK, CONVERSATION, CAUSAL], ids=["block", "conversation", "causal"])
@pytest.mark.parametrize("assistant", ASSISTANTS)
def test_assistant(model, assistant, rows, do_sample):
    answers = generated(
        model, rows, assistant_model=ASSISTANTS[assistant](), max_new_tokens=12, do_sample=do_sample, eos_token_id=0
    )
    assert deviation(model, answers) < 1e-4
    assert do_sample or is_greedy(model, answers)


def test_an_assistant_from_another_folder(model, tmp_path):
    """As users load it: with its own copy of every module."""
    smaller = one_answer_model(4, hidden_size=16, intermediate_size=32)
    smaller.save_pretrained(tmp_path)
    for source in ROOT.glob("*_hrm_text.py"):
        shutil.copy(source, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["auto_map"] = json.loads((ROOT / "config.json").read_text())["auto_map"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assistant = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
    assert type(assistant) is not type(model)
    answers = generated(model, CONVERSATION, assistant_model=assistant, max_new_tokens=12, eos_token_id=0)
    assert deviation(model, answers) < 1e-4 and is_greedy(model, answers)


def test_same_model_drafts_are_all_accepted():
    """The assistant sees the same layout, so the model agrees with each of its drafts."""
    model, calls = one_answer_model(), []
    model.model.register_forward_pre_hook(lambda *_: calls.append(1))
    model.generation_config.num_assistant_tokens = 5
    model.generation_config.num_assistant_tokens_schedule = "constant"
    model.generation_config.assistant_confidence_threshold = 0.0
    model.generate(**padded(CONVERSATION), assistant_model=model, max_new_tokens=12, do_sample=False, eos_token_id=0)
    # Two rounds of five drafts and the model's own token: 10 calls of the assistant, 2 of the model.
    assert len(calls) == 12


@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize("assistant", [lambda: one_answer_model(3, vocab_size=120), lambda: small_llama(120)])
def test_universal_assistant(model, assistant, do_sample):
    """Another tokenizer: the prompt reaches the assistant as text, its drafts are checked like any others."""
    answers = generated(
        model,
        CONVERSATION,
        assistant_model=assistant(),
        tokenizer=word_tokenizer(96, 1),
        assistant_tokenizer=word_tokenizer(120, 2),
        max_new_tokens=12,
        do_sample=do_sample,
        eos_token_id=0,
    )
    assert deviation(model, answers) < 1e-4
    assert do_sample or is_greedy(model, answers)


def test_universal_assistant_does_not_warn_of_its_own_prompt(caplog):
    envelope = {"prefix_end_token_id": 7}
    one_answer_model(**envelope).generate(
        torch.tensor([[6, 30, 31, 32, 7]]),
        assistant_model=one_answer_model(3, vocab_size=120, **envelope),
        tokenizer=word_tokenizer(96, 1),
        assistant_tokenizer=word_tokenizer(120, 2),
        max_new_tokens=4,
        do_sample=False,
        eos_token_id=0,
    )
    assert "prefix block" not in caplog.text


def test_early_exit_is_refused(model):
    with pytest.raises(ValueError, match="assistant_early_exit"):
        generated(model, ONE_BLOCK, assistant_early_exit=1)


def test_assistance_without_ids_is_refused(model):
    with pytest.raises(ValueError, match="input_ids"):
        generated(model, ONE_BLOCK, embeddings=True, prompt_lookup_num_tokens=2)


def test_assistance_on_new_ids_alone_is_refused(model):
    ids = torch.tensor([ONE_BLOCK[0].ids])
    cache = model(input_ids=ids, token_type_ids=torch.ones_like(ids), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="whole conversation"):
        model.generate(
            torch.tensor([[30, 31]]),
            attention_mask=torch.ones(1, ids.shape[1] + 2, dtype=torch.long),
            past_key_values=cache,
            assistant_model=model,
        )
