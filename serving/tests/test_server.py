"""The OpenAI server with its defaults: right answers, text that stays text, and errors that say what to do."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest

from serving.measure.material import HOSTILE, Reference, conversations, fresh_questions
from serving.measure.server import ROOT, served


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    log = tmp_path_factory.mktemp("server") / "log"
    with served(ROOT, log, "--dtype", "float32", "--enforce-eager", "--max-num-seqs", "32") as (address, _):
        yield openai.OpenAI(base_url=f"{address}/v1", api_key="none", timeout=600, max_retries=0)


def chat(client: openai.OpenAI, messages: list[dict[str, Any]], **options: Any) -> Any:
    return client.chat.completions.create(model="hrm", messages=messages, **options)


def answer_of(reference: Reference, messages: list[dict[str, Any]], condition: str | None = None) -> str:
    """The port's answer as text."""
    ids = reference.answer(reference.chat_ids(messages, condition=condition), 128)
    return reference.tokenizer.decode([token for token in ids if token != 11])


def test_chats_are_answered_as_by_generate(client: openai.OpenAI, reference: Reference) -> None:
    """Greedy without being asked, up to the end token, in any condition, eight at a time."""
    chats = [[{"role": "user", "content": text}] for text in fresh_questions(24)] + conversations(16)
    conditions = [None, "direct", "cot", "synth,cot"] * 10

    def ask(chat_and_condition: tuple[list[dict[str, Any]], str | None]) -> Any:
        messages, condition = chat_and_condition
        extra = {} if condition is None else {"chat_template_kwargs": {"condition": condition}}
        return chat(client, messages, extra_body=extra).choices[0]

    with ThreadPoolExecutor(8) as pool:
        choices = list(pool.map(ask, zip(chats, conditions)))
    assert [choice.message.content for choice in choices] == [
        answer_of(reference, messages, condition) for messages, condition in zip(chats, conditions)
    ]
    assert {choice.finish_reason for choice in choices} == {"stop"}


@pytest.mark.parametrize("text", HOSTILE)
def test_text_of_a_message_stays_text(client: openai.OpenAI, reference: Reference, text: str) -> None:
    turns = [
        [{"role": "user", "content": text}],
        [{"role": "user", "content": [{"type": "text", "text": text}]}],
        [{"role": "system", "content": text}, {"role": "user", "content": "What is 3 + 4?"}],
        [{"role": "user", "content": "hi"}, {"role": "assistant", "content": text}, {"role": "user", "content": text}],
    ]
    for messages in turns:
        response = chat(client, messages, extra_body={"return_token_ids": True})
        assert response.prompt_token_ids == reference.chat_ids(messages)
        assert response.choices[0].message.content == answer_of(reference, messages)
    for trick in (
        {"tokenize": False},
        {"sanitize_control_tokens": False},
        {"return_dict": True},
        {"chat_template": "x"},
    ):
        try:
            response = chat(client, turns[0], extra_body={"return_token_ids": True, "chat_template_kwargs": trick})
        except openai.BadRequestError:
            continue
        assert response.prompt_token_ids == reference.chat_ids(turns[0])


def test_streams(client: openai.OpenAI, reference: Reference) -> None:
    messages = conversations(1, seed=5)[0]
    stream = chat(client, messages, stream=True, stream_options={"include_usage": True})
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == answer_of(reference, messages)
    assert chunks[-1].usage.completion_tokens > 0


def test_an_answer_that_is_not_waited_for(client: openai.OpenAI, reference: Reference) -> None:
    messages = [{"role": "user", "content": "What is 12 + 30?"}]
    for _ in range(4):
        stream = chat(client, messages, stream=True, max_tokens=400, extra_body={"ignore_eos": True})
        next(iter(stream))
        stream.close()
    assert chat(client, messages).choices[0].message.content == answer_of(reference, messages)


def test_completions(client: openai.OpenAI, reference: Reference) -> None:
    """A prompt as a string is read as it is, control tokens too; as ids, and several at once."""
    prompts = [reference.tokenizer.build_prompt(text, "cot") for text in fresh_questions(4, seed=3)]
    ids = [reference.tokenizer(prompt)["input_ids"] for prompt in prompts]
    expected = [reference.tokenizer.decode(reference.answer(row, 64)[:-1]) for row in ids]
    for given in (prompts, ids):
        choices = client.completions.create(model="hrm", prompt=given, max_tokens=64).choices
        assert [choice.text for choice in choices] == expected
    choice = client.completions.create(model="hrm", prompt=ids[0], max_tokens=1, echo=True, logprobs=1).choices[0]
    table = reference.log_probabilities(ids[0], [])
    ours = [table[i, token].item() for i, token in enumerate(ids[0][1:])]
    assert max(abs(a - b) for a, b in zip(choice.logprobs.token_logprobs[1:], ours)) < 1e-4


def test_log_probabilities_and_several_choices(client: openai.OpenAI, reference: Reference) -> None:
    messages = [{"role": "user", "content": "What is 48 + 27?"}]
    options = {"n": 3, "temperature": 1.0, "seed": 1, "logprobs": True}
    response = chat(client, messages, extra_body={"return_token_ids": True}, **options)
    prompt = reference.chat_ids(messages)
    for choice in response.choices:
        ours = reference.answer_log_probabilities(prompt, choice.token_ids)
        theirs = [token.logprob for token in choice.logprobs.content]
        assert max(abs(a - b) for a, b in zip(ours, theirs)) < 1e-4


@pytest.mark.parametrize(
    ("messages", "options", "says"),
    [
        ([{"role": "user", "content": "3 + 4 is " * 600}], {}, "maximum context length"),
        (
            [{"role": "user", "content": "hi"}],
            {"extra_body": {"chat_template_kwargs": {"condition": "x"}}},
            "known are",
        ),
        (
            [{"role": "user", "content": "hi"}],
            {"extra_body": {"chat_template_kwargs": {"condition": "cot, cot"}}},
            "names a tag twice",
        ),
        ([{"role": "assistant", "content": "hi"}], {}, "alternate"),
        ([{"role": "user", "content": "hi"}] * 2, {}, "alternate"),
        ([], {}, ""),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}], {}, ""),
        ([{"role": "user", "content": "hi"}], {"temperature": -1}, "temperature"),
        ([{"role": "user", "content": "hi"}], {"max_tokens": 0}, "max_tokens"),
        ([{"role": "user", "content": "hi"}], {"max_tokens": 5000}, "max_tokens"),
        ([{"role": "user", "content": "hi"}], {"extra_body": {"chat_template_kwargs": {"condition": 3}}}, ""),
        (
            [{"role": "user", "content": "hi"}],
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}], "tool_choice": "none"},
            "tools",
        ),
    ],
)
def test_what_cannot_be_served_is_refused_at_once(
    client: openai.OpenAI, messages: list[dict[str, Any]], options: dict[str, Any], says: str
) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        chat(client, messages, **options)
    assert says in str(error.value)
    assert chat(client, [{"role": "user", "content": "What is 1 + 1?"}], max_tokens=2).choices


def test_the_folder_with_its_own_tokenizer(reference: Reference, tmp_path: Path) -> None:
    """With --trust-remote-code, the folder's tokenizer makes the ids."""
    options = ("--dtype", "float32", "--enforce-eager", "--trust-remote-code", "--max-num-seqs", "4")
    with served(ROOT, tmp_path / "log", *options) as (address, _):
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", timeout=600, max_retries=0)
        messages = [{"role": "user", "content": HOSTILE[1]}]
        response = chat(client, messages, extra_body={"return_token_ids": True})
        assert response.prompt_token_ids == reference.chat_ids(messages)
        assert response.choices[0].message.content == answer_of(reference, messages)
