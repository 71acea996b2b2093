"""`python -m training.sft`: what it writes, LoRA, several processes, a kill, and trl's trainer with our collator."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from random import Random

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from training.data import PrefixLMCollator, encode_rows, read_rows
from training.hub_folder import save_nano
from training.nano_tasks import CONDITIONS, TASKS, draw
from training.sft import LORA_TARGETS, main
from training.trainer import read_log

from .tiny import ROOT, tiny_model


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(ROOT, trust_remote_code=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer) -> Path:
    """A small random model, as a folder."""
    path = tmp_path_factory.mktemp("model")
    save_nano(tiny_model(vocab_size=len(tokenizer), prefix_end_token_id=7), tokenizer, path)
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    rng = Random(0)
    rows = [draw(rng.choice(TASKS), rng, held_out=False).row(rng.choice(CONDITIONS)) for _ in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def command(folder: Path, data: Path, output: Path, *more: str) -> list[str]:
    return [
        *("--model", str(folder), "--data", str(data), "--output", str(output), "--cpu", "--batch-size", "4"),
        *("--learning-rate", "3e-3", "--warmup-steps", "2", "--logging-steps", "1", *more),
    ]


def losses(output: Path) -> list[float]:
    return [entry["loss"] for entry in read_log(output / "training" / "log.jsonl") if "loss" in entry]


def load(path: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}


def test_full_training_writes_a_complete_folder(folder, data, tokenizer, tmp_path, capsys):
    output = tmp_path / "out"
    assert (
        main(command(folder, data, output, "--max-steps", "6", "--held-out", "0.1", "--packed", "--length", "160"))
        == 0
    )
    summary = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert summary["rows"] == {"kept": 40, "empty": 0, "too_long": 0}
    assert summary["steps"] == 6 and summary["held_out"] == 4 and 0 <= summary["exact_match"] <= 1
    assert losses(output)[-1] < losses(output)[0] and summary["loss"] == losses(output)[-1]
    assert (output / "training" / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert {file.name for file in folder.iterdir()} - {file.name for file in output.iterdir()} == set()
    start, average, raw = (load(path) for path in (folder, output, output / "raw"))
    for name, parameter in start.named_parameters():
        moved = (raw.get_parameter(name) - parameter).abs().max() > 0
        assert moved == (name != "model.z_L_init"), name
    weight = "model.L_module.layers.0.attn.gqkv_proj.weight"
    distance = [(model.get_parameter(weight) - start.get_parameter(weight)).norm() for model in (average, raw)]
    assert 0 < distance[0] < distance[1]
    prompt = AutoTokenizer.from_pretrained(output, trust_remote_code=True).encode_prompt("1 + 1", return_tensors="pt")
    assert average.generate(**prompt, max_new_tokens=2).shape[1] > prompt["input_ids"].shape[1]


def test_bfloat16_checkpointing_and_no_average(folder, data, tmp_path):
    output = tmp_path / "out"
    options = ("--bf16", "--gradient-checkpointing", "--average", "0", "--max-steps", "4", "--held-out", "0")
    assert main(command(folder, data, output, *options)) == 0
    assert losses(output)[-1] < losses(output)[0]
    assert load(output).dtype == torch.float32 and load(output).config.use_cache  # as it came
    assert not (output / "raw").exists()


def test_lora_adapters_load_merge_and_unload(folder, data, tokenizer, tmp_path):
    peft = pytest.importorskip("peft")
    output = tmp_path / "adapter"
    assert (
        main(
            command(
                folder,
                data,
                output,
                "--lora",
                "4",
                "--max-steps",
                "12",
                "--learning-rate",
                "1e-2",
                "--held-out",
                "0.1",
            )
        )
        == 0
    )
    assert losses(output)[-1] < losses(output)[0]
    assert not list(output.glob("model*.safetensors"))
    prompt = tokenizer.encode_prompt("What is 4 + 5?", return_tensors="pt")
    base = load(folder).eval()
    with torch.no_grad():
        plain = base(**prompt).logits
        adapted_model = peft.PeftModel.from_pretrained(load(folder), str(output)).eval()
        kinds = {
            name.split(".lora_")[0].rsplit(".", 1)[-1]
            for name, _ in adapted_model.named_parameters()
            if "lora_" in name
        }
        assert kinds == set(LORA_TARGETS)
        adapted = adapted_model(**prompt).logits
        assert not torch.allclose(adapted, plain, atol=1e-4)
        generated = adapted_model.generate(**prompt, max_new_tokens=4, do_sample=False)
        with adapted_model.disable_adapter():
            torch.testing.assert_close(adapted_model(**prompt).logits, plain)
        merged = adapted_model.merge_and_unload()
        assert type(merged).__name__ == "HrmTextForCausalLM"
        torch.testing.assert_close(merged(**prompt).logits, adapted, atol=1e-5, rtol=1e-4)
        merged.save_pretrained(tmp_path / "merged")
        torch.testing.assert_close(load(tmp_path / "merged")(**prompt).logits, adapted, atol=1e-5, rtol=1e-4)
        assert torch.equal(merged.generate(**prompt, max_new_tokens=4, do_sample=False), generated)
        again = peft.PeftModel.from_pretrained(load(folder), str(output))
        torch.testing.assert_close(again.unload()(**prompt).logits, plain)


def test_two_processes_at_two_gradient_steps_are_one(folder, data, tmp_path):
    """The embedding gets no gradient there, which DDP must be told; with checkpointing, too."""
    options = ("--max-steps", "4", "--gradient-steps", "2", "2", "--held-out", "0", "--gradient-checkpointing")
    assert main(command(folder, data, tmp_path / "one", *options)) == 0
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    two = command(folder, data, tmp_path / "two", *options, "--batch-size", "2")
    subprocess.run([*launch, "-m", "training.sft", *two], check=True, env=environment(), cwd=tmp_path, timeout=500)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    ours, theirs = load(tmp_path / "one"), load(tmp_path / "two")
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(theirs.get_parameter(name), parameter, atol=2e-4, rtol=1e-3, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize(
    "more", [(), ("--lora", "4"), ("--gradient-steps", "2", "2"), ("--packed", "--length", "128")]
)
def test_two_processes(folder, data, tmp_path, more):
    options = ("--max-steps", "4", "--held-out", "0.1", *more)
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    arguments = command(folder, data, tmp_path / "two", *options)
    subprocess.run(
        [*launch, "-m", "training.sft", *arguments], check=True, env=environment(), cwd=tmp_path, timeout=900
    )
    assert losses(tmp_path / "two")[-1] < losses(tmp_path / "two")[0]
    assert len(list((tmp_path / "two" / "training" / "checkpoint-4").glob("average_*.pt"))) == 2
    assert "exact_match" in json.loads((tmp_path / "two" / "training" / "summary.json").read_text())


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_loss(folder, data, tmp_path):
    options = ("--max-steps", "30", "--save-steps", "5", "--held-out", "0")
    assert main(command(folder, data, tmp_path / "whole", *options)) == 0
    arguments = [sys.executable, "-m", "training.sft", *command(folder, data, tmp_path / "cut", *options)]
    process = subprocess.Popen(arguments, env=environment(), cwd=tmp_path)
    deadline = time.monotonic() + 300
    while not (tmp_path / "cut" / "training" / "checkpoint-10" / "average_0.pt").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "cut" / "model.safetensors").exists()
    subprocess.run(arguments, check=True, env=environment(), cwd=tmp_path, timeout=300)
    assert losses(tmp_path / "cut") == pytest.approx(losses(tmp_path / "whole"), rel=1e-6)
    whole, cut = load(tmp_path / "whole"), load(tmp_path / "cut")
    for name, parameter in whole.named_parameters():
        torch.testing.assert_close(cut.get_parameter(name), parameter, msg=name)


def test_going_on_with_other_options_is_refused(folder, data, tmp_path, capsys):
    output = tmp_path / "out"
    assert main(command(folder, data, output, "--max-steps", "2", "--held-out", "0")) == 0
    assert main(command(folder, data, output, "--max-steps", "3", "--held-out", "0")) == 1
    assert "other options (max_steps)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "code", "message"),
    [
        (("--length", "5"), 1, "nothing to train on"),
        (("--data", "nowhere.jsonl"), 1, "nowhere.jsonl"),
        (("--batch-size", "0"), 2, "--batch-size 0"),
        (("--held-out", "1"), 2, "--held-out 1"),
        (("--learning-rate", "0"), 2, "--learning-rate 0"),
        (("--gradient-steps", "1", "5"), 1, "first=1"),
    ],
)
def test_what_cannot_be_is_refused(folder, data, tmp_path, capsys, more, code, message):
    try:
        assert main(command(folder, data, tmp_path / "out", *more)) == code
    except SystemExit as stop:
        assert stop.code == code
    assert message in capsys.readouterr().err


def test_the_model_is_not_replaced_by_its_own_offspring(folder, data, capsys):
    with pytest.raises(SystemExit):
        main(command(folder, data, folder))
    assert "choose another" in capsys.readouterr().err


def test_trl_trains_with_our_collator(folder, data, tokenizer, tmp_path):
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    examples, _ = encode_rows(read_rows(data), tokenizer, 200)
    model = load(folder).train()
    seen = []
    model.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True)
    trainer = trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(
            output_dir=str(tmp_path),
            max_steps=5,
            per_device_train_batch_size=4,
            learning_rate=3e-3,
            logging_steps=1,
            use_cpu=True,
            bf16=False,
            report_to=[],
            remove_unused_columns=False,
            dataset_kwargs={"skip_prepare_dataset": True},
        ),
        train_dataset=datasets.Dataset.from_list(examples),
        data_collator=PrefixLMCollator(tokenizer.pad_token_id),
        processing_class=tokenizer,
    )
    trainer.train()
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == 5 and logged[-1] < logged[0]
    for inputs in seen:
        assert torch.equal(inputs["labels"] == -100, (inputs["token_type_ids"] == 1) | (inputs["attention_mask"] == 0))
