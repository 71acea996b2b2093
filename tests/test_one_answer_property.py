"""Layouts, padding, packing and cuts drawn at random: the answer does not depend on how the computation was cut up."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from .harness import Answer, Row, deviation, dynamic, forward_packed, generated, growing, is_greedy, make_row, static
from .one_answer_models import one_answer_model


SETTINGS = settings(
    max_examples=15,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
MODEL = one_answer_model(H_cycles=1)
CACHES = {"growing": growing, "dynamic": dynamic, "static": static}

segments = st.lists(st.tuples(st.sampled_from([0, 1, 1]), st.integers(1, 5)), min_size=1, max_size=4)
rows = st.builds(lambda parts, seed: make_row(*parts, seed=seed), segments, st.integers(0, 1000))
batches = st.lists(rows, min_size=1, max_size=3)


def interleaved(row: Row, holes: list[int]) -> tuple[list[int], list[int], list[int]]:
    """Ids, types and mask of a row with padding before its tokens at `holes` (and after, where beyond its end)."""
    ids, types, mask = [], [], []
    for i in range(len(row) + 1):
        count = holes.count(i)
        ids, types, mask = ids + [5] * count, types + [0] * count, mask + [0] * count
        if i < len(row):
            ids, types, mask = [*ids, row.ids[i]], [*types, row.types[i]], [*mask, 1]
    return ids, types, mask


@SETTINGS
@given(batch=batches, data=st.data())
@torch.no_grad()
def test_padding_anywhere(batch, data):
    width = max(len(row) for row in batch) + data.draw(st.integers(0, 3))
    laid = []
    for row in batch:
        room = width - len(row)
        holes = data.draw(st.lists(st.integers(0, len(row)), min_size=room, max_size=room))
        laid.append(interleaved(row, holes))
    ids, types, mask = (torch.tensor([one[i] for one in laid]) for i in range(3))
    logits = MODEL(input_ids=ids, token_type_ids=types, attention_mask=mask).logits
    assert torch.isfinite(logits).all()
    assert deviation(MODEL, [Answer(row, 0, logits[i][mask[i] != 0]) for i, row in enumerate(batch)]) < 1e-4


@SETTINGS
@given(batch=batches, pad=st.integers(0, 2))
@torch.no_grad()
def test_packing(batch, pad):
    assert deviation(MODEL, forward_packed(MODEL, batch, pad=pad)) < 1e-4


def may_cut(row: Row, at: int) -> bool:
    return not (row.types[at - 1] == 1 and row.types[at] == 1)


@pytest.mark.parametrize("cache", CACHES)
@SETTINGS
@given(row=rows, data=st.data())
@torch.no_grad()
def test_calls_on_a_live_cache(cache, row, data):
    """Any cuts: those outside the blocks change nothing, one inside a block is refused."""
    cuts = sorted(data.draw(st.sets(st.integers(1, len(row) - 1), max_size=4))) if len(row) > 1 else []
    live, answers = CACHES[cache](MODEL), []
    for begin, end in zip([0, *cuts], [*cuts, len(row)]):
        part = row[begin:end]
        call = {"input_ids": torch.tensor([part.ids]), "token_type_ids": torch.tensor([part.types])}
        if begin and not may_cut(row, begin):
            with pytest.raises(ValueError, match="prefix block"):
                MODEL(**call, past_key_values=live, use_cache=True)
            break
        output = MODEL(**call, past_key_values=live, use_cache=True)
        live = output.past_key_values
        answers.append(Answer(row[:end], begin, output.logits[0]))
    assert deviation(MODEL, answers) < 1e-4


@SETTINGS
@given(batch=batches, chunk=st.integers(1, 8), cached=st.sampled_from([None, "dynamic", "static"]))
def test_chunked_prefill(batch, chunk, cached):
    answers = generated(MODEL, batch, prefill_chunk_size=chunk, cache_implementation=cached, max_new_tokens=2)
    assert deviation(MODEL, answers) < 1e-4
    assert is_greedy(MODEL, answers)
