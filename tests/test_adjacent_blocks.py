"""Two envelopes with nothing between them are two blocks: found by the model, spelled by type 2, in every mode."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoTokenizer

from .facts import (
    BOS,
    CACHES,
    END,
    TOLERANCE,
    Token,
    facts_model,
    feed,
    generate_on,
    is_refused,
    padded_left,
    row_of,
    truth,
)
from .tiny import ROOT


IMPLEMENTATIONS = ["eager", "sdpa", "flex_attention"]
# Layouts as types: 1 is of a block, 2 opens one right after another, everything else is causal.
TYPES = {
    "two blocks": (1, 1, 1, 2, 1, 1),
    "three blocks": (1, 1, 2, 1, 2, 1, 0, 0),
    "blocks of one token": (1, 2, 2, 0, 1, 2),
    "2 opens the row": (2, 1, 1, 0, 0),
    "2 after a response": (1, 1, 0, 2, 1, 1),
    "a block of one 2": (0, 2, 0, 0),
}


@pytest.fixture(scope="module")
def model():
    return facts_model()


def typed(types: tuple[int, ...], seed: int = 1, start: int = 0) -> list[Token]:
    ids = row_of((0, len(types)), seed=seed)
    return [Token(token.id, type_, start + i) for i, (token, type_) in enumerate(zip(ids, types))]


def envelopes(*lengths: int) -> list[Token]:
    """Envelopes one after another, and the types that are inferred."""
    row: list[Token] = []
    for length in lengths:
        text = [token.id for token in row_of((1, length), seed=len(row) + 3)]
        for i, id_ in enumerate([BOS, *text, END]):
            row.append(Token(id_, 2 if i == 0 and row else 1, len(row)))
    return row


def plain(model, rows, **call):
    """One uncached forward, compared with the truth, which eager attention may tell of all backends."""
    call = {
        "input_ids": torch.tensor([[token.id for token in row] for row in rows]),
        "token_type_ids": torch.tensor([[token.type for token in row] for row in rows]),
        "attention_mask": torch.tensor([[int(token.real) for token in row] for row in rows]),
        **call,
    }
    with torch.no_grad():
        logits = model(**{name: value for name, value in call.items() if value is not None}, use_cache=False).logits
    real = torch.tensor([[token.real for token in row] for row in rows])
    implementation = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        wanted = truth(model, rows)
    finally:
        model.set_attn_implementation(implementation)
    assert (logits - wanted).abs()[real].max() < TOLERANCE


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("layout", TYPES)
def test_explicit_types(layout, implementation):
    model = facts_model(attn_implementation=implementation, H_cycles=1)
    plain(model, [typed(TYPES[layout])])


def test_zero_and_one_mean_what_they_meant(model):
    for types in ((1, 1, 1, 1), (0, 0, 0), (0, 1, 1, 0, 1), (3, 1, 1, -1, 1)):
        row = typed(types)
        meant = [Token(token.id, int(token.type == 1), token.position) for token in row]
        with torch.no_grad():
            logits = model(torch.tensor([[token.id for token in row]]), token_type_ids=torch.tensor([types])).logits
        assert (logits - truth(model, [meant])).abs().max() < TOLERANCE


def test_a_ragged_batch_of_them_all(model):
    rows = padded_left([typed(types, seed=i) for i, types in enumerate(TYPES.values())])
    plain(model, rows)


def test_padding_between_two_blocks(model):
    hole = Token(5, 0, 0, real=False)
    for at in (2, 3):
        row = typed((1, 1, 1, 2, 1, 1))
        plain(model, [[*row[:at], hole, hole, *row[at:]]], position_ids=None)


def test_two_blocks_in_packed_rows(model):
    row = [*typed((1, 1, 2, 1)), *typed((1, 1, 0), seed=2), *typed((2, 1, 2, 0), seed=3)]
    plain(model, [row], position_ids=torch.tensor([[token.position for token in row]]), attention_mask=None)


@pytest.mark.parametrize("lengths", [(3, 2), (1, 4, 2), (0, 0), (5, 0, 3)])
def test_inferred(model, lengths):
    plain(model, [envelopes(*lengths)], token_type_ids=None)


def test_inferred_with_a_response_between_and_padding(model):
    first = envelopes(2, 3)
    row = [*first, *row_of((0, 2), seed=4, start=9), *(Token(t.id, t.type, 11 + t.position) for t in envelopes(1, 1))]
    plain(model, padded_left([row, envelopes(4, 1)]), token_type_ids=None)


@pytest.mark.parametrize("types", [False, True])
@pytest.mark.parametrize("cache", CACHES)
def test_a_block_right_after_a_cached_one(model, cache, types):
    """A new block may follow a cached one: only going on with that one is refused."""
    both = envelopes(3, 4)
    more = {} if types else {"token_type_ids": None}
    live = feed(model, CACHES[cache](model), [[]], [both[:5]], **more)
    assert not is_refused(lambda: feed(model, live, [both[:5]], [both[5:]], **more))


@pytest.mark.parametrize("cache", CACHES)
def test_an_inferred_block_after_a_stated_one(model, cache):
    """Right or refused: the ids of what was stated are not read for envelopes."""
    both = envelopes(3, 4)
    live = feed(model, CACHES[cache](model), [[]], [both[:5]])
    is_refused(lambda: feed(model, live, [both[:5]], [both[5:]], token_type_ids=None))


@pytest.mark.parametrize("cache", CACHES)
def test_a_block_of_type_1_after_a_cached_one_goes_on_with_it(model, cache):
    live = feed(model, CACHES[cache](model), [[]], [row_of((1, 4), seed=1)])
    with pytest.raises(ValueError, match="block"):
        feed(model, live, [row_of((1, 4), seed=1)], [row_of((1, 3), seed=2)])


GENERATE = {
    "default": {},
    "static": {"cache_implementation": "static"},
    "without cache": {"use_cache": False},
    **{f"chunks of {size}": {"prefill_chunk_size": size} for size in (1, 2, 3, 5, 6, 7)},
    "prompt lookup": {"prompt_lookup_num_tokens": 2},
}


@pytest.mark.parametrize("mode", GENERATE)
@pytest.mark.parametrize("types", [False, True])
def test_generate(model, mode, types):
    """Chunks may be cut between the two blocks, and nowhere inside them."""
    generate_on(model, None, [[]], [[*envelopes(3, 2, 1), *row_of((0, 2), seed=9)]], types=types, **GENERATE[mode])


def test_generate_a_ragged_batch(model):
    rows = padded_left([envelopes(3, 2), envelopes(1, 4), envelopes(6)])
    for more in ({}, {"prefill_chunk_size": 3}, {"num_beams": 1, "cache_implementation": "static"}):
        for types in (False, True):
            generate_on(model, None, [[], [], []], rows, types=types, **more)


@pytest.mark.parametrize("cache", CACHES)
def test_a_conversation_of_two_blocks(model, cache):
    live, rows = generate_on(model, CACHES[cache](model), [[]], [envelopes(2, 2)], types=False)
    new = [[Token(t.id, t.type, 0) for t in envelopes(1, 3)]]
    is_refused(lambda: generate_on(model, live, rows, new, types=False))


def test_embeddings(model):
    row = typed(TYPES["two blocks"])
    embeds = model.get_input_embeddings()(torch.tensor([[token.id for token in row]])).detach()
    plain(model, [row], input_ids=None, inputs_embeds=embeds)


def test_training(model):
    """The loss and its gradient follow the two blocks."""
    trained = facts_model().train()
    row = [*typed(TYPES["two blocks"]), *row_of((0, 3), seed=5, start=6)]
    ids = torch.tensor([[token.id for token in row]])
    labels = ids.clone()
    labels[:, :6] = -100
    wanted = torch.nn.functional.cross_entropy(truth(trained, [row])[0, 5:-1], ids[0, 6:])
    loss = trained(ids, token_type_ids=torch.tensor([[token.type for token in row]]), labels=labels).loss
    torch.testing.assert_close(loss.detach(), wanted, atol=TOLERANCE, rtol=TOLERANCE)


def test_the_tokenizer_says_the_same():
    """Its types are what the model would infer, a 2 where the second envelope opens and nowhere else."""
    tokenizer = AutoTokenizer.from_pretrained(ROOT, trust_remote_code=True)
    one, two = "What is 2 + 2?", "And 3 + 3?"
    text = f"<|im_start|>{one}<|im_end|><|im_start|>{two}<|im_end|>4<|box_end|><|im_start|>{one}<|im_end|>"
    encoded = tokenizer(text)
    ids, types = encoded["input_ids"], encoded["token_type_ids"]
    opening = [i for i, id_ in enumerate(ids) if id_ == BOS]
    assert [types[i] for i in opening] == [1, 2, 1]
    assert sum(type_ == 2 for type_ in types) == 1 and set(types) == {0, 1, 2}
