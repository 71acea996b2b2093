"""What trains or answers wrongly without an error is warned of, once, with the remedy."""

from __future__ import annotations

import re

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from .tiny import ROOT, tiny_model


PROMPT, ANSWER = [6, 8, 20, 21, 22, 7], [30, 31, 11]
IDS = torch.tensor([PROMPT + ANSWER, PROMPT + ANSWER])
RIGHT = torch.tensor([[-100] * len(PROMPT) + ANSWER] * 2)


@pytest.fixture
def warned(caplog):
    """Patterns in, the number of warnings that match them all out; each is said once more in every test."""

    def count(*patterns: str) -> int:
        said = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
        return sum(all(re.search(pattern, message) for pattern in patterns) for message in said)

    return count


@pytest.fixture
def model():
    return tiny_model(prefix_end_token_id=7).train()


INSIDE = (r"labels", r"block|prompt", r"-100|completion|assistant_only_loss")
NO_BLOCK = (r"block", r"encode_prompt|build_prompt|chat template|apply_chat_template|token_type_ids")


def test_labels_inside_a_block(model, warned):
    for _ in range(2):
        model(IDS, labels=IDS, use_cache=False).loss.backward()
    assert warned(*INSIDE) == 1
    assert warned(*NO_BLOCK) <= 1


@pytest.mark.parametrize("types", ["inferred", "explicit"])
def test_right_labels_are_not_warned_of(model, warned, types):
    more = {"token_type_ids": (RIGHT == -100).long()} if types == "explicit" else {}
    model(IDS, labels=RIGHT, use_cache=False, **more).loss.backward()
    assert warned(*INSIDE) == 0 and warned(*NO_BLOCK) == 0


def test_a_training_row_without_a_block(model, warned):
    ids = torch.randint(12, 96, (2, 9))
    for _ in range(2):
        model(ids, labels=ids, use_cache=False).loss.backward()
    assert warned(*NO_BLOCK) == 1


def test_padding_on_the_right_in_generate(warned):
    model = AutoModelForCausalLM.from_pretrained(ROOT, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(ROOT, trust_remote_code=True, padding_side="right")
    prompt = tokenizer.encode_prompt(["What is 4 + 5?", "What is 481 + 27?"], padding=True, return_tensors="pt")
    for _ in range(2):
        model.generate(**prompt, max_new_tokens=2, do_sample=False)
    assert warned(r"padding", r"left") >= 1


def test_padding_on_the_left_is_not_warned_of(warned):
    model = AutoModelForCausalLM.from_pretrained(ROOT, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(ROOT, trust_remote_code=True)
    prompt = tokenizer.encode_prompt(["What is 4 + 5?", "What is 481 + 27?"], padding=True, return_tensors="pt")
    model.generate(**prompt, max_new_tokens=2, do_sample=False)
    assert warned(r"padding", r"left") == 0


def test_a_condition_order_that_was_never_trained(warned):
    tokenizer = AutoTokenizer.from_pretrained(ROOT, trust_remote_code=True)
    for _ in range(2):
        tokenizer.encode_prompt("Hi", "cot,synth")
    assert warned(r"cot,synth", r"synth,cot") == 1
    tokenizer.encode_prompt("Hi", "synth,cot")
    assert warned(r"cot,synth", r"synth,cot") == 1


def test_trl_asks_for_labels_inside_blocks_by_default(tmp_path, warned):
    """TRL replaces `forward` on the model, so the labels pass the class's own by."""
    trl = pytest.importorskip("trl")
    pytest.importorskip("datasets")
    from .trl_material import CHATS, settings

    trl.SFTTrainer(model=str(ROOT), args=trl.SFTConfig(**settings(tmp_path)), train_dataset=CHATS).train()
    assert warned(*INSIDE) == 1


def test_the_check_refuses_what_is_warned_of(tmp_path):
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    from training.check import PrefixCheck

    from .trl_material import CHATS, settings

    def train(rows, **more):
        tokenizer = AutoTokenizer.from_pretrained(ROOT, trust_remote_code=True)
        arguments = trl.SFTConfig(**settings(tmp_path, **more))
        trl.SFTTrainer(model=str(ROOT), args=arguments, train_dataset=rows, callbacks=[PrefixCheck(tokenizer)]).train()

    with pytest.raises(ValueError, match=r"labels lie on tokens of a prompt.*assistant_only_loss=True"):
        train(CHATS)
    with pytest.raises(ValueError, match=r"no prompt block.*build_prompt"):
        train(datasets.Dataset.from_list([{"prompt": "What is 4 + 5?", "completion": "9"}] * 4))
    with pytest.raises(ValueError, match="no packing may cut a prompt"):
        train(CHATS, assistant_only_loss=True, packing=True, packing_strategy="wrapped", max_length=24)
