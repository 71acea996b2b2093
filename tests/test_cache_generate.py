"""`generate` on a live cache: what is whole and what is new, and prefixes that are shared in part."""

from __future__ import annotations

import copy

import pytest
import torch

from .facts import (
    BOS,
    CACHES,
    END,
    GREEDY,
    REMEMBERING,
    Token,
    facts_model,
    feed,
    followed_by,
    generate_on,
    is_refused,
    padded_left,
    row_of,
    truth,
)


CROPPED = ("HrmTextCache", "DynamicCache")
PAST = row_of((1, 4), (0, 2), seed=1)
RAGGED = padded_left([row_of((1, 3), (0, 1), seed=2), row_of((1, 4), (0, 2), seed=3)])


@pytest.fixture(scope="module")
def model():
    return facts_model()


def expect(cache: str, call) -> None:
    refused = is_refused(call)
    assert not (refused and cache in REMEMBERING), "refused, although the cache knows all that is needed"


def envelope(*text: int) -> list[Token]:
    """An envelope with the types that the model infers."""
    ids = [BOS, *text, END]
    return [Token(id_, 1, i) for i, id_ in enumerate(ids)]


def tokenizer_mask(new) -> torch.Tensor:
    """What a tokenizer returns beside the ids of the new turn: it knows nothing of a cache."""
    return torch.tensor([[int(token.real) for token in row] for row in new])


# ---- only the new ids -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", ["tokenizer's", "whole", "none"])
@pytest.mark.parametrize("length", [3, 6, 7, 15])
@pytest.mark.parametrize("cache", CACHES)
def test_new_ids_of_any_length(model, cache, length, mask):
    """Shorter than the cache of 6, as long, and longer, whatever mask stands beside them."""
    live = feed(model, CACHES[cache](model), [[]], [PAST])
    new = [row_of((1, length), seed=5)]
    more = {
        "tokenizer's": {"attention_mask": tokenizer_mask(new)},
        "whole": {"attention_mask": torch.ones(1, len(PAST) + length, dtype=torch.long)},
        "none": {"attention_mask": None},
    }[mask]
    expect(cache, lambda: generate_on(model, live, [PAST], new, whole=False, **more))


@pytest.mark.parametrize("types", [False, True])
@pytest.mark.parametrize("cache", CACHES)
def test_the_next_turn_as_a_chat_gives_it(model, cache, types):
    """Envelopes alone, found by the model or spelled out, three turns long, each longer than what went before."""
    live, rows = CACHES[cache](model), [[]]
    for turn, length in enumerate((2, 8, 30)):
        ids = [token.id for token in row_of((1, length), seed=60 + turn)]
        new = [envelope(*ids)]
        call = (model, live, rows, new, 3)
        more = {"whole": False, "types": types, "attention_mask": tokenizer_mask(new)}
        if is_refused(lambda: results.append(generate_on(*call, **more))):  # noqa: B023
            assert cache not in REMEMBERING
            return
        live, rows = results.pop()
        # The last generated token is not in the cache yet: the caller feeds it with the next turn, or leaves it out.


results: list = []


@pytest.mark.parametrize("cache", CACHES)
def test_new_ids_of_a_ragged_batch(model, cache):
    live = feed(model, CACHES[cache](model), [[], []], RAGGED)
    new = padded_left([row_of((1, 9), seed=6), row_of((0, 1), (1, 6), seed=7)])
    for mask in (tokenizer_mask(new), None):
        if mask is None:
            new = [row[2:] for row in new]
        again = copy.deepcopy(live)
        if cache in REMEMBERING:
            # The padding of the new part is in the mask, or there is none.
            expect(cache, lambda: generate_on(model, again, RAGGED, new, whole=False, attention_mask=mask))  # noqa: B023
        else:
            is_refused(lambda: generate_on(model, again, RAGGED, new, whole=False, attention_mask=mask))  # noqa: B023


@pytest.mark.parametrize("cache", CACHES)
def test_new_ids_on_a_cache_of_embeddings(model, cache):
    """Ids of the past are unknown, so that nothing tells the whole from the new."""
    embeds = model.get_input_embeddings()(torch.tensor([[token.id for token in PAST]])).detach()
    live = feed(model, CACHES[cache](model), [[]], [PAST], input_ids=None, inputs_embeds=embeds)
    for length in (3, 15):
        for mask in (None, torch.ones(1, length, dtype=torch.long)):
            again, new = copy.deepcopy(live), [row_of((1, length), seed=5)]
            is_refused(lambda: generate_on(model, again, [PAST], new, whole=False, attention_mask=mask))  # noqa: B023
    expect(cache, lambda: feed(model, live, [PAST], [row_of((1, 7), seed=5)]))


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_both_names_of_the_cache(model, name):
    """Newer releases of transformers call the argument `cache`; the layout is read by either name."""
    live, rows = generate_on(model, CACHES["HrmTextCache"](model), [[]], [PAST])
    more = {name: live, **({"past_key_values": None} if name == "cache" else {})}
    generate_on(model, live, rows, [row_of((0, 1), (1, 4), seed=5)], **more)


def test_new_ids_on_a_foreign_cache(model):
    """Keys without ids: longer input could be either."""
    full = feed(model, CACHES["HrmTextCache"](model), [[]], [PAST])
    for name in ("HrmTextCache", "DynamicCache"):
        foreign = CACHES[name](model)
        for slot, layer in enumerate(full.layers):
            foreign.update(layer.keys.clone(), layer.values.clone(), slot)
        new = [row_of((1, 15), seed=5)]
        is_refused(lambda: generate_on(model, foreign, [PAST], new, whole=False, attention_mask=tokenizer_mask(new)))  # noqa: B023


# ---- the whole conversation -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("types", ["whole", "new", "none"])
@pytest.mark.parametrize("cache", CACHES)
def test_the_whole_conversation(model, cache, types):
    first = envelope(30, 31, 32)
    live, rows = generate_on(model, CACHES[cache](model), [[]], [first], steps=4)
    new = [[Token(40, 0, 0), *envelope(33, 34)]]
    more = {"types": types != "none"}
    if types == "new":
        more["token_type_ids"] = torch.tensor([[token.type for token in new[0]]])
    expect(cache, lambda: generate_on(model, live, rows, new, **more))


@pytest.mark.parametrize("cache", CROPPED)
@pytest.mark.parametrize("length", [0, 3, 4, 6, 8, 9, 11, 13])
@pytest.mark.parametrize("same", [True, False])
def test_a_conversation_on_a_cropped_cache(model, cache, length, same):
    """The block at 3 .. 8 is cut anywhere, and goes on as it did or otherwise: `generate` finds what is usable."""
    prompt = row_of((0, 3), (1, 6), (0, 4), seed=7)
    live = feed(model, CACHES[cache](model), [[]], [prompt])
    live.crop(length - len(prompt))
    rest = [*prompt[length:], *row_of((0, 1), seed=8)] if same else row_of(*rest_of(length), seed=9)
    expect(cache, lambda: generate_on(model, live, [prompt[:length]], [rest]))


@pytest.mark.parametrize("cache", CROPPED)
@pytest.mark.parametrize("length", [2, 6])
def test_what_is_read_again_keeps_its_positions(model, cache, length):
    """Positions begin at 4 and the crop cuts a block that goes on otherwise: the calls after it count from there."""

    def from_four(start: int, new: list[Token]) -> torch.Tensor:
        return 4 + start + torch.arange(len(new))[None]

    prompt, end = row_of((1, 4), (0, 1), (1, 3), seed=7), row_of((1, 3), (0, 1), seed=8)
    live = feed(model, CACHES[cache](model), [[]], [prompt], position_ids=from_four(0, prompt))
    live.crop(length - len(prompt))
    live, held = generate_on(model, live, [prompt[:length]], [row_of((1, 2), (0, 2), seed=9)])
    feed(model, live, held, [end], position_ids=from_four(len(held[0]), end))


@pytest.mark.parametrize("cache", CROPPED)
def test_an_inferred_block_that_is_read_again_beside_given_types(model, cache):
    """Its tokens would count as stated from then on, and an envelope that opens among them would be forgotten."""
    prompt, new = envelope(40, 41), row_of((0, 2), seed=9)
    live = feed(model, CACHES[cache](model), [[]], [prompt], token_type_ids=None)
    live.crop(2 - len(prompt))
    ids = torch.tensor([[token.id for token in (*prompt[:2], *new)]])
    with pytest.raises(ValueError, match="for the whole conversation, or not at all"):
        model.generate(ids, token_type_ids=torch.zeros(1, 2, dtype=torch.long), past_key_values=live, **GREEDY)
    assert live.get_seq_length() == 2
    generate_on(model, live, [prompt[:2]], [new])


def rest_of(length: int) -> list[tuple[int, int]]:
    return [(1, 4), (0, 2)] if 3 < length < 9 else [(0, 2), (1, 3)]


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("at", [0, 2, 3, 5, 8, 9, 11])
def test_an_edited_conversation(model, cache, at):
    """The caller gives a text that differs from the cached one: the answer is that of the text that was given."""
    prompt = row_of((0, 3), (1, 6), (0, 4), seed=7)
    live = feed(model, CACHES[cache](model), [[]], [prompt])
    edited = list(prompt)
    edited[at] = Token(21 if prompt[at].id != 21 else 22, prompt[at].type, prompt[at].position)
    edited += row_of((0, 2), seed=8, start=13)
    is_refused(lambda: generate_on(model, live, [[]], [edited]))


@pytest.mark.parametrize("cache", CROPPED)
def test_a_shared_system_prompt(model, cache):
    """System and user text share an envelope: the next user of the cache has another rest of it."""
    system = [40, 41, 42, 43]
    live, _ = generate_on(model, CACHES[cache](model), [[]], [envelope(*system, 50, 51)], types=False)
    live.crop(5 - int(live.get_seq_length()))  # bos and system
    expect(cache, lambda: generate_on(model, live, [[]], [envelope(*system, 60, 61, 62)], types=False))


@pytest.mark.parametrize("edited", ["types", "rows"])
def test_another_layout_of_the_same_tokens(model, edited):
    """Types that contradict what is cached, and rows in another order than the cache's."""
    rows = [row_of((1, 4), (0, 3), seed=1), row_of((1, 4), (0, 3), seed=2)]
    live = feed(model, CACHES["HrmTextCache"](model), [[], []], rows)
    if edited == "types":
        rows = [[Token(token.id, 0, token.position) for token in row] for row in rows]
    else:
        rows = rows[::-1]
    whole = followed_by(rows, [row_of((0, 2), seed=3), row_of((0, 2), seed=4)])
    is_refused(lambda: generate_on(model, live, [[], []], whole))


def test_a_cache_that_holds_more_than_the_conversation(model):
    """A caller who goes back a turn without cropping."""
    live, rows = generate_on(model, CACHES["HrmTextCache"](model), [[]], [row_of((1, 5), seed=1)], steps=5)
    is_refused(lambda: generate_on(model, live, [[]], [rows[0][:6]]))


# ---- what `generate` leaves -----------------------------------------------------------------------------------------


WAYS = {
    "greedy": {},
    "beams": {"num_beams": 2},
    "sampling": {"do_sample": True},
    "chunks": {"prefill_chunk_size": 2},
    "prompt lookup": {"prompt_lookup_num_tokens": 2},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("cache", ["HrmTextCache", "DynamicCache"])
def test_a_forward_after_generate(model, cache, way):
    """The facts of what `generate` appended: ids, positions, and that none of it is a block."""
    prompt = row_of((0, 2), (1, 5), seed=1)
    call = {"input_ids": torch.tensor([[token.id for token in prompt]])}
    call["token_type_ids"] = torch.tensor([[token.type for token in prompt]])
    options = {**GREEDY, "max_new_tokens": 4, **WAYS[way]}
    output = model.generate(**call, past_key_values=CACHES[cache](model), **options)
    live, ids = output.past_key_values, output.sequences[0].tolist()
    held = int(live.get_seq_length())
    rows = [[*prompt, *(Token(id_, 0, i) for i, id_ in enumerate(ids) if i >= len(prompt))][:held]]
    if way == "beams":
        best = output.beam_indices[0, 0]
        is_refused(lambda: generate_on(model, live, rows * 2, [row_of((0, 1), (1, 3), seed=2)] * 2) and best)
        return
    expect(cache, lambda: feed(model, live, rows, [row_of((1, 3), (0, 2), seed=2)]))


def test_a_refused_generate_changes_nothing(model):
    live = feed(model, CACHES["HrmTextCache"](model), [[]], [PAST])
    for wrong in ({"token_type_ids": torch.ones(1, 2, dtype=torch.long)}, {"prefill_chunk_size": 0}):
        ids = torch.tensor([[token.id for token in [*PAST, *PAST]]])
        with pytest.raises(ValueError):
            model.generate(ids, past_key_values=live, max_new_tokens=2, **wrong)
        assert live.get_seq_length() == len(PAST)
    feed(model, live, [PAST], [row_of((1, 3), seed=4)])


def test_the_truth_is_sensitive(model):
    """A merged block, a causal reading, and another position each change the truth a thousand times the tolerance."""
    row = [*row_of((1, 4), seed=1), *row_of((2, 4), seed=2, start=4)]
    right = truth(model, [row])
    for wrong in (
        [Token(token.id, min(token.type, 1), token.position) for token in row],
        [Token(token.id, 0, token.position) for token in row],
        [Token(token.id, token.type, token.position + (i > 3)) for i, token in enumerate(row)],
    ):
        assert (truth(model, [wrong]) - right).abs().max() > 0.01


# ---- what others wrote ----------------------------------------------------------------------------------------------


def foreign_cache(model, rows):
    """Keys and values of these rows in a cache that does not say what they were."""
    live, taken = feed(model, CACHES["HrmTextCache"](model), [[] for _ in rows], rows), CACHES["DynamicCache"](model)
    for slot, layer in enumerate(live.layers):
        taken.update(layer.keys.clone(), layer.values.clone(), slot)
    return taken


def test_a_block_behind_what_others_wrote(model):
    """It may have begun there, whether it is the first thing to follow or comes after a crop back to there."""
    history, causal = row_of((0, 2), (1, 3), seed=1), row_of((0, 3), seed=2)
    live = feed(model, foreign_cache(model, [history]), [history], [causal])
    live.crop(-len(causal))
    rest = row_of((1, 2), (0, 1), seed=3)
    assert is_refused(lambda: feed(model, live, [history], [rest]))
    opened = [Token(rest[0].id, 2, 0), *rest[1:]]
    feed(model, live, [history], [opened])


def test_an_envelope_that_may_have_opened_in_what_others_wrote(model):
    """Its closing token comes in the second call behind it, in which everything seems to be known."""
    history = [Token(BOS, 0, 0), Token(40, 0, 1)]
    live = foreign_cache(model, [history])
    live = feed(model, live, [history], [[Token(41, 0, 2)]], token_type_ids=None)
    with pytest.raises(ValueError, match="closes a prompt envelope"):
        model(torch.tensor([[42, END, 50]]), past_key_values=live, use_cache=True)
