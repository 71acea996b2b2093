"""The rules that the vLLM plug-in serves by, without vLLM: its blocks, segments and page hashes beside the model's."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer


ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "serving"))

from hrm_text_vllm.blocks import Envelope, Segments, last_cut, page_key, split_rows  # noqa: E402


BOS, END = 6, 7
ENVELOPE = Envelope((BOS,), (END,))


@pytest.fixture(scope="module")
def model() -> Any:
    loaded = AutoModelForCausalLM.from_pretrained(ROOT, trust_remote_code=True, attn_implementation="eager")
    return loaded.float().eval()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(ROOT, trust_remote_code=True)


@st.composite
def prompts(draw: Any) -> list[int]:
    """Prompts of text, envelopes, some right behind each other, and stray control tokens."""
    return draw(st.lists(st.sampled_from([BOS, END, 8, 9, 50, 51, 52]), max_size=32))


def types_of(length: int, blocks: list[tuple[int, int]]) -> list[int]:
    """`token_type_ids` of blocks: 1 inside one, 2 where one opens directly behind another."""
    types, last = [0] * length, None
    for first, after in blocks:
        types[first:after] = [1] * (after - first)
        types[first] += first == last
        last = after
    return types


def visible(length: int, blocks: list[tuple[int, int]]) -> torch.Tensor:
    """The rule: bool [length, length], everything before a position, and all of its block."""
    seen = torch.ones(length, length).tril().bool()
    for first, after in blocks:
        seen[first:after, first:after] = True
    return seen


def visible_in(segments: Segments, row: int, start: int, length: int) -> torch.Tensor:
    """What the new tokens of a row see by its segments: bool [new tokens, cached and new]."""
    seen = torch.zeros(length, start + length, dtype=torch.bool)
    query = 0
    for own, count, stop, causal in zip(segments.row, segments.query_length, segments.seq_length, segments.causal):
        if own != row:
            continue
        for index in range(count):
            seen[query, : stop - count + index + 1 if causal else stop] = True
            query += 1
    assert query == length
    return seen


def test_blocks_are_those_of_the_model_and_of_the_tokenizer(model: Any, tokenizer: Any) -> None:
    """The model shows what it sees in its attention weights, which are above 0 where it looks."""

    @settings(max_examples=150, deadline=None, database=None)
    @given(prompts())
    def same(ids: list[int]) -> None:
        blocks = ENVELOPE.blocks(ids)
        assert types_of(len(ids), blocks) == tokenizer.create_token_type_ids_from_sequences(ids)
        if ids:
            with torch.no_grad():
                weights = model(torch.tensor([ids]), output_attentions=True, use_cache=False).attentions[0]
            assert torch.equal((weights > 0).any(1)[0], visible(len(ids), blocks))

    same()


def test_envelopes() -> None:
    assert ENVELOPE.blocks([BOS, 8, 50, END, 51]) == [(0, 4)]
    assert ENVELOPE.blocks([BOS, END, BOS, 8, END]) == [(0, 2), (2, 5)]  # two, though nothing is between them
    assert ENVELOPE.blocks([BOS, BOS, END, END]) == [(0, 3)]
    assert ENVELOPE.blocks([50, END, BOS, 50]) == []
    assert Envelope((), ()).blocks([BOS, END]) == []
    long = Envelope((1, 2), (3, 4))
    assert long.blocks([1, 1, 2, 3, 3, 4, 5, 1, 2, 4]) == [(1, 6)]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"prefix_end_token_id": 7, "bos_token_id": 6}, Envelope((6,), (7,))),
        ({"prefix_end_token_id": None, "bos_token_id": 6}, Envelope((6,), ())),
        (
            {"prefix_end_token_id": [7, 9], "prefix_start_token_ids": [2, 3], "bos_token_id": 6},
            Envelope((2, 3), (7, 9)),
        ),
        ({"prefix_lm": False, "bos_token_id": 6}, Envelope((), ())),
    ],
)
def test_the_envelope_of_a_config(config: dict[str, Any], expected: Envelope) -> None:
    assert Envelope.of_config(SimpleNamespace(**config)) == expected


@pytest.mark.parametrize("config", [{"bos_token_id": 6}, {"prefix_end_token_id": 7, "bos_token_id": None}])
def test_a_config_without_an_envelope_is_refused(config: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="prefix_end_token_id"):
        Envelope.of_config(SimpleNamespace(**config))


@settings(max_examples=400, deadline=None, database=None)
@given(
    st.lists(st.tuples(prompts(), st.integers(0, 6), st.integers(0, 40), st.integers(1, 40)), min_size=1, max_size=5),
    st.booleans(),
)
def test_segments_see_what_the_rule_says(rows: list[tuple[list[int], int, int, int]], causal_runs: bool) -> None:
    """Any mix: fresh prompts, chunks, pages found in the cache, answers, requests that are computed anew."""
    starts, lengths, blocks = [], [], []
    for prompt, answered, start, wanted in rows:
        total, own = len(prompt) + answered + 1, ENVELOPE.blocks(prompt)
        start = min(start, total - 1)
        stop = last_cut(own, start, min(start + wanted, total))
        if stop == start:  # no room for the block in this step
            stop = next(after for first, after in own if first <= start < after)
        starts.append(start)
        lengths.append(stop - start)
        blocks.append(own)
    segments = split_rows(starts, lengths, blocks, causal_runs)
    if segments is None:
        segments = Segments([], [], [], [])
        for row, (start, length) in enumerate(zip(starts, lengths)):
            segments.append(row, length, start + length, True)
    assert segments.row == sorted(segments.row)
    if not causal_runs and any(not causal for causal in segments.causal):
        assert all(count == 1 for count, causal in zip(segments.query_length, segments.causal) if causal)
    for row, (start, length) in enumerate(zip(starts, lengths)):
        expected = visible(start + length, [block for block in blocks[row] if block[1] <= start + length])[start:]
        assert torch.equal(visible_in(segments, row, start, length), expected)


def test_causal_runs_cost_one_segment() -> None:
    segments = split_rows([0], [1000], [[(0, 100)]], causal_runs=True)
    assert segments is not None
    assert (segments.query_length, segments.seq_length, segments.causal) == ([100, 900], [100, 1000], [False, True])
    assert split_rows([100, 5], [1, 7], [[(0, 100)], []], causal_runs=False) is None


def test_a_block_is_never_split() -> None:
    with pytest.raises(ValueError, match="would split the prefix block 2 to 8"):
        split_rows([0], [5], [[(2, 9)]], causal_runs=True)
    assert [last_cut([(2, 9)], 0, stop) for stop in range(1, 11)] == [1, 2, 2, 2, 2, 2, 2, 2, 9, 10]
    assert last_cut([(2, 9)], 4, 6) == 4  # the head of the block is in the cache


@settings(max_examples=400, deadline=None, database=None)
@given(prompts(), prompts(), st.integers(0, 24), st.integers(1, 4))
def test_pages_with_one_key_hold_the_same(first: list[int], second: list[int], shared: int, size: int) -> None:
    """Two prompts that agree in tokens and keys up to a page see the same from its positions, tokens included."""
    second = first[:shared] + second
    for start in range(0, min(len(first), len(second)) - size + 1, size):
        stop = start + size
        keys = [page_key(ENVELOPE.blocks(ids), ids, start, stop) for ids in (first, second)]
        if first[:stop] != second[:stop] or keys[0] != keys[1]:
            break
        for position in range(start, stop):
            reach = []
            for ids in (first, second):
                own = [after for begin, after in ENVELOPE.blocks(ids) if begin <= position < after]
                reach.append(ids[: max([position + 1, *own])])
            assert reach[0] == reach[1]


def test_the_plug_in_imports_without_vllm() -> None:
    """What the ordinary tests import of it, and what finds out which vLLM there is."""
    code = (
        "import sys; sys.modules['vllm'] = None\n"
        "from hrm_text_vllm.registration import refusal, what_is_missing\n"
        "assert refusal('0.32.7') is None\n"
        "assert 'install vLLM 0.32' in refusal('0.33.0') and 'install vLLM 0.32' in refusal('0.31.2')\n"
        "assert 'install vLLM' in refusal('dev') and len(what_is_missing()) > 5\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT / "serving", timeout=60)
