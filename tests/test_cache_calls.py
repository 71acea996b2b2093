"""One cache, fed in every way that a call can be made: compiled, under inference mode, by position, by embeddings."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from transformers import DynamicCache, EncoderDecoderCache

from .facts import (
    CACHES,
    CHANGES,
    REMEMBERING,
    TOLERANCE,
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


BLOCK = row_of((1, 6), seed=1)
ROWS = padded_left([row_of((1, 3), (0, 1), seed=2), row_of((1, 4), (0, 2), seed=3), row_of((0, 6), seed=4)])
# The library's static slots write in place, which torch forbids outside of inference mode to tensors made inside it.
GROWING = [name for name in CACHES if name != "StaticCache"]


@pytest.fixture(scope="module")
def model():
    return facts_model()


def expect(cache: str, call) -> None:
    refused = is_refused(call)
    assert not (refused and cache in REMEMBERING), "refused, although the cache knows all that is needed"


# ---- 3: compiled ----------------------------------------------------------------------------------------------------


@pytest.fixture
def compiled() -> Iterator:
    torch._dynamo.reset()
    model = facts_model(H_cycles=1)
    yield model, torch.compile(model, backend="eager")
    torch._dynamo.reset()


def wrong_or_refused(plain, live, call_model, history, new, **more) -> bool:
    """Whether the call is refused; an answer must be right by the plain model's truth."""
    call = {**arguments_of(new, history), **more}
    call = {name: value for name, value in call.items() if value is not None}
    try:
        with torch.no_grad():
            logits = call_model(**call, past_key_values=live, use_cache=True).logits
    except ValueError:
        return True
    except RuntimeError as refusal:
        # Within a graph nothing can be read: what would be refused stops the graph, with the same sentence.
        assert "prefix block" in str(refusal), refusal
        return True
    wanted = truth(plain, followed_by(history, new))[:, -len(new[0]) :]
    assert (logits - wanted).abs().max() < TOLERANCE
    return False


@pytest.mark.parametrize("first", ["compiled", "plain"])
@pytest.mark.parametrize("cache", ["HrmTextCache", "DynamicCache", "StaticCache"])
def test_half_a_block_and_then_the_rest(compiled, cache, first):
    model, fast = compiled
    live = CACHES[cache](model)
    assert not wrong_or_refused(model, live, fast if first == "compiled" else model, [[]], [BLOCK[:3]])
    assert wrong_or_refused(model, live, model if first == "compiled" else fast, [BLOCK[:3]], [BLOCK[3:]])


def test_half_a_block_and_then_the_rest_both_compiled(compiled):
    model, fast = compiled
    live = CACHES["HrmTextCache"](model)
    wrong_or_refused(model, live, fast, [[]], [BLOCK[:3]])
    assert wrong_or_refused(model, live, fast, [BLOCK[:3]], [BLOCK[3:]])


@pytest.mark.parametrize("cache", ["HrmTextCache", "StaticCache"])
def test_what_a_compiled_call_leaves(compiled, cache):
    """Ids and types that a compiled call appended serve the plain calls behind it."""
    model, fast = compiled
    live, row = CACHES[cache](model), row_of((1, 4), (0, 2), seed=5)
    assert not wrong_or_refused(model, live, fast, [[]], [row])
    for new in ([row_of((0, 1), seed=6)], [row_of((1, 3), seed=7)]):
        assert not wrong_or_refused(model, live, fast if len(new[0]) == 1 else model, [row], new)
        row = followed_by([row], new)[0]
    expect(cache, lambda: generate_on(model, live, [row], [row_of((0, 1), seed=8)]))


# ---- 6: inference mode ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", ["nothing", "rows turned round", "rows repeated", "deep copy", "pickle", "moved"])
@pytest.mark.parametrize("cache", ["HrmTextCache"])
def test_filled_under_inference_mode(model, cache, change):
    for outside in (torch.no_grad, torch.enable_grad):
        with torch.inference_mode():
            live = feed(model, CACHES[cache](model), [[], [], []], ROWS)
        with outside():
            live, rows = CHANGES[change](live, ROWS)
            new = [row_of((0, 1), (1, 3), seed=10 + i) for i, _ in enumerate(rows)]
            live = feed(model, live, rows, new, grad=outside is torch.enable_grad)
            more = [row_of((0, 1), seed=20 + i) for i, _ in enumerate(rows)]
            feed(model, live, followed_by(rows, new), more, grad=outside is torch.enable_grad)


@pytest.mark.parametrize("cache", GROWING)
def test_generated_under_inference_mode(model, cache):
    with torch.inference_mode():
        live, rows = generate_on(model, CACHES[cache](model), [[]], [BLOCK], steps=4)
    expect(cache, lambda: generate_on(model, live, rows, [row_of((0, 1), (1, 4), seed=3)]))


@pytest.mark.parametrize("cache", GROWING)
def test_inference_mode_in_turn(model, cache):
    """In and out, token by token, with a crop on either side."""
    live, rows = CACHES[cache](model), [BLOCK]
    live = feed(model, live, [[]], rows)
    for step in range(4):
        new = [row_of((0, 2), seed=30 + step)]
        with torch.inference_mode(step % 2 == 0):
            live = feed(model, live, rows, new)
            rows = followed_by(rows, new)
        if step == 2 and cache != "QuantizedCache":
            live.crop(-1)
            rows = [rows[0][:-1]]


def test_cropped_and_reset_outside(model):
    with torch.inference_mode():
        live = feed(model, CACHES["HrmTextCache"](model), [[]], [BLOCK])
    live.crop(-3)
    live = feed(model, live, [BLOCK[:3]], [BLOCK[3:]])
    live.reset()
    feed(model, live, [[]], [row_of((1, 5), (0, 1), seed=9)])


def test_gradients_after_inference_mode(model):
    """A loss over a cached prompt that was read under no gradient."""
    with torch.inference_mode():
        live = feed(model, CACHES["HrmTextCache"](model), [[]], [BLOCK])
    new = [row_of((0, 4), seed=9)]
    ids = torch.tensor([[token.id for token in new[0]]])
    model.zero_grad()
    loss = model(ids, token_type_ids=torch.zeros_like(ids), labels=ids, past_key_values=live).loss
    loss.backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if p.requires_grad and "embed" not in n)


# ---- by position, by embeddings, by chunks --------------------------------------------------------------------------


@pytest.mark.parametrize("given", ["right", "of the new tokens", "too far"])
@pytest.mark.parametrize("cache", CACHES)
def test_cache_position(model, cache, given):
    """Older releases pass it, and a caller may: one that contradicts the cache is not followed silently."""
    live = feed(model, CACHES[cache](model), [[]], [BLOCK])
    new = [row_of((0, 3), seed=2)]
    begin = {"right": 6, "of the new tokens": 0, "too far": 9}[given]
    call = lambda: feed(model, live, [BLOCK], new, cache_position=torch.arange(begin, begin + 3))  # noqa: E731
    if given == "right":
        call()
    else:
        is_refused(call)


@pytest.mark.parametrize("cache", CACHES)
def test_embeddings_on_a_live_cache(model, cache):
    table = model.get_input_embeddings()
    live, rows = CACHES[cache](model), [[]]
    for types in ((1, 4), (0, 3), (1, 2), (0, 1)):
        new = [row_of(types, seed=types[1])]
        embeds = table(torch.tensor([[token.id for token in new[0]]])).detach()
        live = feed(model, live, rows, new, input_ids=None, inputs_embeds=embeds)
        rows = followed_by(rows, new)
    new = [row_of((1, 3), (0, 1), seed=40)]
    feed(model, live, rows, new)


def test_embeddings_fed_again_after_a_cut_are_never_taken_for_the_same(model):
    live = feed(model, CACHES["HrmTextCache"](model), [[]], [BLOCK])
    live.crop(-2)
    other = [row_of((1, 2), seed=7)]
    embeds = model.get_input_embeddings()(torch.tensor([[token.id for token in other[0]]])).detach()
    assert is_refused(lambda: feed(model, live, [BLOCK[:4]], other, input_ids=None, inputs_embeds=embeds))


@pytest.mark.parametrize("step", [1, 2, 5])
@pytest.mark.parametrize("cache", CACHES)
def test_positions_that_jump(model, cache, step):
    """Positions further on are of the same sequence; the next call without positions goes on from them."""
    from dataclasses import replace

    first = row_of((1, 4), seed=1)
    second = [replace(token, position=3 + step * (i + 1)) for i, token in enumerate(row_of((0, 3), seed=2))]
    live = feed(model, CACHES[cache](model), [[]], [first])
    positions = torch.tensor([[token.position for token in second]])
    ids = torch.tensor([[token.id for token in second]])
    with torch.no_grad():
        logits = model(
            ids, token_type_ids=torch.zeros_like(ids), position_ids=positions, past_key_values=live, use_cache=True
        ).logits
    row = [*first, *second]
    assert (logits - truth(model, [row])[:, 4:]).abs().max() < TOLERANCE
    expect(cache, lambda: feed(model, live, [row], [row_of((0, 2), seed=3)]))


@pytest.mark.parametrize("cache", CACHES)
def test_a_refused_forward_changes_nothing(model, cache):
    live = feed(model, CACHES[cache](model), [[]], [BLOCK])
    wrong = {
        "a block that goes on": {},
        "types of another shape": {"token_type_ids": torch.zeros(1, 9, dtype=torch.long)},
        "a mask of another shape": {"attention_mask": torch.ones(1, 3, dtype=torch.long)},
        "positions of another shape": {"position_ids": torch.arange(9)[None]},
    }
    for more in wrong.values():
        with pytest.raises(ValueError):
            feed(model, live, [BLOCK], [row_of((1, 3), seed=2)], **more)
        assert int(live.get_seq_length()) == len(BLOCK)
    feed(model, live, [BLOCK], [row_of((0, 1), (1, 3), seed=2)])


# ---- calls that end half way ----------------------------------------------------------------------------------------

PLAIN = [row_of((1, 3), (0, 5), seed=11), row_of((1, 3), (0, 5), seed=12)]  # alike, as quantized slots want them
PLACES = {
    "the first layer": lambda model: model.model.L_module.layers[0],
    "the last stack": lambda model: model.model.H_module,
    "the head": lambda model: model.lm_head,
}


def interrupt(model, place, live, new) -> None:
    """A call that fails where a hook stands, as with no memory left or at Ctrl-C."""

    def fail(*_):
        raise KeyboardInterrupt

    handle = place(model).register_forward_hook(fail)
    try:
        with pytest.raises(KeyboardInterrupt), torch.no_grad():
            model(**arguments_of(new), past_key_values=live, use_cache=True)
    finally:
        handle.remove()


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("cache", CACHES)
def test_an_interrupted_call(model, cache, place):
    """The cache is what it was before, or refused: half of its slots never answer with a token more."""
    new = [row_of((0, 2), seed=13 + i) for i in range(2)]
    live = feed(model, CACHES[cache](model), [[], []], PLAIN)
    interrupt(model, PLACES[place], live, new)
    for again in (new, [row_of((0, 1), (1, 2), seed=15 + i) for i in range(2)]):
        history = PLAIN if again is new else followed_by(PLAIN, new)
        if is_refused(lambda: feed(model, live, history, again)):  # noqa: B023
            assert cache not in REMEMBERING
            return


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("cache", CACHES)
def test_an_interrupted_first_call(model, cache, place):
    live = CACHES[cache](model)
    interrupt(model, PLACES[place], live, [row[:4] for row in PLAIN])
    expect(cache, lambda: feed(model, live, [[], []], PLAIN))


@pytest.mark.parametrize("cache", [name for name in CACHES if name not in ("StaticCache", "QuantizedCache")])
def test_slots_cut_by_others(model, cache):
    """Tools set `keys` and `values` themselves: in every slot alike it is a crop, in some of them it is refused."""
    shorter = [row[:-2] for row in PLAIN]
    live = feed(model, CACHES[cache](model), [[], []], PLAIN)
    for layer in live.layers:
        layer.keys, layer.values = layer.keys[:, :, :-2], layer.values[:, :, :-2]
    feed(model, live, shorter, [row_of((0, 2), seed=16 + i) for i in range(2)])
    live = feed(model, CACHES[cache](model), [[], []], PLAIN)
    live.layers[0].crop(-2)
    for history in (PLAIN, shorter):
        with pytest.raises(ValueError, match="do not hold the same tokens"):
            feed(model, live, history, [row_of((0, 1), seed=16 + i) for i in range(2)])


@pytest.mark.parametrize("live", [None, *CACHES])
def test_a_mask_longer_than_all_tokens(model, live):
    """It speaks of tokens that are not in the cache, unless a static cache has the room for them."""
    call = {"input_ids": torch.full((1, 3), 30), "attention_mask": torch.ones(1, 7, dtype=torch.long)}
    if live != "StaticCache":
        with pytest.raises(ValueError, match="covers 7 positions"):
            model(**call, past_key_values=live and CACHES[live](model))
        return
    logits = model(**call, past_key_values=CACHES[live](model)).logits
    assert (logits - model(call["input_ids"]).logits).abs().max() < TOLERANCE


def test_a_cache_for_an_encoder_too_is_refused(model):
    pair = EncoderDecoderCache(DynamicCache(), DynamicCache())
    for call in (model, model.generate):
        with pytest.raises(ValueError, match="self_attention_cache"):
            call(torch.full((1, 3), 30), past_key_values=pair)


def test_crop_counts_as_the_installed_release_does(model):
    """A number below zero goes, one above stays; 0 is nothing where the library removes, all where it keeps."""
    theirs, ours = CACHES["DynamicCache"](model), CACHES["HrmTextCache"](model)
    for live in (theirs, ours):
        feed(model, live, [[], []], PLAIN)
        live.crop(0)
    assert ours.get_seq_length() == theirs.get_seq_length()
    ours = feed(model, CACHES["HrmTextCache"](model), [[], []], PLAIN)
    for argument, left in (({"tokens_to_remove": -1}, 7), ({"max_length": 6}, 6), ({"max_length": 99}, 6)):
        ours.crop(**argument)
        assert ours.get_seq_length() == left
    ours.crop(max_length=0)
    assert ours.get_seq_length() == 0
    feed(model, ours, [[], []], PLAIN)
    with pytest.raises(TypeError, match="one argument"):
        ours.crop()


# ---- embeddings and several rows ------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache", CACHES)
def test_envelopes_are_recognised_in_embeddings(model, cache):
    """As in ids: in forward and in `generate`, at the beginning and on a live cache."""
    first, second = [6, 30, 31, 7, 40], [6, 50, 51, 7]
    embed = model.model.embed_tokens
    both = torch.tensor([first + second])
    wanted = model(both, use_cache=False).logits
    live = CACHES[cache](model)
    with torch.no_grad():
        model(inputs_embeds=embed(both[:, :5]), past_key_values=live)
        logits = model(inputs_embeds=embed(both[:, 5:]), past_key_values=live).logits
    assert (logits - wanted[:, 5:]).abs().max() < TOLERANCE
    greedy = {"do_sample": False, "max_new_tokens": 3, "return_dict_in_generate": True, "output_logits": True}
    answers = [model.generate(both, **greedy), model.generate(inputs_embeds=embed(both), **greedy)]
    live = CACHES[cache](model)
    with torch.no_grad():
        model(both[:, :5], past_key_values=live)
    answers.append(model.generate(inputs_embeds=embed(both), past_key_values=live, **greedy))
    for answer in answers[1:]:
        assert (torch.stack(answer.logits) - torch.stack(answers[0].logits)).abs().max() < TOLERANCE


@pytest.mark.parametrize("cache", [name for name in CACHES if name not in ("StaticCache", "QuantizedCache")])
@pytest.mark.parametrize(
    "more", [{"num_beams": 3}, {"num_return_sequences": 3, "do_sample": True}], ids=["beams", "n"]
)
def test_several_rows_go_on_from_one(model, cache, more):
    """The sentence that refuses it says what to do, and then it is right."""
    ids = torch.tensor([[6, 30, 31, 7, 40, 41, 6, 50, 7]])
    live = CACHES[cache](model)
    with torch.no_grad():
        model(ids[:, :6], past_key_values=live)
    call = {"do_sample": False, **more, "max_new_tokens": 4}
    with pytest.raises(ValueError, match=r"holds 1 rows and this call has 3.*batch_repeat_interleave"):
        model.generate(ids, past_key_values=live, **call)
    live.batch_repeat_interleave(3)
    torch.manual_seed(1)
    answer = model.generate(ids, past_key_values=live, **call)
    torch.manual_seed(1)
    assert answer.tolist() == model.generate(ids, **call).tolist()


@pytest.mark.parametrize("cache", [name for name in CACHES if name not in ("StaticCache", "QuantizedCache")])
def test_a_stated_end_closes_an_inferred_envelope(model, cache):
    """The end of an envelope is fed again with its type after a crop: what follows is not inside of it any more."""
    ids = torch.tensor([[40, 6, 30, 7, 41, 42, 7]])
    with torch.no_grad():
        wanted = model(ids[:, :6], use_cache=False).logits[:, 4:]
        live = CACHES[cache](model)
        model(ids[:, :4], past_key_values=live, use_cache=True)
        live.crop(-1)
        model(ids[:, 3:4], token_type_ids=torch.ones(1, 1).long(), past_key_values=live, use_cache=True)
        logits = model(ids[:, 4:6], past_key_values=live, use_cache=True).logits
        assert (logits - wanted).abs().max() < TOLERANCE
        # A further end closes nothing: it is a token like others.
        last = model(ids[:, 6:], past_key_values=live, use_cache=True).logits
        assert (last - model(ids, use_cache=False).logits[:, 6:]).abs().max() < TOLERANCE
