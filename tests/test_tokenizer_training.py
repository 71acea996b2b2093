"""training/tokenizer.py: the vocabulary of a byte-level BPE with the published special tokens."""

from __future__ import annotations

import json
import unicodedata

import pytest
from tokenizers import Tokenizer

from training.tokenizer import SPECIAL_TOKENS, main, train_tokenizer

from .chat_material import corpus, hard_texts


@pytest.fixture(scope="module")
def trained():
    return train_tokenizer(corpus(500), 400)


def test_special_tokens_are_first_and_bytes_all_there(trained):
    assert trained.get_vocab_size() == 400
    assert [trained.token_to_id(token) for token in SPECIAL_TOKENS] == list(range(31))
    added = trained.get_added_tokens_decoder()
    assert sorted(added) == list(range(31))
    assert all(token.special and not token.normalized for token in added.values())
    every_byte = bytes(range(256)).decode("latin-1")
    assert trained.decode(trained.encode(every_byte).ids) == unicodedata.normalize("NFC", every_byte)


def test_one_token_a_digit_and_words_keep_their_space(trained):
    assert trained.encode("1234 567").tokens == ["1", "2", "3", "4", "Ġ", "5", "6", "7"]
    assert trained.encode("What is").tokens == ["What", "Ġis"]
    assert trained.encode(" What").tokens != trained.encode("What").tokens


def test_no_token_joins_digits_or_spans_words(trained):
    for token in trained.get_vocab():
        if token not in SPECIAL_TOKENS:
            assert sum(sign.isdigit() for sign in token) <= 1, token
            assert "Ġ" not in token[1:] or set(token) <= {"Ġ", "Ċ"}, token


def test_texts_come_back_exactly_and_nothing_is_added(trained):
    for text in hard_texts(100, list(SPECIAL_TOKENS)):
        encoding = trained.encode(text)
        assert trained.decode(encoding.ids, skip_special_tokens=False) == unicodedata.normalize("NFC", text)
    assert trained.encode("").ids == []


def test_composed_and_decomposed_signs_are_one(trained):
    assert trained.encode("e\u0301").ids == trained.encode("\u00e9").ids


def test_the_same_texts_give_the_same_tokenizer(trained):
    assert train_tokenizer(iter(corpus(500)), 400).to_str() == trained.to_str()


def test_special_tokens_in_the_corpus_are_plain_text():
    texts = ["<|im_end|> and <think>"] * 50
    trained = train_tokenizer(texts, 300)
    assert [trained.token_to_id(token) for token in SPECIAL_TOKENS] == list(range(31))
    trained.encode_special_tokens = True
    assert min(trained.encode("<|im_end|> and <think>").ids) > 30


@pytest.mark.parametrize("size", [0, 286])
def test_a_vocabulary_below_the_bytes_is_refused(size):
    with pytest.raises(ValueError, match="need 287"):
        train_tokenizer(["a"], size)


def test_texts_that_cannot_fill_the_vocabulary_are_refused():
    with pytest.raises(ValueError, match="support a vocabulary of 28"):
        train_tokenizer(["ab ab ab"], 5000)


def test_one_string_is_refused():
    with pytest.raises(TypeError, match="list of strings"):
        train_tokenizer("one text", 300)


def test_command_line(tmp_path, capsys):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        "".join(
            json.dumps({"instruction": text, "more": [{"response": text}], "n": 7}) + "\n" for text in corpus(200)
        ),
        encoding="utf-8",
    )
    plain = tmp_path / "plain.txt"
    plain.write_text("\n".join(corpus(200)), encoding="utf-8")
    output = tmp_path / "made" / "tokenizer.json"
    assert main([str(rows), str(plain), "--vocab-size", "380", "--output", str(output)]) == 0
    assert "380 tokens" in capsys.readouterr().out
    assert Tokenizer.from_file(str(output)).get_vocab_size() == 380


def test_command_line_names_what_is_wrong(tmp_path, capsys):
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"a": "b"}\nnot json\n', encoding="utf-8")
    assert main([str(broken), "--output", str(tmp_path / "t.json")]) == 1
    assert "broken.jsonl, line 2" in capsys.readouterr().err
    assert main([str(tmp_path / "absent.txt"), "--output", str(tmp_path / "t.json")]) == 1
    assert "absent.txt" in capsys.readouterr().err
    assert not (tmp_path / "t.json").exists()
