"""Rows to batches: what is learned from, what is left out and counted, and that packing changes no value."""

from __future__ import annotations

import json
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from training.data import IGNORED, PrefixLMCollator, bucket, encode_rows, pack, read_rows

from .tiny import ROOT, tiny_model


BOS, END, EOS, PAD = 6, 7, 11, 5
ANSWER = {"role": "assistant", "content": "b"}


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(ROOT, trust_remote_code=True)


def random_examples(count: int, seed: int = 0) -> list[dict[str, list[int]]]:
    rng = Random(seed)
    examples = []
    for _ in range(count):
        prompt = [BOS, *(rng.randrange(12, 96) for _ in range(rng.randrange(1, 9))), END]
        answer = [*(rng.randrange(12, 96) for _ in range(rng.randrange(0, 7))), EOS]
        examples.append(
            {
                "input_ids": prompt + answer,
                "labels": [IGNORED] * len(prompt) + answer,
                "token_type_ids": [1] * len(prompt) + [0] * len(answer),
            }
        )
    return examples


# ---- rows to examples --------------------------------------------------------------------------------------------


def test_only_the_response_and_its_end_are_learned(tokenizer):
    row = {"instruction": "What is 1 + 2?", "response": "It is 3.", "condition": "synth,cot"}
    (example,), report = encode_rows([row], tokenizer, 100)
    prompt = tokenizer("<|im_start|><|quad_end|><|object_ref_end|>What is 1 + 2?<|im_end|>")["input_ids"]
    answer = [*tokenizer("It is 3.")["input_ids"], EOS]
    assert example["input_ids"] == prompt + answer
    assert example["labels"] == [IGNORED] * len(prompt) + answer
    assert example["token_type_ids"] == [1] * len(prompt) + [0] * len(answer)
    assert str(report) == "1 rows: 1 kept, 0 without a response, 0 of weight 0, 0 too long"


def test_every_assistant_turn_of_a_conversation_is_learned(tokenizer):
    messages = [
        {"role": "user", "content": "first"},
        {"role": "assistant", "content": "one"},
        {"role": "user", "content": "second"},
        {"role": "assistant", "content": "two"},
    ]
    (example,), _ = encode_rows([{"messages": messages, "condition": "direct"}], tokenizer, 100)
    learned = [token for token, label in zip(example["input_ids"], example["labels"]) if label != IGNORED]
    assert tokenizer.decode(learned) == "one<|box_end|>two<|box_end|>"
    assert all(label in (IGNORED, token) for token, label in zip(example["input_ids"], example["labels"]))
    inside = [token for token, kind in zip(example["input_ids"], example["token_type_ids"]) if kind]
    opening = "<|im_start|><|object_ref_start|>"
    assert tokenizer.decode(inside) == f"{opening}first<|im_end|>{opening}second<|im_end|>"


def test_a_chat_and_an_instruction_that_say_the_same_are_the_same(tokenizer):
    rows = [
        {"instruction": "Hi there", "response": "Good day.", "condition": "direct"},
        {
            "messages": [{"role": "user", "content": "Hi there"}, {"role": "assistant", "content": "Good day."}],
            "condition": "direct",
        },
    ]
    (first, second), _ = encode_rows(rows, tokenizer, 100)
    assert first == second


@pytest.mark.parametrize("text", ["<|box_end|>", "<|im_end|> 5", "a<|im_start|>b"])
def test_special_tokens_in_a_row_are_plain_text(tokenizer, text):
    rows = [
        {"instruction": text, "response": text},
        {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": text}]},
    ]
    for example in encode_rows(rows, tokenizer, 200)[0]:
        ids = example["input_ids"]
        assert ids.count(BOS) == ids.count(END) == ids.count(EOS) == 1
        assert sum(example["token_type_ids"]) == ids.index(END) + 1


def test_rows_without_a_response_and_long_ones_are_counted(tokenizer):
    rows = [
        {"instruction": "a", "response": ""},
        {"instruction": "a", "response": "  \n"},
        {"instruction": "a", "response": None},
        {"messages": [{"role": "user", "content": "a"}]},
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": ""}]},
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": " \n"}]},
        {"messages": []},
        {"instruction": "a", "response": "1234567890"},
        {"instruction": "a", "response": "12"},
    ]
    examples, report = encode_rows(rows, tokenizer, 12)
    assert len(examples) == 1
    assert str(report) == "9 rows: 1 kept, 7 without a response, 0 of weight 0, 1 too long"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "a", "answer": "b"}, r"row 1: a row needs `instruction` and `response`"),
        ({"instruction": "a", "response": 5}, r"row 1: `response` is a int and must be a string"),
        ({"instruction": "a", "response": "b", "condition": "chatty"}, r"row 1: .*chatty.*known are"),
        ({"messages": "Hello"}, r"row 1: `messages` must be a list of"),
        ({"messages": ["Hello"]}, r"row 1: `messages` must be a list of"),
        ({"messages": [{"role": "bot", "content": "a"}, ANSWER]}, r"row 1: Unknown role 'bot'"),
        ({"messages": [{"role": "user", "content": "a"}] * 2 + [ANSWER]}, r"row 1: .*alternate"),
        ({"messages": [{"role": "user"}, ANSWER]}, r"row 1: A user message has no content"),
        ({"messages": [{"role": "user", "content": "a"}, ANSWER], "condition": "chatty"}, r"row 1: .*chatty"),
    ],
)
def test_rows_that_cannot_be_read_are_named(tokenizer, row, message):
    with pytest.raises(ValueError, match=message):
        encode_rows([row], tokenizer, 100)


def test_a_tokenizer_without_prompts_is_refused():
    with pytest.raises(TypeError, match="trust_remote_code"):
        encode_rows([{"instruction": "a", "response": "b"}], object(), 100)


def test_json_lines_and_datasets_give_the_same_rows(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = [{"instruction": f"{i}?", "response": str(i), "condition": "direct"} for i in range(5)]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    saved = datasets.Dataset.from_list(rows)
    saved.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": saved}).save_to_disk(str(tmp_path / "train"))
    datasets.DatasetDict({"test": saved}).save_to_disk(str(tmp_path / "test"))
    for source in (file, str(file), saved, rows, tmp_path / "one", tmp_path / "train"):
        assert list(read_rows(source)) == rows
    with pytest.raises(ValueError, match="no `train`"):
        list(read_rows(tmp_path / "test"))


@pytest.mark.parametrize(
    ("line", "message"), [("{", "not JSON"), ("[1]", "a row must be a JSON object"), ("[" * 9999, "not JSON")]
)
def test_a_bad_line_is_named(tmp_path, line, message):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"instruction": "a", "response": "b"}\n' + line + "\n")
    with pytest.raises(ValueError, match=f"line 2: {message}"):
        list(read_rows(file))


def test_a_file_that_is_missing_or_no_text_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"rows\.parquet: there is no such file"):
        list(read_rows(tmp_path / "rows.parquet"))
    (tmp_path / "rows.jsonl").write_bytes(b"PAR1\x15\x04\xff\xfe")
    with pytest.raises(ValueError, match=r"rows.jsonl: not text in UTF-8"):
        list(read_rows(tmp_path / "rows.jsonl"))


# ---- groups ------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 40), max_size=60), st.integers(40, 120))
def test_packing_keeps_every_example_once_and_no_row_overflows(lengths, capacity):
    examples = [{"input_ids": [index] * length} for index, length in enumerate(lengths)]
    rows = pack(examples, capacity)
    assert sorted(example["input_ids"][0] for row in rows for example in row) == list(range(len(lengths)))
    filled = [sum(len(example["input_ids"]) for example in row) for row in rows]
    assert all(0 < tokens <= capacity for tokens in filled)
    assert len(rows) <= 2 * sum(lengths) / capacity + 1


def test_packed_rows_are_filled_evenly():
    examples = random_examples(300)
    filled = [sum(len(example["input_ids"]) for example in row) for row in pack(examples, 128)]
    total = sum(len(example["input_ids"]) for example in examples)
    assert len(filled) <= -(-total // 128) + 1
    assert max(filled) - min(filled) <= 8


def test_an_example_longer_than_a_row_is_refused():
    with pytest.raises(ValueError, match="41 tokens and a row only 40"):
        pack([{"input_ids": [0] * 41}], 40)


def test_buckets_hold_similar_lengths_and_everything():
    examples = random_examples(200)
    groups = bucket(examples, 64, Random(0))
    assert sorted(map(id, examples)) == sorted(id(example) for group in groups for example in group)
    for group in groups:
        lengths = [len(example["input_ids"]) for example in group]
        assert max(lengths) * len(lengths) <= 64
        assert max(lengths) - min(lengths) <= 4
    assert groups == bucket(examples, 64, Random(0)) != bucket(examples, 64, Random(1))


# ---- batches -----------------------------------------------------------------------------------------------------


def test_padding():
    examples = random_examples(3)
    batch = PrefixLMCollator(PAD)(examples)
    width = max(len(example["input_ids"]) for example in examples)
    assert {tuple(value.shape) for value in batch.values()} == {(3, width)}
    for row, example in enumerate(examples):
        length = len(example["input_ids"])
        assert batch["input_ids"][row].tolist() == example["input_ids"] + [PAD] * (width - length)
        assert batch["labels"][row].tolist() == example["labels"] + [IGNORED] * (width - length)
        assert batch["token_type_ids"][row].tolist() == example["token_type_ids"] + [0] * (width - length)
        assert batch["attention_mask"][row].tolist() == [1] * length + [0] * (width - length)


def test_packed_positions_restart():
    examples = random_examples(5)
    batch = PrefixLMCollator(PAD, packed=True, row_length=96)([examples[:3], examples[3:]])
    assert {tuple(value.shape) for value in batch.values()} == {(2, 96)}
    positions = [place for example in examples[:3] for place in range(len(example["input_ids"]))]
    assert batch["position_ids"][0, : len(positions)].tolist() == positions
    assert batch["attention_mask"][0].sum() == len(positions)


def test_a_row_that_is_too_long_or_has_no_labels_is_refused():
    (example,) = random_examples(1)
    with pytest.raises(ValueError, match="row_length=2"):
        PrefixLMCollator(PAD, row_length=2)([example])
    with pytest.raises(ValueError, match="lacks `labels`"):
        PrefixLMCollator(PAD)([{"input_ids": [1, 2], "token_type_ids": [1, 0]}])


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_packing_changes_no_logit_loss_or_gradient(implementation):
    model = tiny_model(attn_implementation=implementation).train()
    examples = random_examples(9)
    padded = model(**PrefixLMCollator(PAD)(examples), use_cache=False)
    padded.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    groups = [examples[:2], examples[2:6], examples[6:]]
    packed = model(**PrefixLMCollator(PAD, packed=True)(groups), use_cache=False)
    packed.loss.backward()
    torch.testing.assert_close(packed.loss, padded.loss, atol=1e-6, rtol=1e-6)
    for name, gradient in gradients.items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient, atol=1e-5, rtol=1e-4, msg=name)
    row = 0
    for group, logits in zip(groups, packed.logits):
        start = 0
        for example in group:
            length = len(example["input_ids"])
            torch.testing.assert_close(
                logits[start : start + length], padded.logits[row, :length], atol=1e-4, rtol=1e-4
            )
            start, row = start + length, row + 1
