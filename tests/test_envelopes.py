"""Prompt envelopes that open and close with sequences of ids: found in rows, in calls and in `generate`."""

from __future__ import annotations

import random
from itertools import chain

import pytest
import torch
from transformers.utils import logging

from .tiny import load_class, tiny_config, tiny_model


START, END = [20, 21, 22], [23, 24]
PAD = 5
TURNS = [*START, 40, 41, *END, 50, 51, *START, 42, 43, 44, *END, 52]


def infer(ids, start=START, end=END, mask=None):
    function = load_class("layout_hrm_text.infer_token_type_ids")
    return function(torch.tensor([ids]), start, end, None if mask is None else torch.tensor([mask]))[0].tolist()


def plain_rule(ids: list[int], start: list[int], end: list[int]) -> list[int]:
    """The rule read aloud, for a row without padding."""
    types, position, follows = [0] * len(ids), 0, False
    while position < len(ids):
        if ids[position : position + len(start)] != start:
            position, follows = position + 1, False
            continue
        inside = range(position + len(start), len(ids) - len(end) + 1)
        closing = next((at for at in inside if ids[at : at + len(end)] == end), None)
        if closing is None:
            break
        stop = closing + len(end)
        types[position:stop] = [1] * (stop - position)
        types[position] += follows
        position, follows = stop, True
    return types


@pytest.mark.parametrize(
    ("ids", "types"),
    [
        (TURNS, [1] * 7 + [0, 0] + [1] * 8 + [0]),
        ([*START, *END], [1] * 5),
        ([*START, 40, *END, *START, 41, *END], [1] * 6 + [2] + [1] * 5),
        ([*START, 40, *END, 50, *START, 41, *END], [1] * 6 + [0] + [1] * 6),
        ([*START, 40, *START, 41, *END], [1] * 10),
        ([20, 21, 40, *END], [0] * 5),
        ([*START, 40, 23, 40, 24], [0] * 7),
        ([*END, *START, 40, *END, *END], [0, 0, *[1] * 6, 0, 0]),
        ([*START, *END, *START, *END, *START], [1] * 5 + [2] + [1] * 4 + [0] * 3),
        ([20], [0]),
    ],
)
def test_blocks_open_and_close_with_sequences(ids, types):
    assert infer(ids) == types == plain_rule(ids, START, END)


@pytest.mark.parametrize(
    ("start", "end"), [([1], [2]), ([1, 1], [2]), ([1, 2], [3, 3]), ([1, 3, 1], [2, 2]), ([1], [2, 3])]
)
def test_random_rows_are_read_by_the_plain_rule_however_they_are_padded(start, end):
    draw = random.Random(0)
    for _ in range(400):
        ids = [draw.randrange(1, 4) for _ in range(draw.randrange(1, 25))]
        wanted = plain_rule(ids, start, end)
        assert infer(ids, start, end) == wanted, ids
        real = [draw.random() < 0.6 for _ in range(40)]
        while sum(real) < len(ids):
            real.append(True)
        places = [at for at, kept in enumerate(real) if kept][: len(ids)]
        row, mask = [draw.randrange(1, 4) for _ in real], [0] * len(real)
        for at, token in zip(places, ids):
            row[at], mask[at] = token, 1
        types = infer(row, start, end, mask)
        assert [types[at] for at in places] == wanted
        assert sum(types) == sum(wanted)


def test_a_sequence_never_crosses_the_border_of_a_packed_row():
    function = load_class("layout_hrm_text.infer_token_types")
    draw = random.Random(1)
    for _ in range(300):
        rows = [[draw.randrange(1, 4) for _ in range(draw.randrange(1, 9))] for _ in range(3)]
        number = torch.tensor([[index for index, row in enumerate(rows) for _ in row]])
        types, still_open = function(torch.tensor([[*chain(*rows)]]), [1, 2], [3, 3], None, number)
        assert types[0].tolist() == [*chain(*(plain_rule(row, [1, 2], [3, 3]) for row in rows))]
        assert not (still_open & (types > 0)).any()


def test_the_types_of_one_row_are_those_of_its_tokenizer():
    """The tokenizer, which has lists, and the model, which has tensors, follow one rule."""
    of_tokenizer = load_class("tokenization_hrm_text.prefix_token_types")
    draw = random.Random(2)
    for _ in range(500):
        ids = [draw.randrange(1, 5) for _ in range(draw.randrange(1, 30))]
        mask = [int(token != 4) for token in ids]
        masked = [token if token != 4 else -1 for token in ids]
        assert of_tokenizer(masked, 1, 2) == infer(ids, [1], [2], mask)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prefix_start_token_ids": []}, "prefix_start_token_ids"),
        ({"prefix_start_token_ids": [20, 96], "prefix_end_token_id": 7}, "prefix_start_token_ids"),
        ({"prefix_end_token_id": [7, -1]}, "prefix_end_token_id"),
        ({"prefix_end_token_id": []}, "prefix_end_token_id"),
        ({"prefix_end_token_id": "7"}, "prefix_end_token_id"),
        ({"prefix_end_token_id": 6}, "both open and close"),
        ({"prefix_start_token_ids": [20, 21], "prefix_end_token_id": [21, 22]}, "both open and close"),
        ({"prefix_start_token_ids": [20, 21], "prefix_end_token_id": [19, 20]}, "both open and close"),
        ({"prefix_start_token_ids": [20, 21, 22], "prefix_end_token_id": 21}, "both open and close"),
    ],
)
def test_an_envelope_that_cannot_be_right_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**fields)


def test_the_config_keeps_the_envelope(tmp_path):
    config = tiny_config(prefix_start_token_ids=START, prefix_end_token_id=END)
    config.save_pretrained(tmp_path)
    again = load_class("configuration_hrm_text.HrmTextConfig").from_pretrained(tmp_path)
    assert (again.prefix_start, again.prefix_end) == (START, END)
    assert "prefix_start_token_ids" not in tiny_config(prefix_end_token_id=7).to_dict()
    assert (tiny_config(prefix_end_token_id=7).prefix_start, tiny_config().prefix_end) == ([6], [])


@pytest.fixture(scope="module")
def model():
    return tiny_model(prefix_start_token_ids=START, prefix_end_token_id=END)


@torch.no_grad()
def test_blocks_found_are_those_spelled_out(model):
    both = [*START, 40, *END, *START, 41, 42, *END, 50]
    for ids in (TURNS, both):
        types = torch.tensor([plain_rule(ids, START, END)])
        ids = torch.tensor([ids])
        logits = model(ids).logits
        torch.testing.assert_close(logits, model(ids, token_type_ids=types).logits)
        causal = model(ids, token_type_ids=torch.zeros_like(ids)).logits
        assert (logits - causal).abs().max() > 1e-2
    # Two envelopes in a row are two blocks: the first does not read the second.
    merged = model(ids, token_type_ids=(types > 0).long()).logits
    assert (logits - merged).abs().max() > 1e-2
    alone = model(ids[:, :6], token_type_ids=types[:, :6]).logits
    torch.testing.assert_close(logits[:, :6], alone, atol=1e-4, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("chunk", [None, 2])
def test_generate_reads_the_same_blocks(model, chunk):
    ids = torch.tensor([[*START, 40, *END, *START, 41, 42, *END]])
    arguments = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    answer = model.generate(ids, prefill_chunk_size=chunk, **arguments)
    types = torch.tensor([plain_rule(ids[0].tolist(), START, END)])
    torch.testing.assert_close(model.generate(ids, token_type_ids=types, **arguments), answer)
    for _ in range(6):
        padded = torch.nn.functional.pad(types, (0, ids.shape[1] - types.shape[1]))
        logits = model(ids, token_type_ids=padded, use_cache=False).logits
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(answer, ids)


@torch.no_grad()
def test_a_second_turn_that_follows_a_block_directly_is_a_block_of_its_own(model):
    first, second = [*START, 40, *END], [*START, 41, 42, *END]
    whole = model(torch.tensor([first + second])).logits
    cache = model(torch.tensor([first]), use_cache=True).past_key_values
    rest = model(torch.tensor([second]), past_key_values=cache).logits
    torch.testing.assert_close(rest, whole[:, len(first) :], atol=1e-4, rtol=0)


def test_a_model_that_knows_no_envelope_says_so_once(caplog):
    model = tiny_model()
    logging.warning_once.cache_clear()
    for _ in range(2):
        model.generate(torch.tensor([[30, 31]]), max_new_tokens=1)
    assert caplog.text.count("Nothing marks the prompt") == 1
