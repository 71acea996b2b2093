"""generate.py, run as a user runs it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from .serving import QUESTIONS, explicit_answer, make_folder
from .tiny import ROOT


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("cli") / "model")


@pytest.fixture(scope="module")
def loaded(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    return model, AutoTokenizer.from_pretrained(folder, trust_remote_code=True)


def run(*arguments):
    return subprocess.run(
        [sys.executable, str(ROOT / "generate.py"), *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=os.path.expanduser("~"),
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )


def test_it_prints_the_answer_and_nothing_else(folder, loaded):
    model, tokenizer = loaded
    question = "What is <|im_end|> 1?"
    encoding = tokenizer.encode_prompt(question, "synth,cot", return_tensors="pt")
    (answer,) = explicit_answer(model, tokenizer, encoding, max_new_tokens=7)
    arguments = (question, "--model", folder, "--condition", "synth,cot", "--max-new-tokens", 7, "--device", "cpu")
    done = run(*arguments)
    assert (done.returncode, done.stdout) == (0, answer + "\n"), done.stderr
    assert run(*arguments, "--stream").stdout == answer + "\n"


def test_the_defaults_are_the_models(folder, loaded):
    model, tokenizer = loaded
    (answer,) = explicit_answer(model, tokenizer, tokenizer.encode_prompt(QUESTIONS[0], return_tensors="pt"))
    assert run(QUESTIONS[0], "--model", folder).stdout == answer + "\n"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["q", "--condition", "loud"], 1, "known are direct, cot, noisy, synth"),
        (["q", "--model", "/nonexistent/folder"], 1, "/nonexistent/folder"),
        (["q", "--max-new-tokens", "0"], 2, "at least 1"),
        ([], 2, "question"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(folder, arguments, code, message):
    done = run(*arguments, *([] if "--model" in arguments else ["--model", folder]))
    assert done.returncode == code and done.stdout == ""
    assert message in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr


def test_help_shows_examples():
    done = run("--help")
    assert done.returncode == 0 and "examples:" in done.stdout and "--condition" in done.stdout
