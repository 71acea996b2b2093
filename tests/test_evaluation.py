"""The authors' benchmarks: prompts, scores, and how lm-eval and the model read them."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from random import Random

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from evaluation import paper
from evaluation.scoring import boxed, letter_scorer, score_gsm8k, score_math, whole_number
from evaluation.tasks import BENCHMARKS, MATH_PARTS, SUBJECTS, arc_choices, mmlu_choices, tasks

from .serving import explicit_answer, make_folder
from .tiny import ROOT


ROWS = ROOT / "evaluation" / "rows"
# MATH has a checker of its own, and prompts like those of GSM8K.
RUN = ["gsm8k", "drop", "arc", "mmlu"]


def rows_of(name: str) -> list[dict]:
    return [json.loads(line) for line in (ROWS / f"{name}.jsonl").read_text().splitlines()]


# ---- scores ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"So \boxed{41}.", "41"),
        (r"\boxed{1}, no, \boxed{ \frac{1}{2} }", r"\frac{1}{2}"),
        (r"\fbox{7}", "7"),
        (r"\boxed{{3}", None),
        (r"\boxed 3", None),
        ("41", None),
        ("", None),
    ],
)
def test_what_is_boxed(text, content):
    assert boxed(text) == content


@pytest.mark.parametrize(
    ("text", "number"),
    [("1,200", 1200), ("$18", 18), (r"The sum is \boxed{75}.", 75), ("75.0", 75), (" -3 ", -3)]
    + [(text, None) for text in ("The answer is 75.", "", "nan", "inf", "1e999", r"\boxed{x}")],
)
def test_numbers_of_gsm8k(text, number):
    assert whole_number(text) == number
    doc = {"answer": "First 70, then 5.\n#### 75"}
    assert score_gsm8k(doc, [text]) == {"acc": float(number == 75), "invalid": float(number is None)}


@pytest.mark.parametrize(
    ("text", "score", "invalid"),
    [("C", 1, 0), (" c\n", 1, 0), ("A", 0, 0), ("D", 1 / 3, 1), ("CC", 1 / 3, 1), ("", 1 / 3, 1)],
)
def test_what_is_no_letter_counts_as_a_guess(text, score, invalid):
    arc = {"choices": {"text": ["8", "7", "9"], "label": ["1", "2", "3"]}, "answerKey": "3"}
    assert letter_scorer(arc_choices)(arc, [text]) == {"acc": score, "invalid": invalid}
    mmlu = {"choices": ["8", "7", "9"], "answer": 2}
    assert letter_scorer(mmlu_choices)(mmlu, [text]) == {"acc": score, "invalid": invalid}


def test_formulas_of_math():
    if importlib.util.find_spec("math_verify") is None:
        # What a user without it is told, before a model loads.
        with pytest.raises(ImportError, match="math-verify"):
            paper.run(paper.parse_arguments(["--model", "/nonexistent", "--only", "math"]))
        return
    doc = {"solution": r"Hence $\boxed{\frac{1}{2}}$."}
    for text, right in ((r"\boxed{0.5}", 1), (r"It is $\boxed{\dfrac{1}{2}}$", 1), (r"\boxed{2}", 0), ("no idea", 0)):
        assert score_math(doc, [text])["acc"] == right, text


def test_a_mean_over_parts_and_one_over_questions():
    parts = {"one": [{"acc": 1.0, "invalid": 0.0}] * 3, "two": [{"acc": 0.0, "invalid": 1.0}]}
    assert paper.summarize("mmlu", {"samples": parts})["score"] == 50
    assert paper.summarize("arc", {"samples": parts})["score"] == 75
    assert paper.summarize("arc", {"samples": parts})["metrics"]["invalid"] == 25


# ---- tasks -----------------------------------------------------------------------------------------------------


def test_the_parts_of_a_benchmark():
    lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is an extra")
    folder = Path(lm_eval.__file__).parent / "tasks"
    subjects = {path.stem.removeprefix("mmlu_") for path in (folder / "mmlu" / "default").glob("mmlu_*.yaml")}
    assert set(SUBJECTS) == subjects and len(SUBJECTS) == 57
    yaml = (path.read_text() for path in (folder / "minerva_math").glob("minerva_math_*.yaml"))
    parts = {match[1] for match in (re.search(r"^dataset_name: (\w+)$", text, re.MULTILINE) for text in yaml) if match}
    assert set(MATH_PARTS) == parts
    shots = {task["dataset_name"]: task["num_fewshot"] for task in tasks("mmlu", 4096)}
    assert shots.pop("high_school_european_history") == 3 and set(shots.values()) == {5}
    assert len(tasks("math", 4096)) == 7 and tasks("arc", 4096)[0]["num_fewshot"] == 25


@pytest.mark.parametrize("name", BENCHMARKS)
def test_answers_have_room(name):
    pytest.importorskip("lm_eval", reason="lm-eval is an extra")
    tokens = {"math": 2048, "gsm8k": 2048, "drop": 256, "arc": 1, "mmlu": 1}[name]
    for context in (4096, 256):
        generation = tasks(name, context)[0]["generation_kwargs"]
        assert generation == {"until": [], "do_sample": False, "max_gen_toks": min(tokens, context // 2)}


def test_solved_examples_of_drop_are_about_different_passages():
    pytest.importorskip("lm_eval", reason="lm-eval is an extra")
    from datasets import Dataset

    from evaluation.tasks import one_of_each_passage

    found = one_of_each_passage(Dataset.from_list(rows_of("drop_shots")))
    assert [doc["answers"][0][0] for doc in found] == ["7", "8"]


def test_missing_rows_are_named(tmp_path, capsys):
    pytest.importorskip("lm_eval", reason="lm-eval is an extra")
    (tmp_path / "arc.jsonl").write_text("{}\n")
    assert paper.main(["--model", "/nonexistent", "--only", "arc", "--data", str(tmp_path)]) == 1
    assert "arc_shots.jsonl is missing" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["--model", "x", "--limit", "0"], ["--model", "x", "--only", "boolq"]])
def test_wrong_arguments(arguments):
    with pytest.raises(SystemExit) as stopped:
        paper.parse_arguments(arguments)
    assert stopped.value.code == 2


def test_the_librarys_class_is_refused():
    pytest.importorskip("lm_eval", reason="lm-eval is an extra")
    library = pytest.importorskip("transformers.models.hrm_text", reason="this transformers has no HRM-Text")
    model = library.HrmTextForCausalLM.from_pretrained(ROOT)
    tokenizer = AutoTokenizer.from_pretrained(ROOT)
    with pytest.raises(ValueError, match="not the class of this repository"):
        paper.evaluate(model, tokenizer, ["gsm8k"], ROWS)


# ---- through lm-eval -------------------------------------------------------------------------------------------


def lettered(question: str, choices: list[str]) -> str:
    return f"{question}\n" + "".join(f"{'ABCD'[i]}. {choice}\n" for i, choice in enumerate(choices)) + "Answer:"


def prompt_texts(name: str) -> list[str]:
    """The messages in the authors' form, written down once more."""
    if name == "gsm8k":
        return [row["question"] for row in rows_of(name)]
    if name == "drop":
        form = "{passage}\nQ: {question}\nA:"
        shots = [form.format(**row) + " " + row["answer"]["number"] for row in rows_of("drop_shots")]
        return ["\n\n".join([*shots, form.format(**row)]) for row in rows_of(name)]
    if name == "arc":
        shots = [
            lettered(row["question"], row["choices"]["text"]) + " " + row["answerKey"] for row in rows_of("arc_shots")
        ]
        return ["\n\n".join([*shots, lettered(row["question"], row["choices"]["text"])]) for row in rows_of(name)]
    shots = [lettered(row["question"], row["choices"]) + f" {'ABCD'[row['answer']]}" for row in rows_of("mmlu_shots")]
    return ["\n\n".join([*shots, lettered(row["question"], row["choices"])]) for row in rows_of(name)]


@pytest.fixture(scope="module", params=["random", "nano"])
def loaded(request, tmp_path_factory):
    pytest.importorskip("lm_eval", reason="lm-eval is an extra")
    folder = ROOT if request.param == "nano" else make_folder(tmp_path_factory.mktemp("evaluation") / "model")
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
    if request.param == "random":
        model.config.max_position_embeddings = 320  # the answers of random weights do not end by themselves
    return model, AutoTokenizer.from_pretrained(folder, trust_remote_code=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", RUN)
def test_prompts_are_blocks_and_answers_causal(loaded, name):
    """Each answer is the greedy one to the authors' prompt with explicit types."""
    model, tokenizer = loaded
    scores = paper.evaluate(model, tokenizer, [name], ROWS, batch_size=2)[name]
    condition = BENCHMARKS[name].condition
    tokens = tasks(name, model.config.max_position_embeddings, ROWS)[0]["generation_kwargs"]["max_gen_toks"]
    texts = prompt_texts(name)
    found = sorted(scores["samples"], key=lambda sample: sample["doc_id"])
    assert scores["questions"] == len(texts) == len(found)
    too_long = 0
    for text, sample in zip(texts, found):
        assert sample["arguments"][0][0] == tokenizer.build_prompt(text, condition)
        encoding = tokenizer.encode_prompt(text, condition, return_tensors="pt")
        if encoding["input_ids"].shape[1] + tokens > model.config.max_position_embeddings:
            too_long += 1
            assert sample["resps"][0][0] == ""
            continue
        (answer,) = explicit_answer(model, tokenizer, encoding, max_new_tokens=tokens)
        assert sample["resps"][0][0] == answer
    assert scores["too_long"] == too_long


@pytest.mark.slow
def test_a_prompt_that_does_not_fit_is_answered_with_nothing(loaded, tmp_path):
    model, tokenizer = loaded
    words = " ".join(str(Random(0).randrange(100)) for _ in range(2 * model.config.max_position_embeddings))
    rows = [{"question": f"{words}?", "answer": "#### 1"}, *rows_of("gsm8k")[1:2]]
    (tmp_path / "gsm8k.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    scores = paper.evaluate(model, tokenizer, ["gsm8k"], tmp_path)["gsm8k"]
    answers = [sample["resps"][0][0] for sample in sorted(scores["samples"], key=lambda sample: sample["doc_id"])]
    assert scores["too_long"] == 1 and answers[0] == "" and answers[1] != ""


@pytest.mark.slow
def test_the_command(tmp_path, capsys):
    pytest.importorskip("lm_eval", reason="lm-eval is an extra")
    output = tmp_path / "scores.json"
    arguments = ["--model", str(ROOT), "--data", str(ROWS), "--only", "gsm8k", "mmlu", "--device", "cpu"]
    assert paper.main([*arguments, "--output", str(output)]) == 0
    printed = capsys.readouterr().out
    assert (
        "| gsm8k | synth,cot | 0 | 3 | 0 |" in printed
        and "| mmlu | direct | 2 | 2 | 0 |" in printed
        and "do not compare" in printed
    )
    written = json.loads(output.read_text())
    assert set(written) == {"gsm8k", "mmlu"} and written["gsm8k"]["samples"][1]["resps"][0][0].endswith("75.")
