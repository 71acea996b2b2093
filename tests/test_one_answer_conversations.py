"""Conversations on a live cache: what came first never depends on what follows, and no block is split over calls."""

from __future__ import annotations

import copy

import pytest
import torch

from .harness import CONVERSATION, ONE_BLOCK, Row, dynamic, growing, make_row, padded, reference_logits, static
from .one_answer_models import one_answer_model


CACHES = {"growing": growing, "DynamicCache": dynamic, "StaticCache": static}
BLOCK = ONE_BLOCK[0]


@pytest.fixture(scope="module")
def model():
    return one_answer_model()


@pytest.fixture(params=CACHES)
def cache(request):
    return CACHES[request.param]


def call(model, row: Row, live, **more):
    ids, types = torch.tensor([row.ids]), torch.tensor([row.types])
    with torch.no_grad():
        return model(input_ids=ids, token_type_ids=types, past_key_values=live, use_cache=True, **more)


def test_layouts_tell_apart(model):
    """The weights of these tests are such that a wrong layout shows."""
    row = CONVERSATION[0]
    for wrong in ((0,) * len(row), (1,) * len(row), (*row.types[:5], 1, *row.types[6:])):
        difference = reference_logits(model, row) - reference_logits(model, Row(row.ids, wrong))
        assert difference.abs().max() > 0.05


def test_first_turn_does_not_read_the_second(model):
    row = CONVERSATION[0]
    alone, changed = row[:8], row[:8].followed_by(make_row((1, 6), seed=1).ids, 1)
    expected = reference_logits(model, alone)
    torch.testing.assert_close(reference_logits(model, row)[:8], expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(reference_logits(model, changed)[:8], expected, atol=1e-5, rtol=1e-5)


def test_extending_an_open_block_is_refused(model, cache):
    live = call(model, BLOCK[:4], cache(model)).past_key_values
    with pytest.raises(ValueError, match="prefix block"):
        call(model, BLOCK[4:], live)


def test_extending_an_open_block_in_generate_is_refused(model, cache):
    live = call(model, BLOCK[:4], cache(model)).past_key_values
    with pytest.raises(ValueError, match="prefix block"):
        model.generate(**padded([BLOCK]), past_key_values=live, max_new_tokens=2)
    # The new tokens alone, with types of their own.
    live = call(model, BLOCK[:4], cache(model)).past_key_values
    with pytest.raises(ValueError, match="prefix block"):
        model.generate(
            torch.tensor([BLOCK.ids[4:]]),
            token_type_ids=torch.tensor([BLOCK.types[4:]]),
            attention_mask=torch.ones(1, 7, dtype=torch.long),
            past_key_values=live,
            max_new_tokens=2,
        )


def test_extending_an_open_block_in_one_row_of_a_batch_is_refused(model, cache):
    rows = [make_row((0, 2), (1, 4)), make_row((1, 4), (0, 2))]
    first, second = (padded([row[:5] for row in rows]), padded([row[5:] for row in rows]))
    live = model(**first, past_key_values=cache(model), use_cache=True).past_key_values
    second["attention_mask"] = torch.ones(2, 6, dtype=torch.long)
    with pytest.raises(ValueError, match="prefix block"):
        model(**second, past_key_values=live)


def test_a_response_after_an_open_block_is_served(model, cache):
    row = make_row((1, 6), (0, 4))
    live = call(model, row[:6], cache(model)).past_key_values
    logits = call(model, row[6:], live).logits[0]
    torch.testing.assert_close(logits, reference_logits(model, row)[6:], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["growing", "DynamicCache"])
def test_cropping_forgets_the_block(model, name):
    """The end of a block, cropped away and fed again, is the same block."""
    live = call(model, BLOCK, CACHES[name](model)).past_key_values
    live.crop(-2)
    assert live.get_seq_length() == 5
    logits = call(model, BLOCK[5:], live).logits[0]
    torch.testing.assert_close(logits, reference_logits(model, BLOCK)[5:], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["growing", "StaticCache"])
def test_resetting_forgets_the_block(model, name):
    live = call(model, BLOCK[:4], CACHES[name](model)).past_key_values
    live.reset()
    logits = call(model, BLOCK, live).logits[0]
    torch.testing.assert_close(logits, reference_logits(model, BLOCK), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["growing", "DynamicCache"])
def test_repeated_rows_remember_the_block(model, name):
    live = call(model, BLOCK[:4], CACHES[name](model)).past_key_values
    live.batch_repeat_interleave(2)
    ids = torch.tensor([BLOCK.ids[4:]] * 2)
    with pytest.raises(ValueError, match="prefix block"):
        model(input_ids=ids, token_type_ids=torch.ones_like(ids), past_key_values=live)


def test_regenerating_from_a_cropped_cache(model):
    """Crop back to the prompt less one token, as regenerating an answer does, and ask again."""
    batch = padded([BLOCK])
    options = {"max_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    first = model.generate(**batch, **options)
    live = first.past_key_values
    live.crop(len(BLOCK) - 1 - live.get_seq_length())
    again = model.generate(**batch, past_key_values=live, **options)
    assert again.sequences.tolist() == first.sequences.tolist()
    torch.testing.assert_close(torch.stack(again.logits), torch.stack(first.logits), atol=1e-4, rtol=1e-4)


def test_a_shared_prefix_is_not_changed_by_its_copies(model):
    """Several continuations of one cache, each on a copy."""
    system = make_row((1, 5), (0, 3))
    shared = call(model, system, None).past_key_values
    for seed in (1, 2):
        turn = make_row((1, 4), seed=seed)
        whole = system.followed_by(turn.ids, 1)
        output = model.generate(
            **padded([whole]),
            past_key_values=copy.deepcopy(shared),
            max_new_tokens=3,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
        row = whole.followed_by(output.sequences[0, len(whole) :].tolist())
        expected = reference_logits(model, row)[len(whole) - 1 : -1]
        torch.testing.assert_close(torch.cat(output.logits), expected, atol=1e-4, rtol=1e-4)


# ---- envelopes that the model finds itself --------------------------------------------------------------------------


BOS, END = 6, 7
ENVELOPE = {"prefix_end_token_id": END}


def envelope(*text: int) -> list[int]:
    return [BOS, *text, END]


@pytest.fixture(scope="module")
def inferring():
    return one_answer_model(**ENVELOPE)


def as_row(ids: list[int], *blocks: tuple[int, int]) -> Row:
    inside = [any(begin <= i < end for begin, end in blocks) for i in range(len(ids))]
    return Row(tuple(ids), tuple(int(value) for value in inside))


def test_inferred_blocks(inferring):
    ids = [*envelope(30, 31, 32), 40, 41, 11, *envelope(33, 34), 42]
    row = as_row(ids, (0, 5), (8, 12))
    with torch.no_grad():
        logits = inferring(torch.tensor([ids])).logits[0]
    torch.testing.assert_close(logits, reference_logits(inferring, row), atol=1e-5, rtol=1e-5)


def test_explicit_types_win_over_inferred_ones(inferring):
    ids = torch.tensor([envelope(30, 31, 32)])
    causal = inferring.generate(
        ids,
        token_type_ids=torch.zeros_like(ids),
        max_new_tokens=1,
        return_dict_in_generate=True,
        output_logits=True,
        do_sample=False,
    )
    expected = reference_logits(inferring, Row(tuple(ids[0].tolist()), (0,) * 5))[-1]
    torch.testing.assert_close(causal.logits[0][0], expected, atol=1e-4, rtol=1e-4)


GENERATE = {
    "default": {},
    "without cache": {"use_cache": False},
    "static": {"cache_implementation": "static"},
    "beams": {"num_beams": 2},
    "chunks": {"prefill_chunk_size": 2},
    "prompt lookup": {"prompt_lookup_num_tokens": 2},
    "assisted by itself": {"assistant_model": None},
}


@pytest.mark.parametrize("mode", GENERATE)
def test_generate_infers_once(inferring, mode):
    """Generated tokens are never prefix, not even where they spell an envelope."""
    options = dict(GENERATE[mode])
    if "assistant_model" in options:
        options["assistant_model"] = inferring
    prompt = envelope(30, 31, 30, 31)
    forced = envelope(30, 31)
    output = inferring.generate(
        torch.tensor([prompt]),
        max_new_tokens=len(forced) + 2,
        do_sample=False,
        eos_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
        prefix_allowed_tokens_fn=lambda _, ids: forced[len(ids) - 6 : len(ids) - 5] or list(range(20, 96)),
        **options,
    )
    sequence = output.sequences[0].tolist()
    assert sequence[:10] == prompt + forced
    row = as_row(sequence, (0, 6))
    expected = reference_logits(inferring, row)[5:-1]
    logits = torch.stack([step[0] for step in output.logits])
    if mode != "beams":
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    allowed = torch.zeros(96, dtype=torch.bool).index_fill(0, torch.arange(20, 96), True)
    if mode != "beams":
        best = expected[4:].masked_fill(~allowed, -torch.inf).argmax(dim=-1)
        assert best.tolist() == sequence[10:]


@pytest.mark.parametrize("new_only", [False, True])
@pytest.mark.parametrize("name", CACHES)
def test_inferred_conversation(inferring, name, new_only):
    options = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    # A pad token in the first answer would be padding to `generate` when the text comes again; weights, and with them
    # the answer, differ between releases of torch.
    options["suppress_tokens"] = list(range(12))
    live = CACHES[name](inferring)
    first = envelope(30, 31, 32)
    one = inferring.generate(torch.tensor([first]), **options, **({} if live is None else {"past_key_values": live}))
    whole = [*one.sequences[0].tolist(), *envelope(33, 34)]
    held = len(first) + 3
    given = torch.tensor([whole[held:] if new_only else whole])
    two = inferring.generate(given, past_key_values=one.past_key_values, **options)
    generated = two.sequences[0, given.shape[1] :].tolist()
    row = as_row(whole + generated, (0, 5), (9, 13))
    expected = reference_logits(inferring, row)[len(whole) - 1 : -1]
    torch.testing.assert_close(torch.cat(two.logits), expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_closing_an_envelope_of_the_cache_is_refused(inferring, cache):
    opened, rest = [BOS, 30, 31], [32, END]
    live = inferring(torch.tensor([opened]), past_key_values=cache(inferring), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="envelope"):
        inferring(torch.tensor([rest]), past_key_values=copy.deepcopy(live))
    with pytest.raises(ValueError, match="prefix block"):
        inferring.generate(torch.tensor([opened + rest]), past_key_values=copy.deepcopy(live), max_new_tokens=2)
    with pytest.raises(ValueError, match="envelope"):
        inferring.generate(torch.tensor([rest]), past_key_values=copy.deepcopy(live), max_new_tokens=2)


def test_an_envelope_around_an_answer_is_refused(inferring):
    """The first prompt was never closed, so the whole conversation would be one block, answer and all."""
    options = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True}
    one = inferring.generate(torch.tensor([[BOS, 30, 31]]), **options)
    whole = torch.tensor([[*one.sequences[0].tolist(), 32, END]])
    with pytest.raises(ValueError, match="prefix block"):
        inferring.generate(whole, past_key_values=one.past_key_values, **options)
