"""What six planted defects broke unseen: plans of rows, blocks on a cache, borders of sequences, envelopes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from .facts import (
    BOS,
    CACHES,
    END,
    TOLERANCE,
    Token,
    arguments_of,
    facts_model,
    feed,
    followed_by,
    generate_on,
    is_refused,
    padded_left,
    row_of,
    truth,
)
from .tiny import load_class


IMPLEMENTATIONS = ("eager", "sdpa")


@pytest.fixture(scope="module", params=IMPLEMENTATIONS)
def model(request):
    return facts_model(attn_implementation=request.param)


def plain(model, rows, **more) -> None:
    call = {**arguments_of(rows), **more}
    with torch.no_grad():
        logits = model(**{name: value for name, value in call.items() if value is not None}, use_cache=False).logits
    assert (logits - truth(model, rows)).abs().max() < TOLERANCE


# ---- rows whose blocks differ share the plan of row 0 ---------------------------------------------------------------


ROWS = {
    "blocks of other lengths": [row_of((1, 2), (0, 6), seed=1), row_of((1, 7), (0, 1), seed=2)],
    "blocks in other places": [row_of((1, 4), (0, 4), seed=1), row_of((0, 4), (1, 4), seed=2)],
    "one row has none": [row_of((1, 5), (0, 3), seed=1), row_of((0, 8), seed=2)],
    "the first row has none": [row_of((0, 8), seed=1), row_of((1, 5), (0, 3), seed=2)],
    "a whole block and none": [row_of((1, 8), seed=1), row_of((0, 8), seed=2)],
    "the last row alone differs": [row_of((1, 8), seed=1), row_of((1, 8), seed=2), row_of((1, 7), (0, 1), seed=3)],
    "as many blocks, other cuts": [row_of((1, 3), (2, 5), seed=1)[:8], row_of((1, 5), (2, 3), seed=2)],
}


@pytest.mark.parametrize("layout", ROWS)
@pytest.mark.parametrize("cached", [False, True])
def test_every_row_has_its_own_blocks(model, layout, cached):
    rows = ROWS[layout]
    plain(model, rows)
    history = [row_of((0, 3), seed=20 + i) for i, _ in enumerate(rows)] if cached else [[] for _ in rows]
    live = feed(model, CACHES["HrmTextCache"](model), [[] for _ in rows], history) if cached else None
    feed(model, live, history, rows)


@pytest.mark.parametrize("layout", ["blocks of other lengths", "the first row has none"])
def test_every_row_has_its_own_blocks_in_generate(model, layout):
    rows = ROWS[layout]
    generate_on(model, None, [[], []], rows)
    generate_on(model, None, [[], []], rows, prefill_chunk_size=3)


# ---- a block on a live cache does not see the cache -----------------------------------------------------------------


@pytest.mark.parametrize("past", [[(0, 5)], [(1, 4), (0, 1)], [(0, 1)]], ids=str)
@pytest.mark.parametrize("new", [[(1, 4)], [(1, 3), (0, 2)], [(0, 1), (1, 3)], [(1, 1)]], ids=str)
@pytest.mark.parametrize("cache", ["HrmTextCache", "DynamicCache", "StaticCache"])
def test_a_block_sees_the_cache(model, cache, past, new):
    history, rows = [row_of(*past, seed=1)], [row_of(*new, seed=2)]
    live = feed(model, CACHES[cache](model), [[]], history)
    feed(model, live, history, rows)
    # Every past token counts: without any one of them the truth is another.
    right = truth(model, followed_by(history, rows))[:, -len(rows[0]) :]
    changed = [[replace(token, id=19) if i == 0 else token for i, token in enumerate(history[0])]]
    assert (truth(model, followed_by(changed, rows))[:, -len(rows[0]) :] - right).abs().amax(dim=-1).min() > 0.001


# ---- borders of sequences -------------------------------------------------------------------------------------------


def packed(*parts: list[Token]) -> list[Token]:
    return [token for part in parts for token in part]


def positions_of(rows) -> torch.Tensor:
    return torch.tensor([[token.position for token in row] for row in rows])


PACKED = {
    "repeats the one before": packed(row_of((0, 3), seed=1), row_of((0, 3), seed=2, start=2)),
    "repeats it in a block": packed(row_of((1, 3), seed=1), row_of((1, 3), seed=2, start=2)),
    "sequences of one token": packed(row_of((0, 1), seed=1), row_of((0, 1), seed=2), row_of((0, 1), seed=3)),
    "one below": packed(row_of((1, 4), seed=1), row_of((1, 3), seed=2, start=2)),
    "restarts": packed(row_of((1, 3), (0, 2), seed=1), row_of((1, 2), (0, 2), seed=2)),
}


@pytest.mark.parametrize("layout", PACKED)
def test_where_a_sequence_begins(model, layout):
    row = PACKED[layout]
    plain(model, [row], position_ids=positions_of([row]))


@pytest.mark.parametrize("start", [0, 2, 3, 4])
@pytest.mark.parametrize("type_", [0, 1])
@pytest.mark.parametrize("cache", ["HrmTextCache", "DynamicCache"])
def test_a_sequence_that_begins_with_a_call(model, cache, start, type_):
    """The last cached position is 3: below it and at it a new sequence begins, above it the old one goes on."""
    history, new = [row_of((type_, 4), seed=1)], [row_of((type_, 3), seed=2, start=start)]
    live = feed(model, CACHES[cache](model), [[]], history)
    call = {**arguments_of(new), "position_ids": positions_of(new)}

    def answer() -> None:
        with torch.no_grad():
            logits = model(**call, past_key_values=live, use_cache=True).logits
        assert (logits - truth(model, [[*history[0], *new[0]]])[:, 4:]).abs().max() < TOLERANCE

    assert is_refused(answer) == (start == 4 and type_ == 1)


@pytest.mark.parametrize("cache", ["HrmTextCache", "DynamicCache"])
@pytest.mark.parametrize("last", [1, 2, 3])
def test_a_packed_row_goes_on_with_its_last_sequence(model, cache, last):
    """All of it and nothing else is seen, its first token too."""
    row = packed(row_of((1, 3), (0, 2), seed=1), row_of((0, last), seed=2))
    with torch.no_grad():
        live = model(
            **arguments_of([row]), position_ids=positions_of([row]), past_key_values=CACHES[cache](model)
        ).past_key_values
    for new in ([row_of((0, 1), seed=3)], [row_of((1, 2), (0, 1), seed=4)], [row_of((0, 2), seed=5)]):
        live = feed(model, live, [row], new)
        row = followed_by([row], new)[0]


def test_rows_whose_last_sequences_begin_in_other_places(model):
    rows = [
        packed(row_of((0, 5), seed=1), row_of((0, 1), seed=2)),
        packed(row_of((1, 2), seed=3), row_of((1, 1), (0, 3), seed=4)),
        row_of((0, 6), seed=5),
    ]
    with torch.no_grad():
        live = model(
            **arguments_of(rows), position_ids=positions_of(rows), past_key_values=CACHES["HrmTextCache"](model)
        ).past_key_values
    feed(model, live, rows, [row_of((0, 1), (1, 2), seed=10 + i) for i in range(3)])


# ---- envelopes ------------------------------------------------------------------------------------------------------


def text(*ids: int, types: tuple[int, ...] | None = None, start: int = 0) -> list[Token]:
    types = types or (0,) * len(ids)
    return [Token(id_, type_, start + i) for i, (id_, type_) in enumerate(zip(ids, types))]


CROSSING = {
    "opened before, closed after": packed(text(BOS, 30, 31), text(32, END, 33)),
    "opened before, closed and opened after": packed(
        text(BOS, 30), text(31, END, BOS, 32, END, types=(0, 0, 1, 1, 1))
    ),
    "opened twice": packed(text(BOS, 30), text(BOS, 32, END, types=(1, 1, 1))),
    "closed before": packed(text(BOS, 30, END, types=(1, 1, 1)), text(31, END)),
    "over three sequences": packed(text(BOS, 30), text(31), text(32, END)),
}


@pytest.mark.parametrize("layout", CROSSING)
def test_an_envelope_ends_with_its_sequence(model, layout):
    row = CROSSING[layout]
    plain(model, [row], position_ids=positions_of([row]), token_type_ids=None)


@pytest.mark.parametrize("between", [(), ((0, 1),), ((0, 1), (0, 3), (0, 1))], ids=len)
@pytest.mark.parametrize("cache", ["HrmTextCache", "DynamicCache", "StaticCache"])
def test_an_open_envelope_is_remembered(model, cache, between):
    """Over any number of calls, one token or several, until it would be closed."""
    row = text(BOS, 30)
    live = feed(model, CACHES[cache](model), [[]], [row], token_type_ids=None)
    for i, segment in enumerate(between):
        new = [row_of(segment, seed=30 + i)]
        live = feed(model, live, [row], new, token_type_ids=None)
        row = followed_by([row], new)[0]
    for closing in (text(END), text(31, END), text(31, END, 32)):
        with pytest.raises(ValueError, match="envelope"):
            feed(model, live, [row], [closing], token_type_ids=None)
    feed(model, live, [row], [row_of((0, 2), seed=40)], token_type_ids=None)


def test_an_open_envelope_is_remembered_by_generate(model):
    row = text(BOS, 30, 31)
    live, rows = generate_on(
        model, CACHES["HrmTextCache"](model), [[]], [row], types=False, suppress_tokens=[5, BOS, END, 11]
    )
    for whole in (False, True):
        with pytest.raises(ValueError, match=r"envelope|block"):
            generate_on(model, live, rows, [text(32, END)], types=False, whole=whole)


def test_a_closed_envelope_is_forgotten(model):
    """After the next border of sequences, too, nothing is open."""
    row = text(BOS, 30, END, types=(1, 1, 1))
    live = feed(model, CACHES["HrmTextCache"](model), [[]], [row], token_type_ids=None)
    new = [text(31, END)]
    feed(model, live, [row], new, token_type_ids=None)
    opened = text(BOS, 30)
    live = feed(model, CACHES["HrmTextCache"](model), [[]], [opened], token_type_ids=None)
    fresh = [text(31, END)]
    with torch.no_grad():
        logits = model(torch.tensor([[31, END]]), position_ids=torch.tensor([[0, 1]]), past_key_values=live).logits
    assert (logits - truth(model, [packed(opened, fresh[0])])[:, 2:]).abs().max() < TOLERANCE


def test_a_position_that_repeats_the_real_one_before_is_a_border():
    """Padding in front, or in between, changes nothing about it."""
    find_sequences = load_class("layout_hrm_text.find_sequences")
    positions = torch.tensor([[0, 0, 1, 1, 2], [4, 5, 0, 5, 6]])
    real = torch.tensor([[False, True, True, True, True], [True, True, False, True, True]])
    assert find_sequences(positions, real).tolist() == [[0, 0, 0, 1, 1], [0, 0, 0, 1, 1]]


def test_what_a_compiled_call_wrote_is_remembered(model):
    """No value is read while compiling, so that the next call has to look at the facts themselves."""
    rows = padded_left([row_of((1, 3), (0, 1), seed=1), row_of((1, 5), (0, 2), seed=2)])
    torch._dynamo.reset()
    compiled = torch.compile(model.forward, fullgraph=True, dynamic=False, backend="eager")
    live = CACHES["StaticCache"](model)
    with torch.no_grad():
        compiled(**arguments_of(rows, [[], []]), past_key_values=live, use_cache=True)
    torch._dynamo.reset()
    # Without a mask: the padding is known from the history alone.
    feed(model, live, rows, [row_of((0, 2), seed=3), row_of((0, 2), seed=4)], attention_mask=None)
