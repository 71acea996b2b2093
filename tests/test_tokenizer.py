"""HrmTextTokenizer: token_type_ids in every way of calling it, conditions, exact round trips, saving and loading."""

from __future__ import annotations

import copy
import itertools
import json
import pickle
import random
import unicodedata

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from .chat_material import hard_texts, questions
from .tiny import ROOT, load_class


BOS, END, EOS, PAD = 6, 7, 11, 5
CONDITION_IDS = {"direct": 8, "cot": 9, "noisy": 12, "synth": 13}
PROMPT, ANSWER = "<|im_start|><|object_ref_start|>What is 1 + 2?<|im_end|>", "3<|box_end|>"


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(ROOT, trust_remote_code=True)


@pytest.fixture
def fresh():
    return AutoTokenizer.from_pretrained(ROOT, trust_remote_code=True)


def inferred(ids, mask=None):
    """The token_type_ids that the model infers from a batch of rows."""
    infer = load_class("layout_hrm_text.infer_token_type_ids")
    mask = None if mask is None else torch.as_tensor(mask)
    return infer(torch.as_tensor(ids), BOS, END, mask).long().tolist()


def special_tokens(tokenizer):
    return [token.content for _, token in sorted(tokenizer.added_tokens_decoder.items())]


# ---- what is loaded ------------------------------------------------------------------------------------------------


def test_loads_as_the_fast_class_with_the_defaults_of_a_decoder(tokenizer):
    assert type(tokenizer).__name__ == "HrmTextTokenizer" and isinstance(tokenizer, PreTrainedTokenizerFast)
    assert tokenizer.model_input_names == ["input_ids", "token_type_ids", "attention_mask"]
    assert tokenizer.padding_side == "left"
    assert [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id] == [BOS, EOS, PAD]
    assert tokenizer.prefix_end_token_id == END
    assert tokenizer.unk_token is None
    assert tokenizer("word")["input_ids"] == tokenizer("word", add_special_tokens=False)["input_ids"]


def test_special_tokens_have_the_published_ids(tokenizer):
    from training.tokenizer import SPECIAL_TOKENS

    assert tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == list(range(31))
    assert sorted(tokenizer.all_special_ids) == list(range(31))
    assert all(len(tokenizer(token)["input_ids"]) == 1 for token in SPECIAL_TOKENS)
    assert tokenizer.decode(list(range(31)), skip_special_tokens=True) == ""


# ---- token_type_ids ------------------------------------------------------------------------------------------------


def test_types_of_one_text(tokenizer):
    encoding = tokenizer(PROMPT + ANSWER)
    length = encoding["input_ids"].index(END) + 1
    assert encoding["token_type_ids"] == [1] * length + [0] * (len(encoding["input_ids"]) - length)
    assert 0 < len(encoding["input_ids"]) - length == len(tokenizer(ANSWER)["input_ids"])


@pytest.mark.parametrize(
    ("text", "types"),
    [
        ("word", [0]),
        ("<|im_start|>", [0]),
        ("<|im_start|><|im_start|>", [0, 0]),
        ("<|im_end|>", [0]),
        ("<|im_end|><|im_start|><|im_end|><|im_end|>", [0, 1, 1, 0]),
        ("<|im_start|><|im_start|><|im_end|>", [1, 1, 1]),
        ("<|im_start|><|im_end|><|box_end|><|im_start|><|im_end|>", [1, 1, 0, 1, 1]),
        ("<|im_start|><|im_end|><|im_start|>", [1, 1, 0]),
    ],
)
def test_types_follow_the_envelope_rule(tokenizer, text, types):
    text = text.replace("word", "7")
    encoding = tokenizer(text)
    assert encoding["token_type_ids"] == types
    assert inferred([encoding["input_ids"]]) == [types]


@pytest.mark.parametrize("side", ["left", "right"])
def test_types_of_a_padded_batch(tokenizer, side):
    batch = tokenizer([PROMPT + ANSWER, "7", PROMPT], padding=True, padding_side=side, return_tensors="pt")
    lengths = [len(tokenizer(text)["input_ids"]) for text in (PROMPT + ANSWER, "7", PROMPT)]
    assert batch["attention_mask"].sum(1).tolist() == lengths
    pads = (batch["attention_mask"] == 0).tolist()
    assert all(row[0] == (side == "left") for row, length in zip(pads, lengths) if length < max(lengths))
    assert batch["token_type_ids"].tolist() == inferred(batch["input_ids"], batch["attention_mask"])
    assert batch["token_type_ids"].sum(1).tolist() == [len(tokenizer(PROMPT)["input_ids"]), 0, lengths[2]]


def test_types_of_pairs(tokenizer):
    for first, second in [(PROMPT, ANSWER), ("<|im_start|>1", "2<|im_end|>3"), (PROMPT + ANSWER, PROMPT)]:
        pair = tokenizer(first, second)
        assert pair["input_ids"] == tokenizer(first)["input_ids"] + tokenizer(second)["input_ids"]
        assert [pair["token_type_ids"]] == inferred([pair["input_ids"]])
        assert sum(pair["token_type_ids"]) > 0
    batch = tokenizer([PROMPT, "7"], [ANSWER, PROMPT], padding=True)
    assert batch["token_type_ids"] == inferred(batch["input_ids"], batch["attention_mask"])


@pytest.mark.parametrize("side", ["left", "right"])
def test_types_of_truncated_texts(fresh, side):
    fresh.truncation_side = side
    whole = len(fresh(PROMPT + ANSWER)["input_ids"])
    for length in range(1, whole + 1):
        row = fresh(PROMPT + ANSWER, truncation=True, max_length=length)
        assert len(row["input_ids"]) == length
        assert [row["token_type_ids"]] == inferred([row["input_ids"]])
    # What is left of an envelope that lost its end is no block.
    assert sum(fresh(PROMPT, truncation=True, max_length=3)["token_type_ids"]) == 0


def test_types_of_overflowing_tokens(tokenizer):
    text = (PROMPT + ANSWER) * 3
    parts = tokenizer(
        [text, "7"], truncation=True, max_length=9, stride=2, return_overflowing_tokens=True, padding=True
    )
    assert len(parts["input_ids"]) > 4 and parts["overflow_to_sample_mapping"][-1] == 1
    assert parts["token_type_ids"] == inferred(parts["input_ids"], parts["attention_mask"])


def test_types_of_pretokenized_input(tokenizer):
    words = ["<|im_start|>", "What", " is", " 1", "<|im_end|>", "2"]
    encoding = tokenizer(words, is_split_into_words=True)
    assert encoding["input_ids"] == tokenizer("".join(words))["input_ids"]
    assert encoding["token_type_ids"] == [1] * (len(encoding["input_ids"]) - 1) + [0]
    batch = tokenizer([words, ["7"]], is_split_into_words=True, padding=True)
    assert batch["token_type_ids"] == inferred(batch["input_ids"], batch["attention_mask"])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
def test_pad_gives_types_to_bare_ids(tokenizer, side, kind):
    rows = [tokenizer(text)["input_ids"] for text in (PROMPT + ANSWER, PROMPT, "7")]
    for value in ({"input_ids": [kind(row) for row in rows]}, [{"input_ids": kind(row)} for row in rows]):
        batch = tokenizer.pad(value, padding_side=side)
        assert np.asarray(batch["token_type_ids"]).tolist() == inferred(
            np.asarray(batch["input_ids"]).tolist(), np.asarray(batch["attention_mask"]).tolist()
        )
    if kind is not np.array:  # the library takes a single row of numpy's numbers for a batch
        alone = tokenizer.pad({"input_ids": kind(rows[0])}, padding="max_length", max_length=40, padding_side=side)
        assert sum(np.asarray(alone["token_type_ids"]).tolist()) == len(rows[1])


def test_pad_keeps_types_that_are_given(tokenizer):
    row = {"input_ids": [BOS, 50, END, 50], "token_type_ids": [0, 1, 1, 0]}
    assert tokenizer.pad([row, {"input_ids": [50] * 5, "token_type_ids": [1] * 5}])["token_type_ids"] == [
        [0, 0, 1, 1, 0],
        [1, 1, 1, 1, 1],
    ]


def test_padding_with_the_bos_token_opens_no_block(fresh):
    fresh.pad_token = fresh.bos_token
    batch = fresh(["1<|im_end|>2", "1<|im_end|>22222"], padding=True)
    assert batch["input_ids"][0][0] == BOS
    assert sum(batch["token_type_ids"][0]) == 0


def test_prepare_for_model_gives_types_where_the_version_has_it(tokenizer):
    if not hasattr(PreTrainedTokenizerFast, "prepare_for_model"):
        assert not hasattr(tokenizer, "prepare_for_model")
        return
    prompt, answer = (tokenizer(text)["input_ids"] for text in (PROMPT, ANSWER))
    for arguments in ({}, {"add_special_tokens": False}, {"padding": "max_length", "max_length": 40}):
        row = tokenizer.prepare_for_model(prompt, answer, **arguments)
        assert [row["token_type_ids"]] == inferred([row["input_ids"]], [row["attention_mask"]])
        assert sum(row["token_type_ids"]) == len(prompt)
    cut = tokenizer.prepare_for_model(prompt, truncation=True, max_length=4, return_tensors="pt")
    assert cut["token_type_ids"].tolist() == [0, 0, 0, 0]
    assert "token_type_ids" not in tokenizer.prepare_for_model(prompt, return_token_type_ids=False)


def test_types_can_be_declined(tokenizer):
    assert "token_type_ids" not in tokenizer(PROMPT, return_token_type_ids=False)
    assert "token_type_ids" not in tokenizer([PROMPT], return_token_type_ids=False)


def test_types_of_random_ids_are_what_the_model_infers(tokenizer):
    draw = random.Random(0)
    rows = [[draw.choice([BOS, END, 40, 41]) for _ in range(draw.randrange(1, 16))] for _ in range(200)]
    for side in ("left", "right"):
        batch = tokenizer.pad({"input_ids": rows}, padding_side=side)
        assert batch["token_type_ids"] == inferred(batch["input_ids"], batch["attention_mask"])
    assert 200 < sum(map(sum, batch["token_type_ids"])) < sum(map(sum, batch["attention_mask"])) - 200


# ---- round trips ---------------------------------------------------------------------------------------------------


def test_hard_texts_come_back_exactly_and_get_the_types_the_model_infers(tokenizer):
    texts = hard_texts(200, special_tokens(tokenizer))
    assert sum("<|im_start|>" in text and "<|im_end|>" in text for text in texts) > 3
    batch = tokenizer(texts, padding=True)
    assert batch["token_type_ids"] == inferred(batch["input_ids"], batch["attention_mask"])
    for text, ids, mask in zip(texts, batch["input_ids"], batch["attention_mask"]):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == unicodedata.normalize("NFC", text)
        assert tokenizer(text)["input_ids"] == [token for token, real in zip(ids, mask) if real]


def test_hard_texts_in_a_prompt_come_back_exactly_and_hold_no_special_token(tokenizer):
    texts = hard_texts(200, special_tokens(tokenizer), seed=1)
    batch = tokenizer.encode_prompt(texts, "cot")
    for text, ids, types in zip(texts, batch["input_ids"], batch["token_type_ids"]):
        assert ids[:2] == [BOS, CONDITION_IDS["cot"]] and ids[-1] == END and types == [1] * len(ids)
        assert min(ids[2:-1]) > 30
        assert tokenizer.decode(ids[2:-1]) == unicodedata.normalize("NFC", text)
    assert batch["token_type_ids"] == [inferred([ids])[0] for ids in batch["input_ids"]]


# ---- conditions and prompts ----------------------------------------------------------------------------------------


def test_every_ordered_subset_of_the_conditions(tokenizer):
    for size in range(5):
        for tags in itertools.permutations(CONDITION_IDS, size):
            ids = [BOS, *(CONDITION_IDS[tag] for tag in tags), *tokenizer("7")["input_ids"], END]
            for condition in (",".join(tags), " , ".join(tags), list(tags), tags):
                assert tokenizer.encode_prompt("7", condition)["input_ids"] == ids
                assert tokenizer(tokenizer.build_prompt("7", condition))["input_ids"] == ids
            assert not {1, 2, 3, 4} & set(ids)


@pytest.mark.parametrize("condition", ["loud", "direct,loud", ["cot", "Synth"], "<|cot|>"])
def test_an_unknown_condition_names_the_known_ones(tokenizer, condition):
    calls = (
        lambda: tokenizer.build_prompt("7", condition=condition),
        lambda: tokenizer.encode_prompt("7", condition=condition),
        lambda: tokenizer.apply_chat_template([{"role": "user", "content": "7"}], condition=condition),
        lambda: AutoTokenizer.from_pretrained(ROOT, trust_remote_code=True, default_condition=condition),
    )
    for call in calls:
        with pytest.raises(ValueError, match="known are direct, cot, noisy, synth"):
            call()


def test_a_condition_given_twice_is_refused(tokenizer):
    with pytest.raises(ValueError, match="twice"):
        tokenizer.encode_prompt("7", condition="cot,direct,cot")


def test_build_prompt_refuses_every_special_token_and_names_encode_prompt(tokenizer):
    for token in special_tokens(tokenizer):
        with pytest.raises(ValueError, match="encode_prompt"):
            tokenizer.build_prompt(f"a {token} b")
        ids = tokenizer.encode_prompt(f"a {token} b")["input_ids"]
        assert min(ids[2:-1]) > 30 and tokenizer.decode(ids[2:-1]) == f"a {token} b"


def test_encode_prompt_gives_tensors_and_pads_left(tokenizer):
    texts = [question for question, _ in questions(3)]
    batch = tokenizer.encode_prompt(texts, "synth,cot", padding=True, return_tensors="pt")
    longest = batch["input_ids"].shape[1]
    for row, (text, ids) in enumerate(zip(texts, batch["input_ids"])):
        alone = tokenizer.encode_prompt(text, ["synth", "cot"])
        assert alone["input_ids"][1:3] == [13, 9]
        gap = longest - len(alone["input_ids"])
        assert ids.tolist() == [PAD] * gap + alone["input_ids"]
        assert batch["token_type_ids"][row].tolist() == [0] * gap + alone["token_type_ids"]
        assert batch["attention_mask"][row].tolist() == [0] * gap + alone["attention_mask"]
    single = tokenizer.encode_prompt(texts[0], return_tensors="pt")
    assert single["input_ids"].shape == single["token_type_ids"].shape == single["attention_mask"].shape
    assert single["input_ids"].shape[0] == 1
    with pytest.raises(ValueError, match="padding"):
        tokenizer.encode_prompt(texts, return_tensors="pt")


def test_prompts_of_other_types_are_refused(tokenizer):
    for text in (None, 7, ["a", 7], {"a": "b"}.items()):
        with pytest.raises(TypeError, match="string"):
            tokenizer.encode_prompt(text)
    with pytest.raises(TypeError, match="string"):
        tokenizer.build_prompt(["a"])


def test_added_tokens_are_known_to_prompts(fresh):
    fresh.encode_prompt("a")
    fresh.add_special_tokens({"additional_special_tokens": ["<|new|>"]}, False)
    new = fresh.convert_tokens_to_ids("<|new|>")
    assert fresh("<|new|>")["input_ids"] == [new]
    assert new not in fresh.encode_prompt("a <|new|> b")["input_ids"]
    with pytest.raises(ValueError, match="encode_prompt"):
        fresh.build_prompt("<|new|>")


# ---- saving, loading, copying --------------------------------------------------------------------------------------


def test_saving_and_loading_keeps_everything(fresh, tmp_path):
    fresh.default_condition = "synth,cot"
    fresh.add_tokens(["zebra"])
    fresh.model_max_length = 77
    fresh.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=True)
    assert type(again).__name__ == "HrmTextTokenizer"
    for name in ("default_condition", "model_max_length", "padding_side", "model_input_names", "special_tokens_map"):
        assert getattr(again, name) == getattr(fresh, name), name
    assert sorted(again.all_special_tokens) == sorted(fresh.all_special_tokens)
    assert again.chat_template == fresh.chat_template == (ROOT / "chat_template.jinja").read_text()
    assert again.get_vocab() == fresh.get_vocab() and "zebra" in again.get_vocab()
    texts = [*hard_texts(20, special_tokens(fresh)), PROMPT + ANSWER, "a zebra"]
    assert again(texts, padding=True) == fresh(texts, padding=True)
    assert again.encode_prompt("7") == fresh.encode_prompt("7") and again.encode_prompt("7")["input_ids"][1:3] == [
        13,
        9,
    ]


def test_the_plain_fast_class_loses_only_what_ours_adds(fresh, tmp_path):
    fresh.save_pretrained(tmp_path)
    texts = [*hard_texts(50, special_tokens(fresh)), PROMPT + ANSWER]
    ours = fresh(texts, padding=True)
    del ours["token_type_ids"]
    chat = [{"role": "user", "content": "What is 1 + 2?"}]
    for folder in (ROOT, tmp_path):
        for plain in (AutoTokenizer.from_pretrained(folder), PreTrainedTokenizerFast.from_pretrained(folder)):
            assert isinstance(plain, PreTrainedTokenizerFast) and not hasattr(plain, "encode_prompt")
            # Not zeros: they would tell the model to run causal, where leaving them out lets it find the blocks.
            assert "token_type_ids" not in plain("7")
            assert plain(texts, padding=True) == ours
            assert plain.padding_side == "left" and plain.special_tokens_map == fresh.special_tokens_map
            assert sorted(plain.all_special_ids) == list(range(31))
            plain_chat = plain.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)
            assert plain_chat["input_ids"] == fresh.encode_prompt("What is 1 + 2?", "direct")["input_ids"]


def test_a_folder_saved_by_either_series_of_transformers_loads(tmp_path, fresh):
    fresh.save_pretrained(tmp_path)
    file = tmp_path / "tokenizer_config.json"
    config = json.loads(file.read_text())
    # transformers 5 writes extra_special_tokens, a list; 4 reads a dict there and fails on a list.
    config["extra_special_tokens"] = config.pop("additional_special_tokens")
    assert len(config["extra_special_tokens"]) == 28
    file.write_text(json.dumps(config))
    again = AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=True)
    assert sorted(again.all_special_ids) == list(range(31))


def test_no_warning_on_loading(caplog, capfd):
    AutoTokenizer.from_pretrained(ROOT, trust_remote_code=True)
    assert "not the same type" not in capfd.readouterr().err + caplog.text


def test_pickle_and_deepcopy(tokenizer):
    tokenizer.encode_prompt("7")
    for twin in (copy.deepcopy(tokenizer), pickle.loads(pickle.dumps(tokenizer))):
        assert twin(PROMPT + ANSWER) == tokenizer(PROMPT + ANSWER)
        assert twin.encode_prompt("a <|im_end|>") == tokenizer.encode_prompt("a <|im_end|>")


def test_a_tokenizer_from_the_file_alone(tokenizer):
    bare = type(tokenizer)(str(ROOT / "tokenizer.json"))
    assert bare(PROMPT + ANSWER) == tokenizer(PROMPT + ANSWER)
    assert bare.encode_prompt("7") == tokenizer.encode_prompt("7")
    assert (bare.bos_token_id, bare.eos_token_id, bare.pad_token_id) == (BOS, EOS, PAD)
