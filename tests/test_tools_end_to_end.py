"""Nano learns a calculator with `training.sft`; an OpenAI client gets its calls from a server and answers them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from training.tools import CALCULATOR, calculate, conversation, is_held_out, rows

from .serving import ENVIRONMENT, served
from .tiny import ROOT


STEPS = ["--max-steps", "120", "--batch-size", "8", "--learning-rate", "1.5e-3", "--warmup-steps", "10"]
STEPS += ["--average", "0.9", "--gradient-steps", "5", "5", "--length", "512"]


def test_the_rows_hold_no_sum_that_is_kept_for_judging():
    made = list(rows(200))
    for row in made:
        text = row["messages"][1]["tool_calls"][0]["function"]["arguments"]["sum"]
        operation = "+" if "+" in text else "-"
        a, b = map(int, text.split(operation))
        assert not is_held_out(a, b, operation) and calculate(text) == row["messages"][-1]["content"]
    assert len({str(row["messages"]) for row in made}) > 150
    with pytest.raises(ValueError, match="no sum of two numbers"):
        calculate("__import__('os')")


def questions(count):
    """Sums that are in no row."""
    sums = [(a, b) for a in range(10, 100, 7) for b in range(10, 100, 3) if is_held_out(a, b, "+")]
    step = len(sums) // count
    return [conversation(a, b, "+") for a, b in sums[::step][:count]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The fine-tuned Nano: some minutes."""
    folder = tmp_path_factory.mktemp("tools")
    subprocess.run(
        [sys.executable, "-m", "training.tools", "--output", folder / "rows.jsonl"], check=True, cwd=ROOT, timeout=120
    )
    command = ["--model", ".", "--data", folder / "rows.jsonl", "--output", folder / "caller", "--tools", *STEPS]
    command += ["--held-out", "0.002", "--cpu"]
    subprocess.run(
        [sys.executable, "-m", "training.sft", *command], check=True, cwd=ROOT, env=ENVIRONMENT, timeout=7200
    )
    shutil.rmtree(folder / "caller" / "training")
    return str(folder / "caller")


@pytest.mark.slow
def test_nano_calls_the_calculator_on_sums_it_has_not_seen(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    assert tokenizer.trained_on_tools
    right, chats = 0, questions(20)
    assert len(chats) == 20
    for chat in chats:
        for turn in (1, 3):
            encoding = tokenizer.apply_chat_template(
                chat[:turn], tools=[CALCULATOR], add_generation_prompt=True, return_dict=True, return_tensors="pt"
            )
            output = model.generate(**encoding, do_sample=False, max_new_tokens=80)
            answer = tokenizer.decode(output[0, encoding["input_ids"].shape[1] :])
            wanted = tokenizer.apply_chat_template(chat[: turn + 1], tools=[CALCULATOR], tokenize=False)
            right += tokenizer.decode(encoding["input_ids"][0]) + answer == wanted
    assert right >= 36


@pytest.fixture(scope="module")
def address(folder, tmp_path_factory):
    with served(folder, tmp_path_factory.mktemp("log") / "serve.log") as address:
        yield address


@pytest.mark.slow
@pytest.mark.skipif(
    not hasattr(transformers, "AutoModelForDecision"), reason="the server of this transformers loads no remote code"
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_client_gets_calls_and_sends_back_what_they_gave(address, folder, stream):
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", timeout=600, max_retries=0)

    def ask(messages):
        answer = client.chat.completions.create(
            model=folder, messages=messages, tools=[CALCULATOR], temperature=0, stream=stream, max_tokens=80
        )
        if not stream:
            message = answer.choices[0].message
            return message.content, message.tool_calls or []
        deltas = [chunk.choices[0].delta for chunk in answer if chunk.choices]
        calls = [call for delta in deltas for call in delta.tool_calls or []]
        return "".join(delta.content or "" for delta in deltas), calls

    chat = questions(1)[0]
    messages = chat[:1]
    _, calls = ask(messages)
    (call,) = calls
    assert call.function.name == "calculate"
    text = json.loads(call.function.arguments)["sum"]
    function = {"name": call.function.name, "arguments": call.function.arguments}
    messages += [
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"id": call.id, "type": "function", "function": function}],
        },
        {"role": "tool", "tool_call_id": call.id, "content": calculate(text)},
    ]
    content, calls = ask(messages)
    assert not calls and content.strip() == chat[-1]["content"] == calculate(text)
