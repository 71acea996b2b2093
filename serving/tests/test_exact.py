"""Every answer is that of `generate`, and every log-probability that of one plain forward pass."""

from __future__ import annotations

from typing import Any

from serving.measure.material import TOLERANCE, Reference, check, generate, worst_difference


def test_single_questions(llm: Any, reference: Reference, questions_asked: list[list[int]]) -> None:
    check(reference, generate(llm, questions_asked))


def test_conversations(llm: Any, reference: Reference, chats: list[list[int]]) -> None:
    check(reference, generate(llm, chats))


def test_prompts_without_a_closed_envelope_are_causal(
    llm: Any, reference: Reference, questions_asked: list[list[int]]
) -> None:
    bare = [prompt[2:-1] for prompt in questions_asked[:4]]
    opened = [prompt[:-1] for prompt in questions_asked[4:8]]
    continued = [prompt[:-1] + prompt[:-1] + [7, 50] for prompt in questions_asked[8:12]]
    check(reference, generate(llm, bare + opened + continued))


def test_envelopes_right_behind_each_other(llm: Any, reference: Reference, questions_asked: list[list[int]]) -> None:
    """Two blocks: the first envelope does not see the second one, as it would if they were one."""
    both = [one + other for one, other in zip(questions_asked[:10], questions_asked[10:20])]
    results = generate(llm, both, prompt_logprobs=1)
    check(reference, results)
    for result, first in zip(results, questions_asked):
        table = reference.log_probabilities(first, [])
        served = [step[token].logprob for step, token in zip(result.prompt_logprobs[1:], first[1:])]
        expected = [table[i, token].item() for i, token in enumerate(first[1:])]
        assert max(abs(a - b) for a, b in zip(served, expected)) < TOLERANCE
    again = generate(llm, both)
    check(reference, again)
    assert all(result.num_cached_tokens > 0 for result in again if len(result.prompt_token_ids) > 64)


def test_prompt_log_probabilities(llm: Any, reference: Reference, chats: list[list[int]]) -> None:
    for result in generate(llm, chats[:10], prompt_logprobs=1, max_tokens=1):
        prompt = list(result.prompt_token_ids)
        table = reference.log_probabilities(prompt, [])
        served = [step[token].logprob for step, token in zip(result.prompt_logprobs[1:], prompt[1:])]
        expected = [table[i, token].item() for i, token in enumerate(prompt[1:])]
        assert max(abs(a - b) for a, b in zip(served, expected)) < TOLERANCE


def test_several_samples_of_one_prompt(llm: Any, reference: Reference, chats: list[list[int]]) -> None:
    results = generate(llm, chats[:6], n=4, temperature=1.0, seed=5)
    assert all(len(result.outputs) == 4 for result in results)
    assert worst_difference(reference, results) < TOLERANCE


def test_beam_search(llm: Any, reference: Reference, questions_asked: list[list[int]]) -> None:
    """Each beam's score is the sum of its log-probabilities in the port."""
    from vllm.sampling_params import BeamSearchParams

    prompts = [{"prompt_token_ids": prompt} for prompt in questions_asked[:10]]
    for prompt, result in zip(
        questions_asked, llm.beam_search(prompts, BeamSearchParams(beam_width=4, max_tokens=24))
    ):
        for beam in result.sequences:
            answer = list(beam.tokens[len(prompt) :])
            assert abs(sum(reference.answer_log_probabilities(prompt, answer)) - beam.cum_logprob) < 1e-3
