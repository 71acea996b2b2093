"""Rows of every form that people have: the same example from each, and nothing passed over in silence."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
from transformers import AutoTokenizer

from training.data import IGNORED, EncodingReport, encode_rows, keep_fitting, read_rows
from training.tokenized import is_tokenized, read_tokenized

from .tiny import ROOT


USER, ANSWER = {"role": "user", "content": "Hi there"}, {"role": "assistant", "content": "Good day."}
SAME = [
    {"instruction": "Hi there", "response": "Good day."},
    {"instruction": "Hi there", "output": "Good day.", "input": ""},
    {"instruction": "Hi there", "output": "Good day.", "input": None, "system": None, "weight": 1},
    {"prompt": "Hi there", "completion": "Good day."},
    {"prompt": [USER], "completion": [ANSWER]},
    {"messages": [USER, ANSWER], "tools": []},
    {"messages": [{**USER, "weight": None}, {**ANSWER, "weight": 1}], "tools": "[]"},
    {"conversations": [{"from": "human", "value": "Hi there"}, {"from": "gpt", "value": "Good day."}]},
    # As pandas and numpy hold them.
    {"instruction": np.str_("Hi there"), "output": "Good day.", "input": np.nan, "system": np.float32("nan")},
    {"messages": np.array([USER, ANSWER], dtype=object), "tools": np.nan, "weight": np.int64(1), "prompt": np.nan},
    {"prompt": [USER], "completion": np.array([{**ANSWER, "weight": np.nan}], dtype=object), "condition": np.nan},
]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(ROOT, trust_remote_code=True)


def learned(tokenizer, row) -> str:
    (example,), _ = encode_rows([row], tokenizer, 200)
    return tokenizer.decode([token for token, label in zip(example["input_ids"], example["labels"]) if label >= 0])


@pytest.mark.parametrize("row", SAME, ids=lambda row: "+".join(row))
def test_the_same_in_every_form(tokenizer, row):
    wanted, _ = encode_rows(SAME[:1], tokenizer, 100)
    assert encode_rows([row], tokenizer, 100)[0] == wanted


def test_alpaca_inputs_and_system_texts_are_read(tokenizer):
    alpaca = {"instruction": "Sort.", "input": "b, a", "output": "a, b"}
    joined = {"instruction": "Sort.\n\nb, a", "response": "a, b"}
    assert encode_rows([alpaca], tokenizer, 100)[0] == encode_rows([joined], tokenizer, 100)[0]
    system = [{"role": "system", "content": "Be brief."}]
    wanted = encode_rows([{"messages": [*system, USER, ANSWER]}], tokenizer, 100)[0]
    turns = [{"from": "human", "value": "Hi there"}, {"from": "gpt", "value": "Good day."}]
    for row in (
        {"instruction": "Hi there", "output": "Good day.", "system": "Be brief."},
        {"conversations": turns, "system": "Be brief."},
        {"conversations": [{"from": "system", "value": "Be brief."}, *turns]},
    ):
        assert encode_rows([row], tokenizer, 100)[0] == wanted


def test_weights_choose_what_is_learned(tokenizer):
    second = [{"role": "user", "content": "And?"}, {"role": "assistant", "content": "Bye."}]
    chat = [USER, {**ANSWER, "weight": 0}, *second]
    assert learned(tokenizer, {"messages": chat}) == "Bye.<|box_end|>"
    assert learned(tokenizer, {"messages": [USER, ANSWER, *second]}) == "Good day.<|box_end|>Bye.<|box_end|>"
    assert learned(tokenizer, {"prompt": [USER, ANSWER, second[0]], "completion": [second[1]]}) == "Bye.<|box_end|>"
    rows = [{**SAME[0], "weight": 0}, {"messages": [USER, {**ANSWER, "weight": 0}]}, {"prompt": [USER]}, SAME[0]]
    report = encode_rows(rows, tokenizer, 100)[1]
    assert str(report) == "4 rows: 1 kept, 1 without a response, 2 of weight 0, 0 too long"


def test_an_empty_condition_is_none_and_an_absent_one_the_default(tokenizer):
    begins = [
        encode_rows([{**SAME[0], **more}], tokenizer, 100, "synth,cot")[0][0]["input_ids"][1]
        for more in ({"condition": ""}, {"condition": "noisy"}, {})
    ]
    assert begins == [tokenizer("Hi")["input_ids"][0], 12, 13]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {**SAME[0], "conditon": "cot"},
            r"`conditon` is unknown beside `instruction`, the nearest known is `condition`",
        ),
        ({"instruction": "a", "respons": "b"}, r"`respons` is unknown.*nearest known is `response`"),
        ({"instruction": "a", "response": "b", "output": "c"}, r"two names of one thing"),
        ({"mesages": [USER, ANSWER]}, r"this one has \['mesages'\] \(`mesages`, the nearest known is `messages`\)"),
        ({"messages": [USER, ANSWER], "prompt": "a"}, r"of one form, and this one has `prompt` and `messages`"),
        ({"messages": [USER, {**ANSWER, "wieght": 0}]}, r"`wieght` of a message in `messages` is unknown.*`weight`"),
        ({"messages": [{**USER, "name": "Ann"}, ANSWER]}, r"`name` of a message in `messages` is unknown"),
        ({"messages": [{**USER, "weight": 0.5}, ANSWER]}, r"`weight` is 0.5"),
        ({"messages": [USER, {**ANSWER, "tool_calls": [{"x": 1}]}]}, r"tool calls"),
        (
            {"messages": [{"from": "human", "value": "a"}]},
            r"`from` of a message in `messages` is unknown.*go into `conv",
        ),
        ({"conversations": [{"from": "bot", "value": "a"}]}, r"`from` is 'bot'.*known are system, human"),
        ({"conversations": [{"role": "user", "content": "a"}]}, r"`role` of a message in `conversations` is unknown"),
        ({"prompt": "<|im_start|>a<|im_end|>", "completion": "b"}, r"has its envelope already"),
        ({"instruction": "<|im_start|>a<|im_end|>", "response": "b"}, r"has its envelope already"),
        ({"prompt": "a", "completion": "b<|box_end|>"}, r"has its end token already"),
        (
            {"messages": [USER, {**ANSWER, "role": "asistant"}]},
            r"Unknown role 'asistant'.*nearest known is `assistant`",
        ),
        ({"messages": [USER, {"content": "b"}]}, r"Unknown role None in `messages`"),
        ({"conversations": [{"from": ["human"], "value": "a"}]}, r"`from` is \['human'\]"),
        ({"instruction": "a", "output": 5}, r"`output` is a int and must be a string"),
        ({**SAME[0], "tools": 5}, r"`tools` is a int and must be a list"),
        ({1: "a", **SAME[0]}, r"a row names its fields"),
        (["a", "b"], r"a row names its fields"),
        ({"prompt": "a", "completion": [ANSWER]}, r"here one is of each"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, r"`chosen` is unknown.*preferences are for DPO"),
        ({"chosen": [USER, ANSWER], "rejected": [USER, ANSWER]}, r"preferences are for DPO"),
        ({"text": "a b c"}, r"no prompt to read as a block"),
        ({**SAME[0], "weight": 0.5}, r"`weight` is 0.5"),
        ({**SAME[0], "weight": "0"}, r"`weight` is '0'"),
        ({**SAME[0], "condition": ["cot"]}, r"`condition` is \['cot'\]"),
        ({**SAME[0], "tools": "{"}, r"`tools` is a string that is not JSON"),
    ],
    ids=str,
)
def test_what_is_not_understood_is_an_error(tokenizer, row, message):
    with pytest.raises(ValueError, match=r"row 2: .*" + message):
        encode_rows([SAME[0], row], tokenizer, 100)


def test_fields_may_be_left_aside(tokenizer):
    rows = [{**SAME[0], "source": "x", "id": 3}, {"messages": [USER, ANSWER], "prompt": "Hi", "prompt_id": "1"}]
    assert len(encode_rows(rows[:1], tokenizer, 100, ignored=["source", "id"])[0]) == 1
    assert len(encode_rows(rows[1:], tokenizer, 100, ignored=["prompt", "prompt_id"])[0]) == 1


# ---- files -------------------------------------------------------------------------------------------------------


def test_files_give_the_same_rows(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = [{"instruction": f'What is {n}, "n"?\nSay.', "output": f"0{n}"} for n in range(5)]
    (tmp_path / "rows.json").write_text(json.dumps(rows, indent=1))
    (tmp_path / "rows.jsonl").write_text("\n\n".join(map(json.dumps, rows)), encoding="utf-8-sig")
    with (tmp_path / "rows.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["instruction", "input", "output"])
        writer.writeheader()
        writer.writerows(rows)
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "rows.parquet"))
    for name in ("rows.json", "rows.jsonl", "rows.csv", "rows.parquet"):
        read = [{key: value for key, value in row.items() if value is not None} for row in read_rows(tmp_path / name)]
        assert read == rows, name


def test_a_weight_in_a_csv_file(tmp_path, tokenizer):
    (tmp_path / "rows.csv").write_text("instruction,response,weight\na,b,0\na,b,1\na,b,\na,b,0.0\na,b,1.0\n")
    assert str(encode_rows(read_rows(tmp_path / "rows.csv"), tokenizer, 100)[1]).startswith("5 rows: 3 kept")
    (tmp_path / "rows.csv").write_text("instruction,response,weight\na,b,0.5\n")
    with pytest.raises(ValueError, match=r"`weight` is '0.5'"):
        encode_rows(read_rows(tmp_path / "rows.csv"), tokenizer, 100)


def test_chats_in_parquet(tmp_path, tokenizer):
    datasets = pytest.importorskip("datasets")
    rows = [{"messages": [USER, ANSWER]}, {"messages": [USER, {**ANSWER, "weight": 0}, USER, ANSWER]}]
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "chats.parquet"))
    assert encode_rows(read_rows(tmp_path / "chats.parquet"), tokenizer, 99)[0] == encode_rows(rows, tokenizer, 99)[0]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.json", b'[{"instruction": "a"', "begins like a JSON list and is none"),
        ("rows.json", b'["a"]', "row 1: a row must be a JSON object, this is str"),
        ("rows.csv", b"instruction,response\na,b,c\n", "line 2: not as many cells as the first line"),
        ("rows.csv", b"instruction,response\na\n", "line 2: not as many cells as the first line"),
        ("rows.csv", b'instruction,response\na,"b\n', "not CSV"),
        ("rows.csv", b"instruction,response\n\xff,b\n", "not text in UTF-8"),
        ("rows.parquet", b"PAR1 and nothing else", "not Parquet"),
    ],
)
def test_broken_files_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name}.*{message}"):
        list(read_rows(tmp_path / name))


# ---- folders of tokens -------------------------------------------------------------------------------------------


def write_tokens(folder, rows, indices, **stated):
    """What the data pipeline of the training repository writes: ids in a row, and where texts lie in them."""
    folder.mkdir(parents=True, exist_ok=True)
    ids, spans = [], []
    for prompt, answer in rows:
        spans.append((len(ids), len(prompt), len(ids) + len(prompt), len(answer)))
        ids += prompt + answer
    np.save(folder / "tokens.npy", np.array(ids, dtype=np.uint16))
    indices.mkdir(exist_ok=True)
    for place, name in enumerate(("inst_start", "inst_len", "resp_start", "resp_len")):
        np.save(indices / f"{name}.npy", np.array([span[place] for span in spans], dtype=np.int64))
    envelope = {"boq": "<|im_start|>", "eoq": "<|im_end|>", "eoa": "<|box_end|>", **stated}
    (folder / "metadata.json").write_text(json.dumps({"tokenizer_info": envelope, "max_seq_len": 4097}))


@pytest.fixture(params=["epoch_0", "."])
def tokens(request, tmp_path):
    return tmp_path / "tokens", tmp_path / "tokens" / request.param


def test_tokens_are_the_examples_of_their_texts(tokens, tokenizer):
    rows = [{"instruction": "1 + 1?", "response": "2"}, {"instruction": "Why?", "response": "So.", "condition": "cot"}]
    wanted, _ = encode_rows(rows, tokenizer, 100)
    cut = {name: wanted[0][name][:-1] for name in wanted[0]}  # a response that its pipeline cut
    splits = [example["labels"].count(IGNORED) for example in (*wanted, cut)]
    pairs = [(e["input_ids"][:at], e["input_ids"][at:]) for e, at in zip((*wanted, cut), splits)]
    write_tokens(tokens[0], pairs, tokens[1])
    assert is_tokenized(tokens[0])
    examples = list(read_tokenized(tokens[0], tokenizer))
    assert examples == [*wanted, cut]
    kept, report = keep_fitting(examples, len(wanted[0]["input_ids"]))
    assert report.kept == len(kept) and sum(report.left_out.values()) == 3 - len(kept)
    assert EncodingReport().left_out.keys() == report.left_out.keys()


def test_tokens_of_another_kind_are_refused(tokens, tokenizer):
    folder, indices = tokens
    good = ([6, 8, 20, 7], [21, 11])
    for row, message in (
        (([6, 8, 20], [7, 21, 11]), "the prompt runs from id 6 to 20"),
        (([6, 8, 60000, 7], [11]), "outside the vocabulary"),
        (([6, 8, 20, 7], []), "do not lie in"),
    ):
        write_tokens(folder, [good, row], indices)
        with pytest.raises(ValueError, match=rf"row 1: .*{message}"):
            list(read_tokenized(folder, tokenizer))
    write_tokens(folder, [good], indices, eoq="<|eot|>")
    with pytest.raises(ValueError, match=r"`eoq` is '<\|eot\|>'"):
        list(read_tokenized(folder, tokenizer))
    write_tokens(folder, [good], indices)
    np.save(indices / "resp_start.npy", np.array([2**40]))
    with pytest.raises(ValueError, match=r"do not lie in the 6 of tokens\.npy"):
        list(read_tokenized(folder, tokenizer))
    np.save(indices / "resp_start.npy", np.array(["a"], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="not an array of numbers"):
        list(read_tokenized(folder, tokenizer))
    (indices / "resp_start.npy").unlink()
    with pytest.raises(FileNotFoundError, match="a tokenized folder has inst_start"):
        list(read_tokenized(folder, tokenizer))
