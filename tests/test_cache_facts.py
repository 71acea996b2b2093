"""After anything that is done to a cache, the next call is right or refused: rows moved, copied, cut, fed again."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from .facts import (
    CACHES,
    CHANGES,
    REMEMBERING,
    UNABLE,
    Token,
    facts_model,
    feed,
    followed_by,
    generate_on,
    is_refused,
    padded_left,
    reordered,
    repeated,
    row_of,
    selected,
)


CHANGED = [(cache, change) for cache in CACHES for change in CHANGES if change not in UNABLE.get(cache, ())]
# Layouts of three rows: of different lengths, packed, and with blocks that end in different places.
PASTS = {
    "ragged": padded_left([row_of((0, 3), seed=1), row_of((1, 2), (0, 6), seed=2), row_of((0, 5), seed=3)]),
    "packed": [
        [*row_of((0, 4), seed=1), *row_of((0, 4), seed=2)],
        [*row_of((1, 6), seed=3), *row_of((0, 2), seed=4)],
        row_of((0, 8), seed=5),
    ],
    "blocks": [row_of((0, 4), (1, 4), seed=1), row_of((1, 4), (0, 4), seed=2), row_of((0, 8), seed=3)],
}
NEXT = {
    "one token": [(0, 1)],
    "tokens": [(0, 4)],
    "a block": [(0, 1), (1, 4)],
    "a block and a response": [(0, 1), (1, 3), (0, 2)],
}


@pytest.fixture(scope="module")
def model():
    return facts_model()


def new_rows(rows, next_: str) -> list[list[Token]]:
    return [row_of(*NEXT[next_], seed=20 + i) for i, _ in enumerate(rows)]


def start(model, cache: str, rows, **more):
    """A cache of that class that holds the rows."""
    if any(token.position <= before.position for row in rows for before, token in pairwise(row) if before.real):
        more["position_ids"] = torch.tensor([[token.position for token in row] for row in rows])
        live = CACHES[cache](model)
        call = {
            "input_ids": torch.tensor([[token.id for token in row] for row in rows]),
            "token_type_ids": torch.tensor([[token.type for token in row] for row in rows]),
        }
        with torch.no_grad():
            return model(**call, **more, past_key_values=live, use_cache=True).past_key_values
    return feed(model, CACHES[cache](model), [[] for _ in rows], rows, **more)


def expect(cache: str, call) -> None:
    """Right, or refused; and not refused where the cache remembers."""
    refused = is_refused(call)
    assert not (refused and cache in REMEMBERING), "refused, although the cache knows all that is needed"


def cropped(live, rows, length: int):
    removed = len(rows[0]) - length
    live.crop(-removed)
    assert int(live.get_seq_length()) == length
    return live, [row[:length] for row in rows]


# ---- rows that move -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("past", PASTS)
@pytest.mark.parametrize(("cache", "change"), CHANGED)
def test_changed_rows(model, cache, change, past):
    """Positions, padding, borders of sequences and open blocks go with their rows."""
    for next_ in ("one token", "a block and a response"):
        live, rows = CHANGES[change](start(model, cache, PASTS[past]), PASTS[past])
        expect(cache, lambda: feed(model, live, rows, new_rows(rows, next_)))  # noqa: B023


@pytest.mark.parametrize("cache", CACHES)
def test_changed_between_all_calls(model, cache):
    rows = PASTS["ragged"]
    live = start(model, cache, rows)
    for indices, next_ in (([2, 0, 1], "tokens"), ([1, 1, 0], "a block"), ([2, 1, 0], "one token")):
        live, rows = reordered(indices)(live, rows)
        new = new_rows(rows, next_)
        if is_refused(lambda: feed(model, live, rows, new)):  # noqa: B023
            assert cache not in REMEMBERING
            return
        rows = followed_by(rows, new)


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("whole", [False, True])
def test_generate_after_rows_moved(model, cache, whole):
    """With a mask of the caller's own, whose rows moved too."""
    live, rows = reordered([2, 0, 1])(start(model, cache, PASTS["ragged"]), PASTS["ragged"])
    new = [row_of((0, 1), (1, 3), seed=30 + i) for i in range(3)]
    expect(cache, lambda: generate_on(model, live, rows, new, whole=whole))


@pytest.mark.parametrize("change", ["rows turned round", "rows repeated", "one row selected"])
def test_an_open_block_goes_with_its_row(model, change):
    rows = [row_of((1, 6), seed=1), row_of((0, 6), seed=2), row_of((0, 6), seed=3)]
    live, rows = CHANGES[change](start(model, "HrmTextCache", rows), rows)
    new = [row_of((1, 3), seed=40 + i) for i, _ in enumerate(rows)]
    splits = any(row[-1].type == 1 for row in rows)
    twin, _ = CHANGES["deep copy"](live, rows)
    assert is_refused(lambda: feed(model, twin, rows, new)) == splits
    # Only the rows that are in a block refuse to go on with it.
    other = [row_of((0 if row[-1].type else 1, 3), seed=50 + i) for i, row in enumerate(rows)]
    assert not is_refused(lambda: feed(model, live, rows, other))


def test_an_open_envelope_goes_with_its_row(model):
    opened = [row_of((0, 4), seed=1), [Token(6, 0, 0), *row_of((0, 3), seed=2, start=1)]]
    closing = [[Token(30, 0, 0), Token(7, 0, 0)]]
    for kept, refused in ((0, False), (1, True)):
        live = start(model, "HrmTextCache", opened, token_type_ids=None)
        live, rows = selected([kept])(live, opened)
        call = lambda: feed(model, live, rows, closing, token_type_ids=None)  # noqa: E731, B023
        assert is_refused(call) == refused


@pytest.mark.parametrize("cache", ["HrmTextCache", "DynamicCache"])
def test_padding_is_remembered_without_a_mask(model, cache):
    """A caller who leaves the mask out of the second call must not read padding."""
    rows = PASTS["ragged"]
    live = start(model, cache, rows)
    is_refused(lambda: feed(model, live, rows, new_rows(rows, "tokens"), attention_mask=None))


def test_another_number_of_rows(model):
    """A cache of three rows is not continued with another number, by broadcasting or otherwise."""
    for count in (1, 2, 4):
        live = start(model, "HrmTextCache", PASTS["blocks"])
        ids = torch.tensor([[30, 31]] * count)
        with pytest.raises((ValueError, RuntimeError)):
            model(ids, past_key_values=live)


@pytest.mark.parametrize("cache", [name for name in CACHES if name != "StaticCache"])
def test_reset_forgets_everything(model, cache):
    if cache == "QuantizedCache":
        pytest.importorskip("transformers", minversion="5.23")
    live = start(model, cache, PASTS["ragged"])
    live.reset()
    for rows in (PASTS["blocks"], [PASTS["ragged"][1][:5]]):
        live.reset()
        live = start_again(model, live, rows)


def start_again(model, live, rows):
    return feed(model, live, [[] for _ in rows], rows)


@pytest.mark.parametrize("past", PASTS)
def test_a_static_cache_that_is_reset(model, past):
    live = start(model, "StaticCache", PASTS[past])
    live.reset()
    live = start_again(model, live, PASTS["blocks"])
    feed(model, live, PASTS["blocks"], new_rows(PASTS["blocks"], "a block"))


def test_a_cache_that_another_one_was_copied_to(model):
    """Keys and values taken over tensor by tensor carry no facts: plain tokens go on, a block may not."""
    rows = [row_of((0, 3), (1, 4), seed=1)]
    full = start(model, "HrmTextCache", rows)
    for name in ("HrmTextCache", "DynamicCache"):
        for next_ in ([(1, 3)], [(0, 2)], [(0, 1), (1, 3)], [(2, 3)]):
            taken = CACHES[name](model)
            for slot, layer in enumerate(full.layers):
                taken.update(layer.keys.clone(), layer.values.clone(), slot)
            new = [row_of(*next_, seed=9)]
            refused = is_refused(lambda: feed(model, taken, rows, new))  # noqa: B023
            assert refused or next_[0][0] != 1


# ---- caches that are cut --------------------------------------------------------------------------------------------


CROPPED = [name for name in CACHES if name not in ("StaticCache", "QuantizedCache")]
PROMPT = row_of((0, 3), (1, 6), (0, 4), seed=7)  # the block is 3 .. 8
BORDERS = (0, 3, 9, 10, 13)
INSIDE = (4, 6, 8)


@pytest.mark.parametrize("cache", CROPPED)
@pytest.mark.parametrize("length", [*BORDERS, *INSIDE])
def test_what_was_cut_is_served_again(model, cache, length):
    live, rows = cropped(start(model, cache, [PROMPT]), [PROMPT], length)
    rest = [[*PROMPT[length:], *row_of((0, 2), seed=8)]]
    if length in BORDERS:
        feed(model, live, rows, rest)
    else:
        expect(cache, lambda: feed(model, live, rows, rest))


@pytest.mark.parametrize("cache", CROPPED)
@pytest.mark.parametrize("length", BORDERS)
@pytest.mark.parametrize("next_", NEXT)
def test_cut_at_a_border_anything_may_follow(model, cache, length, next_):
    live, rows = cropped(start(model, cache, [PROMPT]), [PROMPT], length)
    feed(model, live, rows, [row_of(*NEXT[next_], seed=9)])


def others(length: int) -> dict[str, list[Token]]:
    """What differs from the rest of the block that was there."""
    rest = PROMPT[length:9]
    first = [Token(rest[0].id + (1 if rest[0].id < 95 else -1), 1, 0), *rest[1:]]
    last = [*rest[:-1], Token(rest[-1].id + (1 if rest[-1].id < 95 else -1), 1, 0)]
    return {
        "another first token": first,
        "another last token": last,
        "another text": row_of((1, len(rest)), seed=11),
        "a longer block": [*rest, *row_of((1, 2), seed=12)],
        "a shorter block": rest[:-1],
        "a shorter block and a response": [*rest[:-1], *row_of((0, 2), seed=12)],
        "a response": row_of((0, 3), seed=13),
        "one token": row_of((0, 1), seed=14),
        "a new block": row_of((2, 3), seed=15),
        "the same tokens, causal": [Token(token.id, 0, 0) for token in rest],
        "the same tokens, as a new block": [Token(rest[0].id, 2, 0), *rest[1:]],
    }


@pytest.mark.parametrize("cache", CROPPED)
@pytest.mark.parametrize("length", INSIDE)
@pytest.mark.parametrize("other", others(4))
def test_cut_in_a_block_anything_else_is_refused(model, cache, length, other):
    new = others(length)[other]
    if not new:
        return
    live, rows = cropped(start(model, cache, [PROMPT]), [PROMPT], length)
    # 3 is the block's first position: the message says that the cache can be cropped to it.
    with pytest.raises(ValueError, match=r"\b3\b" if cache in REMEMBERING else "."):
        feed(model, live, rows, [new])
    # A refusal changes nothing: the right tokens are still served, and after the remedy all others.
    assert int(live.get_seq_length()) == length
    expect(cache, lambda: feed(model, live, rows, [PROMPT[length:9]]))
    live, rows = cropped(live, [PROMPT[: int(live.get_seq_length())]], 3)
    expect(cache, lambda: feed(model, live, rows, [[*PROMPT[3:length], *new]] if new[0].type == 1 else [new]))


@pytest.mark.parametrize("inputs", ["embeddings", "other positions", "inferred"])
def test_cut_in_a_block_and_fed_in_another_way(model, inputs):
    """Embeddings cannot be compared with ids, other positions are other tokens, and inference finds no block here."""
    live, rows = cropped(start(model, "HrmTextCache", [PROMPT]), [PROMPT], 6)
    rest = [PROMPT[6:9]]
    more = {
        "embeddings": {
            "input_ids": None,
            "inputs_embeds": model.get_input_embeddings()(torch.tensor([[token.id for token in rest[0]]])).detach(),
        },
        "other positions": {"position_ids": torch.tensor([[7, 8, 9]])},
        "inferred": {"token_type_ids": None},
    }[inputs]
    if inputs == "embeddings":
        is_refused(lambda: feed(model, live, rows, rest, **more))
    else:
        with pytest.raises(ValueError):
            feed(model, live, rows, rest, **more)


def test_cut_twice_and_moved(model):
    """What was cut goes with its row, and a second cut adds to it."""
    rows = [PROMPT, row_of((0, 1), (1, 9), (0, 3), seed=3), row_of((0, 13), seed=4)]
    full = start(model, "HrmTextCache", rows)
    for change in ("rows turned round", "one row selected", "rows repeated", "deep copy", "pickle", "moved"):
        live, _ = CHANGES["deep copy"](full, rows)
        live, _ = cropped(live, rows, 8)
        live, _ = cropped(live, [row[:8] for row in rows], 6)
        live, order = CHANGES[change](live, rows)
        past = [row[:6] for row in order]
        wrong = [[*row_of((row[6].type, 1), seed=5), *row[7:]] for row in order]
        if any(row[6].type for row in order):
            assert is_refused(lambda: feed(model, live, past, wrong))  # noqa: B023
        assert not is_refused(lambda: feed(model, live, past, [row[6:] for row in order]))  # noqa: B023


def test_the_rest_in_two_calls(model):
    """Half of what was cut is no whole block."""
    live, rows = cropped(start(model, "HrmTextCache", [PROMPT]), [PROMPT], 5)
    assert is_refused(lambda: feed(model, live, rows, [PROMPT[5:7]]))
    assert int(live.get_seq_length()) == 5
    assert not is_refused(lambda: feed(model, live, rows, [PROMPT[5:]]))


def test_positive_crop_is_the_length_to_keep(model):
    live = start(model, "HrmTextCache", [PROMPT])
    live.crop(10)
    assert live.get_seq_length() == 10
    live = feed(model, live, [PROMPT[:10]], [row_of((0, 1), (1, 3), seed=4)])
    live.crop(6)
    assert is_refused(lambda: feed(model, live, [PROMPT[:6]], [row_of((1, 3), seed=5)]))


@pytest.mark.parametrize("padding", [1, 3])
def test_cut_in_a_block_of_a_ragged_batch(model, padding):
    rows = padded_left([row_of((1, 6), seed=1), row_of((1, 6 + padding), seed=2)])
    live, past = cropped(start(model, "HrmTextCache", rows), rows, padding + 4)
    other = [row_of((1, 2), seed=3), row_of((1, 2), seed=4)]
    assert is_refused(lambda: feed(model, live, past, other))
    assert not is_refused(lambda: feed(model, live, past, [row[padding + 4 :] for row in rows]))


def test_regenerating_after_a_repeat(model):
    """One prompt, several continuations on one cache, rolled back in between."""
    rows = [row_of((0, 1), (1, 5), (0, 2), seed=1)]
    live, rows = repeated(start(model, "HrmTextCache", rows), rows)
    for seed in range(3):
        feed(model, live, rows, [row_of((0, 3), seed=seed), row_of((0, 3), seed=seed + 5)])
        live, _ = cropped(live, [[*row, *row[:3]] for row in rows], len(rows[0]))


def ids_that_are_remembered(live) -> list[list[int]]:
    return live.history.facts(0, live.get_seq_length()).ids.tolist()


def test_the_history_moves_with_the_rows_and_goes_with_them(model):
    """Calls would be right without it, since rows are found again by their marks, but each would search for them."""
    live = start(model, "HrmTextCache", PASTS["blocks"])
    ids = ids_that_are_remembered(live)
    live.reorder_cache(torch.tensor([2, 0, 0]))
    assert ids_that_are_remembered(live) == [ids[2], ids[0], ids[0]]
    live.batch_select_indices(torch.tensor([True, False, True]))
    assert ids_that_are_remembered(live) == [ids[2], ids[0]]
    live.batch_repeat_interleave(2)
    assert ids_that_are_remembered(live) == [ids[2], ids[2], ids[0], ids[0]]
    live.reset()
    assert live.history is None


def test_the_history_of_a_cache_of_the_library_moves_with_its_beams(model):
    live = start(model, "DynamicCache", PASTS["blocks"])
    history = live._hrm_text_history
    ids = history.facts(0, 8).ids.tolist()
    model._reorder_cache(live, torch.tensor([1, 1, 0]))
    assert history.facts(0, 8).ids.tolist() == [ids[1], ids[1], ids[0]]


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("floats", [False, True])
def test_padding_that_sees_nothing_under_a_mask_of_the_callers(backend, floats):
    """What it computes must stay finite: a hidden value that is not would reach the real tokens all the same."""
    model = facts_model()
    model.set_attn_implementation(backend)
    ids = torch.tensor([[0, 0, 20, 21, 22]])
    visible = torch.ones(5, 5, dtype=torch.bool).tril()
    visible[:2], visible[:, :2] = False, False
    mask = visible[None, None]
    if floats:
        mask = torch.zeros(1, 1, 5, 5).masked_fill(~mask, float("-inf"))
    positions = torch.tensor([[0, 0, 0, 1, 2]])
    with torch.no_grad():
        logits = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits[:, 2:]
        wanted = model(ids[:, 2:], token_type_ids=torch.zeros(1, 3, dtype=torch.long), use_cache=False).logits
    assert (logits - wanted).abs().max() < 1e-4
