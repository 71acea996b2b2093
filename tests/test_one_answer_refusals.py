"""What cannot be made right is refused, with a sentence that names the argument and what to do instead."""

from __future__ import annotations

import pytest
import torch
from transformers import AttentionInterface, GenerationConfig, StaticCache
from transformers.utils import logging

from .harness import CONVERSATION, ONE_BLOCK, dynamic, padded, static
from .one_answer_models import one_answer_model


BLOCK = ONE_BLOCK[0]


@pytest.fixture(scope="module")
def model():
    return one_answer_model()


@pytest.fixture(scope="module")
def inferring():
    return one_answer_model(prefix_end_token_id=7)


@pytest.fixture
def log(caplog):
    logging.warning_once.cache_clear()
    return caplog


def wrong_types() -> dict[str, torch.Tensor]:
    ones = torch.ones(2, 7, dtype=torch.long)
    return {
        "too short": ones[:, :6],
        "too long": torch.ones(2, 8, dtype=torch.long),
        "other rows": ones[:1],
        "one dimension": ones[0],
        "three dimensions": ones[..., None],
        "float": ones.float(),
        "complex": ones.to(torch.complex64),
    }


@pytest.mark.parametrize("wrong", wrong_types())
@pytest.mark.parametrize("call", ["forward", "generate", "generate with embeddings"])
def test_wrong_token_type_ids(model, wrong, call):
    ids = torch.tensor([BLOCK.ids] * 2)
    arguments = {"token_type_ids": wrong_types()[wrong]}
    with pytest.raises(ValueError, match="token_type_ids"):
        if call == "forward":
            model(input_ids=ids, **arguments)
        elif call == "generate":
            model.generate(ids, **arguments, max_new_tokens=1)
        else:
            model.generate(inputs_embeds=model.get_input_embeddings()(ids), **arguments, max_new_tokens=1)


@pytest.mark.parametrize("columns", [1, 3, 9])
def test_types_of_a_cached_call_must_be_those_of_the_new_tokens(model, columns):
    live = model(torch.tensor([BLOCK.ids]), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="token_type_ids"):
        model(
            torch.tensor([[30, 31]]),
            token_type_ids=torch.zeros(1, columns, dtype=torch.long),
            past_key_values=live,
        )


def test_types_of_a_cached_generate(model):
    live = model(torch.tensor([BLOCK.ids]), use_cache=True).past_key_values
    whole = torch.tensor([[*BLOCK.ids, 30, 31]])
    with pytest.raises(ValueError, match=r"token_type_ids.*\(1, 2\) or \(1, 9\)"):
        model.generate(whole, token_type_ids=torch.zeros(1, 3, dtype=torch.long), past_key_values=live)


def test_four_dimensional_mask_and_types(model):
    ids = torch.tensor([BLOCK.ids])
    mask = torch.ones(1, 1, 7, 7, dtype=torch.bool).tril()
    with pytest.raises(ValueError, match="4-D"):
        model(input_ids=ids, attention_mask=mask, token_type_ids=torch.ones_like(ids))
    causal = model(input_ids=ids, token_type_ids=torch.zeros_like(ids)).logits
    torch.testing.assert_close(model(input_ids=ids, attention_mask=mask).logits, causal, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("columns", [5, 8])
def test_mask_of_another_width(model, columns):
    ids, mask = torch.tensor([BLOCK.ids]), torch.ones(1, columns, dtype=torch.long)
    with pytest.raises(ValueError, match="attention_mask"):
        model.generate(ids, attention_mask=mask, max_new_tokens=1)
    if columns < len(BLOCK):
        with pytest.raises(ValueError, match="attention_mask"):
            model(input_ids=ids, attention_mask=mask)


@pytest.mark.parametrize("cache", [dynamic, static])
def test_mask_of_another_width_on_a_cache(model, cache):
    live = model(torch.tensor([BLOCK.ids]), past_key_values=cache(model), use_cache=True).past_key_values
    with pytest.raises(ValueError, match=r"attention_mask.*9"):
        model.generate(
            torch.tensor([[30, 31]]), attention_mask=torch.ones(1, 4, dtype=torch.long), past_key_values=live
        )
    with pytest.raises(ValueError, match="already"):
        model.generate(**padded([BLOCK]), past_key_values=live, max_new_tokens=1)


def test_embeddings_of_new_tokens_alone(model):
    live = model(torch.tensor([BLOCK.ids]), use_cache=True).past_key_values
    embeds = model.get_input_embeddings()(torch.tensor([[30, 31]]))
    with pytest.raises(ValueError, match="inputs_embeds"):
        model.generate(inputs_embeds=embeds, past_key_values=live, max_new_tokens=1)


def test_four_dimensional_mask_in_generate(model):
    with pytest.raises(ValueError, match="dimensions"):
        model.generate(torch.tensor([BLOCK.ids]), attention_mask=torch.ones(1, 1, 7, 7), max_new_tokens=1)


def test_static_cache_too_small_for_a_forward(model):
    cache = StaticCache(config=model.config, max_cache_len=8)
    model(torch.tensor([BLOCK.ids]), past_key_values=cache, use_cache=True)
    with pytest.raises(ValueError, match="max_cache_len"):
        model(torch.tensor([[30, 31]]), past_key_values=cache)


@pytest.mark.parametrize("new_tokens", [1, 5])
def test_static_cache_too_small_for_generate(model, new_tokens):
    needed = len(BLOCK) + new_tokens - 1
    enough = StaticCache(config=model.config, max_cache_len=needed)
    model.generate(**padded([BLOCK]), past_key_values=enough, max_new_tokens=new_tokens)
    with pytest.raises(ValueError, match=f"max_cache_len={needed}"):
        small = StaticCache(config=model.config, max_cache_len=needed - 1)
        model.generate(**padded([BLOCK]), past_key_values=small, max_new_tokens=new_tokens)


def test_positions_beyond_the_context(log):
    model = one_answer_model(max_position_embeddings=8)
    for _ in range(2):
        model(torch.tensor([list(range(20, 30))]))
    assert log.text.count("max_position_embeddings") == 1


@pytest.mark.parametrize("arguments", [{}, {"token_type_ids": torch.zeros(1, 3, dtype=torch.long)}])
def test_prompt_without_a_block_is_warned_of_once(inferring, log, arguments):
    for _ in range(2):
        inferring.generate(torch.tensor([[30, 31, 32]]), **arguments, max_new_tokens=1)
    assert log.text.count("holds no prefix block") == 1
    assert "open with the token ids [6]" in log.text and "close with [7]" in log.text


def test_one_row_without_a_block_is_warned_of(inferring, log):
    inferring.generate(torch.tensor([[6, 30, 7], [6, 30, 31]]), max_new_tokens=1)
    assert log.text.count("holds no prefix block") == 1


def test_no_warning_where_none_is_due(model, inferring, log):
    inferring.generate(torch.tensor([[6, 30, 7]]), max_new_tokens=3, do_sample=False)
    padding = torch.tensor([[1, 1, 1], [0, 0, 0]])
    inferring.generate(torch.tensor([[6, 30, 7], [5, 5, 5]]), attention_mask=padding, max_new_tokens=2)
    inferring.generate(torch.tensor([[6, 30, 7]]), assistant_model=inferring, max_new_tokens=3, eos_token_id=0)
    model.generate(torch.tensor([[30, 31, 32]]), max_new_tokens=1)
    assert "prefix block" not in log.text


def test_generation_from_nothing_is_causal(inferring):
    output = inferring.generate(max_new_tokens=4, do_sample=False)
    ids = output[:, :-1]
    with torch.no_grad():
        best = inferring(ids, token_type_ids=torch.zeros_like(ids)).logits[0].argmax(dim=-1)
    assert best.tolist() == output[0, 1:].tolist()


def test_without_prefix_lm_types_are_ignored_with_one_warning(log):
    model = one_answer_model(prefix_lm=False, prefix_end_token_id=7)
    batch = padded(CONVERSATION)
    for _ in range(2):
        model(**batch)
    assert log.text.count("prefix_lm") == 1
    logging.warning_once.cache_clear()
    log.clear()
    with_types = model.generate(**batch, max_new_tokens=4, do_sample=False)
    assert log.text.count("prefix_lm") == 1
    batch.pop("token_type_ids")
    assert with_types.tolist() == model.generate(**batch, max_new_tokens=4, do_sample=False).tolist()


def test_packed_prompts_are_refused_in_generate(model):
    row = BLOCK.followed_by(BLOCK.ids, 1)
    positions = torch.tensor([[*range(7), *range(7)]])
    with pytest.raises(ValueError, match="restart"):
        model.generate(**padded([row]), position_ids=positions, max_new_tokens=1)


def test_token_healing_is_refused(model):
    with pytest.raises(ValueError, match="token_healing"):
        model.generate(**padded([BLOCK]), token_healing=True, tokenizer=object(), max_new_tokens=1)


@pytest.mark.parametrize("size", [0, -1])
def test_chunk_size_must_be_positive(model, size):
    with pytest.raises(ValueError, match="prefill_chunk_size"):
        model.generate(**padded([BLOCK]), prefill_chunk_size=size, max_new_tokens=1)


# ---- continuous batching and unknown attention ----------------------------------------------------------------------


CONTINUOUS = {
    "generate_batch": lambda m: m.generate_batch([[30, 31]], generation_config=GenerationConfig(eos_token_id=0)),
    "init_continuous_batching": lambda m: m.init_continuous_batching(),
    "context manager": lambda m: m.continuous_batching_context_manager().__enter__(),
}


@pytest.mark.parametrize("entrance", CONTINUOUS)
def test_continuous_batching_is_refused(model, entrance):
    with pytest.raises(ValueError, match=r"model\.generate"):
        CONTINUOUS[entrance](model)


def test_paged_cache_is_refused(model):
    with pytest.raises(ValueError):
        model.generate(torch.tensor([BLOCK.ids]), cache_implementation="paged", max_new_tokens=2)


def test_paged_forward_is_refused(model):
    ids = torch.tensor([BLOCK.ids])
    for network in (model, model.model):
        with pytest.raises(ValueError, match=r"model\.generate"):
            network(ids, position_ids=torch.arange(7)[None], cache=object(), read_index=[], write_index=[])


@pytest.mark.filterwarnings("ignore:.*prefix is no longer needed:FutureWarning")
@pytest.mark.parametrize("name", ["paged|sdpa", "paged|eager", "sdpa_paged", "eager_paged"])
def test_paged_attention_names(model, name):
    """Refused when set or when called; where transformers takes the prefix off the name, the answer is right."""
    paged, batch = one_answer_model(), padded([BLOCK])
    try:
        paged.set_attn_implementation(name)
        logits = paged(**batch).logits
    except (ValueError, ImportError) as refusal:
        assert "attention" in str(refusal).lower() or "implementation" in str(refusal).lower()
    else:
        torch.testing.assert_close(logits, model(**batch).logits)


def test_unknown_attention_is_refused():
    AttentionInterface.register("of_another_library", lambda *args, **kwargs: None)
    model = one_answer_model()
    with pytest.raises(ValueError, match="of_another_library"):
        model.set_attn_implementation("of_another_library")
        model(torch.tensor([BLOCK.ids]))
