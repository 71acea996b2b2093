"""lm-eval's `hf` model, which knows nothing of token_type_ids: the scores of explicit ones, on a small local task.

With the chat template, and without it where the task's text writes the envelope itself.
"""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from .serving import explicit_answer, make_folder
from .tiny import ROOT


pytestmark = pytest.mark.slow

# Fewer than the folder's generation config says, so that it shows which of the two is followed.
NEW_TOKENS = 9
ENVELOPE = "<|im_start|><|object_ref_start|>{{question}}<|im_end|>"

ROWS = [
    {"question": "What is 48 + 27?", "answer": "75", "choices": ["75", "65", "74"]},
    {"question": "Which is larger, 481 or 418?", "answer": "481", "choices": ["418", "481", "neither of them"]},
    {"question": "Reverse the word stone.", "answer": "enots", "choices": ["enots", "stone", "enost"]},
    {"question": "What is 7 times 8?", "answer": "56", "choices": ["56", "54", "15"]},
]


@pytest.fixture(scope="module", params=["random", "nano"])
def folder(request, tmp_path_factory):
    return str(ROOT if request.param == "nano" else make_folder(tmp_path_factory.mktemp("lm_eval") / "model"))


@pytest.fixture(scope="module", params=["chat template", "envelope in the task"])
def results(request, folder, tmp_path_factory):
    """Samples of both tasks by name, as the harness recorded them."""
    with_template = request.param == "chat template"
    question = "{{question}}" if with_template else ENVELOPE
    return run_tasks(folder, tmp_path_factory.mktemp("tasks"), question, with_template)


def run_tasks(folder, home, question, with_template):
    lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is an extra")
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    rows = home / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(rows)}, "cache_dir": str(home / "cache")},
        "test_split": "test",
        "doc_to_text": question,
        # An answer follows its prompt directly, as in training.
        "target_delimiter": "",
    }
    tasks = {
        "hrm_text_generation": {
            **common,
            "output_type": "generate_until",
            "doc_to_target": "{{answer}}",
            "generation_kwargs": {"until": [], "do_sample": False, "max_gen_toks": NEW_TOKENS},
            "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        },
        "hrm_text_choice": {
            **common,
            "output_type": "multiple_choice",
            "doc_to_target": "{{choices.index(answer)}}",
            "doc_to_choice": "{{choices}}",
            "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        },
    }
    for name, task in tasks.items():
        # JSON is YAML.
        (home / f"{name}.yaml").write_text(json.dumps({"task": name, **task}), encoding="utf-8")
    output = lm_eval.simple_evaluate(
        model=HFLM(pretrained=folder, trust_remote_code=True, device="cpu", dtype="float32", batch_size=3),
        tasks=list(tasks),
        task_manager=TaskManager(include_path=str(home), include_defaults=False),
        apply_chat_template=with_template,
        log_samples=True,
        bootstrap_iters=0,
    )
    return output


@pytest.fixture(scope="module")
def loaded(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(folder, trust_remote_code=True)


def samples(results, name):
    return sorted(results["samples"][name], key=lambda sample: sample["doc_id"])


def test_generation(results, loaded):
    model, tokenizer = loaded
    answers, causal = [], []
    for row, sample in zip(ROWS, samples(results, "hrm_text_generation")):
        encoding = tokenizer.encode_prompt(row["question"], return_tensors="pt")
        answers += explicit_answer(model, tokenizer, encoding, max_new_tokens=NEW_TOKENS)
        causal += explicit_answer(model, tokenizer, encoding, causal=True, max_new_tokens=NEW_TOKENS)
        assert sample["arguments"][0][0] == tokenizer.build_prompt(row["question"])
        assert sample["resps"][0][0] == answers[-1]
    assert answers != causal
    matches = sum(answer == row["answer"] for answer, row in zip(answers, ROWS)) / len(ROWS)
    assert results["results"]["hrm_text_generation"]["exact_match,none"] == matches


@torch.no_grad()
def log_likelihood(model, tokenizer, row, choice, causal=False):
    prompt, answer = (tokenizer(text)["input_ids"] for text in (tokenizer.build_prompt(row["question"]), choice))
    ids = torch.tensor([prompt + answer])
    types = torch.tensor([[int(not causal)] * len(prompt) + [0] * len(answer)])
    scores = model(ids, token_type_ids=types).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    return float(scores.gather(1, torch.tensor(answer)[:, None]).sum())


def test_log_likelihood(results, loaded):
    model, tokenizer = loaded
    right, distance = 0, 0.0
    for row, sample in zip(ROWS, samples(results, "hrm_text_choice")):
        explicit = [log_likelihood(model, tokenizer, row, choice) for choice in row["choices"]]
        scored = [float(response[0][0]) for response in sample["resps"]]
        assert scored == pytest.approx(explicit, abs=1e-3)
        right += row["choices"][explicit.index(max(explicit))] == row["answer"]
        causal = [log_likelihood(model, tokenizer, row, choice, causal=True) for choice in row["choices"]]
        distance = max(distance, *(abs(a - b) for a, b in zip(explicit, causal)))
    assert distance > 0.1
    assert results["results"]["hrm_text_choice"]["acc,none"] == right / len(ROWS)


def test_a_task_without_an_envelope_warns(folder, tmp_path, caplog):
    """It is read causally, and the message shows the envelope."""
    from transformers.utils import logging

    logger = logging.get_logger("transformers")
    logger.addHandler(caplog.handler)
    try:
        run_tasks(folder, tmp_path, "{{question}}", with_template=False)
    finally:
        logger.removeHandler(caplog.handler)
    assert "holds no prefix block" in caplog.text and "<|im_start|>" in caplog.text
