"""HRM-Text-Nano, the model in the root: what it must be able to, and what its mask, condition and depth are worth."""

from __future__ import annotations

import json
import re
from itertools import islice

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from training.answers import answer
from training.evaluate import evaluate, main, markdown
from training.nano import make_config, make_tokenizer
from training.nano_tasks import final_answer, questions

from .tiny import ROOT


PROMISED = {
    "What is 48 + 27?": "75",
    "What is 148 minus 27?": "121",
    "What is 7 times 8?": "56",
    "Which is larger, 481 or 418?": "481",
    "Sort 52, 7, 19 in ascending order.": "7, 19, 52",
    "Reverse the word stone.": "enots",
    "How many times does the letter r occur in carrot?": "2",
}
SUMS = ("addition", "subtraction")


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(ROOT, trust_remote_code=True)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(ROOT, trust_remote_code=True)


def ask(model, tokenizer, texts: list[str], condition: str, prefix: bool = True) -> list[str]:
    encoded = tokenizer.encode_prompt(texts, condition)
    prompts = [
        {"input_ids": ids, "token_type_ids": types}
        for ids, types in zip(encoded["input_ids"], encoded["token_type_ids"])
    ]
    return answer(model, tokenizer, prompts, 110, prefix=prefix)


def test_it_is_small_and_made_by_the_recipe(model, tokenizer):
    assert sum(parameter.numel() for parameter in model.parameters()) <= 3_000_000
    assert (ROOT / "model.safetensors").stat().st_size <= 8_000_000
    assert (model.config.H_cycles, model.config.L_cycles) == (2, 3)
    recipe = make_config().to_dict()
    ours = model.config.to_dict()
    for name in set(recipe) - {"architectures", "transformers_version", "dtype", "_name_or_path", "auto_map"}:
        assert ours[name] == recipe[name], name
    texts = ["What is 48 + 27?", "äöü €", "Reverse the word stone."]
    assert make_tokenizer()(texts)["input_ids"] == tokenizer(texts)["input_ids"]


def test_it_answers_what_is_promised_directly(model, tokenizer):
    assert dict(zip(PROMISED, ask(model, tokenizer, list(PROMISED), "direct"))) == PROMISED


def test_it_shows_its_steps(model, tokenizer):
    written = ask(model, tokenizer, list(PROMISED), "synth,cot")
    assert {text: final_answer(response, "synth,cot") for text, response in zip(PROMISED, written)} == PROMISED
    assert all(len(response.splitlines()) >= 2 for response in written)
    assert written[0] == "8+7=15\n4+2+1=7\nThe answer is 75."


def test_the_answer_changes_with_the_condition(model, tokenizer):
    for text in PROMISED:
        direct, cot = (ask(model, tokenizer, [text], condition)[0] for condition in ("direct", "synth,cot"))
        assert "answer" not in direct and "The answer is " in cot


def test_sums_that_it_has_not_seen(model, tokenizer):
    # Of 500 it answers 99 to 100 %; this is a sample of 60.
    shares = evaluate(model, tokenizer, 60, seed=5, tasks=SUMS)
    assert min(shares.values()) >= 0.95


def test_without_its_mask_it_fails(model, tokenizer):
    asked = list(islice(questions(3, held_out=True, tasks=SUMS), 60))
    texts = [question.instruction for question in asked]

    def right(prefix: bool) -> float:
        written = ask(model, tokenizer, texts, "direct", prefix)
        return sum(text == question.answer for text, question in zip(written, asked)) / len(asked)

    assert right(True) >= 0.95 and right(False) < 0.3


@pytest.mark.parametrize("shallow", [{"H_cycles": 1}, {"L_cycles": 1}])
def test_without_its_depth_it_fails(tokenizer, shallow):
    model = AutoModelForCausalLM.from_pretrained(ROOT, trust_remote_code=True, **shallow)
    assert evaluate(model, tokenizer, 30, seed=5, tasks=SUMS)["overall"] < 0.5


def test_the_pipeline_of_a_user_who_knows_nothing(model):
    chat = pipeline("text-generation", model=str(ROOT), trust_remote_code=True)
    for text, result in PROMISED.items():
        (written,) = chat([{"role": "user", "content": text}], max_new_tokens=20, do_sample=False)
        assert written["generated_text"][-1]["content"] == result


def test_the_table_of_the_script(tmp_path, capsys):
    output = tmp_path / "table.json"
    assert main(["--count", "2", "--variant", "Nano", "--variant", "no prefix mask", "--output", str(output)]) == 0
    table = json.loads(output.read_text())
    assert list(table) == ["Nano", "no prefix mask"]
    assert capsys.readouterr().out.strip() == markdown(table)
    rows = re.findall(r"^\| (\w+) \| ([\w,]*) \| ([\d.]+) \| ([\d.]+) \|$", markdown(table), re.MULTILINE)
    assert len(rows) == 17 and rows[-1][0] == "overall"
    assert torch.tensor(list(table["Nano"].values())).isfinite().all()
