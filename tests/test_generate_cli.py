"""generate.py, the command behind `make run`."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from generate import main

from .serving import QUESTIONS, explicit_answer, make_folder
from .tiny import ROOT


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(make_folder(tmp_path_factory.mktemp("cli") / "model"))


@pytest.fixture(scope="module")
def loaded(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    return model, AutoTokenizer.from_pretrained(folder, trust_remote_code=True)


def test_it_prints_the_answer_and_nothing_else(folder, loaded):
    model, tokenizer = loaded
    (answer,) = explicit_answer(model, tokenizer, tokenizer.encode_prompt(QUESTIONS[0], return_tensors="pt"))
    done = subprocess.run(
        [sys.executable, str(ROOT / "generate.py"), QUESTIONS[0], "--model", folder],
        capture_output=True,
        text=True,
        cwd=os.path.expanduser("~"),
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )
    assert (done.returncode, done.stdout) == (0, answer + "\n"), done.stderr


@pytest.mark.parametrize("stream", [[], ["--stream"]], ids=["whole", "streamed"])
def test_condition_length_device_and_stream(folder, loaded, capsys, stream):
    model, tokenizer = loaded
    question = "What is <|im_end|> 1?"
    encoding = tokenizer.encode_prompt(question, "synth,cot", return_tensors="pt")
    (answer,) = explicit_answer(model, tokenizer, encoding, max_new_tokens=7)
    options = ["--condition", "synth,cot", "--max-new-tokens", "7", "--device", "cpu", *stream]
    assert main([question, "--model", folder, *options]) == 0
    assert capsys.readouterr().out == answer + "\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--condition", "loud"], "known are direct, cot, noisy, synth"),
        (["--model", "/nonexistent/folder"], "/nonexistent/folder"),
        (["--device", "warp:7"], "warp"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(folder, capsys, arguments, message):
    assert main(["question", *(arguments if "--model" in arguments else ["--model", folder, *arguments])]) == 1
    printed = capsys.readouterr()
    assert printed.out == "" and message in printed.err.splitlines()[-1]
    assert printed.err.splitlines()[-1].startswith("error: ")


@pytest.mark.parametrize(("arguments", "message"), [([], "question"), (["q", "--max-new-tokens", "0"], "at least 1")])
def test_wrong_arguments_exit_with_2(capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_help_shows_examples(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0 and "examples:" in capsys.readouterr().out
