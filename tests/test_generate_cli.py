"""generate.py, the command behind `make run`."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from generate import main
from inside import look_inside

from .serving import NEW_TOKENS, QUESTIONS, explicit_answer, make_folder
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
        timeout=300,
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
        (["--inside", "/nonexistent/folder/thinking.png"], "/nonexistent/folder"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(folder, capsys, arguments, message):
    assert main(["question", *(arguments if "--model" in arguments else ["--model", folder, *arguments])]) == 1
    printed = capsys.readouterr()
    assert printed.out == "" and message in printed.err.splitlines()[-1]
    assert printed.err.splitlines()[-1].startswith("error: ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [([], "question"), (["q", "--max-new-tokens", "0"], "at least 1"), (["q", "--inside", "x.docx"], ".png")],
)
def test_wrong_arguments_exit_with_2(capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_help_shows_examples(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0 and "examples:" in capsys.readouterr().out


def test_inside_draws_what_plain_forwards_say(folder, loaded, tmp_path, capsys):
    """The last cycle reads what the model answers; earlier ones are those of a model with fewer cycles."""
    model, tokenizer = loaded
    prompt = tokenizer.encode_prompt(QUESTIONS[0], return_tensors="pt")
    output = model.generate(**prompt)
    length = prompt["input_ids"].shape[1]
    inside = look_inside(model, output, length)
    assert inside.answer.tolist() == output[0, length:].tolist()
    assert inside.calls == ["L 1.1", "L 1.2", "L 1.3", "H 1", "L 2.1", "L 2.2", "L 2.3", "H 2"]
    assert inside.readings.shape == (2, NEW_TOKENS) and inside.moves.shape == (8, NEW_TOKENS)
    types = torch.zeros_like(output)
    types[:, :length] = 1
    for cycles, probabilities in enumerate(inside.probabilities, start=1):
        shallow = AutoModelForCausalLM.from_pretrained(
            folder, trust_remote_code=True, H_cycles=cycles, L_bp_cycles=[3] * cycles
        )
        with torch.no_grad():
            logits = shallow(output, token_type_ids=types).logits[0, length - 1 : -1]
        expected = logits.softmax(-1).gather(1, inside.answer[:, None])[:, 0]
        assert torch.allclose(probabilities, expected, atol=1e-4)
        assert inside.readings[cycles - 1].tolist() == logits.argmax(-1).tolist()
    picture = tmp_path / "thinking.png"
    assert main([QUESTIONS[0], "--model", folder, "--inside", str(picture)]) == 0
    assert capsys.readouterr().out.strip() and picture.read_bytes().startswith(b"\x89PNG")


def test_the_moves_are_those_of_the_loop(loaded):
    """The formulas of the model, written down once more: the change of each state over its norm before."""
    model, tokenizer = loaded
    prompt = tokenizer.encode_prompt(QUESTIONS[1], return_tensors="pt")
    ids = torch.cat([prompt["input_ids"], torch.tensor([[20, 21]])], dim=1)
    inside = look_inside(model, ids, ids.shape[1] - 2)
    outputs = []
    modules = (model.model.L_module, model.model.H_module)
    hooks = [module.register_forward_hook(lambda _m, _i, output: outputs.append(output[0])) for module in modules]
    with torch.no_grad():
        model(ids)
        z_H = model.model.embed_tokens(ids)[0] * model.config.embedding_scale
    for hook in hooks:
        hook.remove()
    z_L = model.model.z_L_init.expand_as(z_H)
    assert len(outputs) == len(inside.calls) == 8
    for name, state, moves in zip(inside.calls, outputs, inside.moves):
        before = z_H if name.startswith("H") else z_L
        expected = ((state - before).norm(dim=-1) / before.norm(dim=-1))[-3:-1]
        assert torch.allclose(moves, expected, atol=1e-4), name
        z_H, z_L = (state, z_L) if name.startswith("H") else (z_H, state)


@pytest.mark.parametrize(
    ("shape", "length", "message"), [((2, 9), 4, "one row"), ((1, 9), 9, "no answer"), ((1, 9), 0, "no answer")]
)
def test_inside_needs_one_row_and_an_answer(loaded, shape, length, message):
    with pytest.raises(ValueError, match=message):
        look_inside(loaded[0], torch.ones(shape, dtype=torch.long), length)
