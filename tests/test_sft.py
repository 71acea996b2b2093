"""`python -m training.sft`: what it writes, LoRA, several processes, a kill, and trl's trainer with our collator."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from random import Random

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from training.credit import GradientStepsWarmup
from training.data import EMPTY, TOO_LONG, EncodingReport, PrefixLMCollator, encode_rows, read_rows
from training.hub_folder import save_nano
from training.nano_tasks import CONDITIONS, TASKS, draw
from training.sft import LORA_TARGETS, main

from .test_formats import write_tokens
from .tiny import ROOT, tiny_model


NOTHING = EncodingReport().left_out


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


def losses(output: Path, name: str = "loss") -> list[float]:
    log = json.loads((output / "training" / "trainer_state.json").read_text())["log_history"]
    return [entry[name] for entry in log if name in entry]


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
    assert summary["rows"] == {"kept": 40, "left_out": NOTHING}
    assert summary["steps"] == 6 and summary["held_out"] == 4 and 0 <= summary["exact_match"] <= 1
    assert losses(output)[-1] < losses(output)[0] and summary["loss"] == losses(output)[-1]
    rates = losses(output, "learning_rate")
    assert rates[:2] == pytest.approx([1.5e-3, 3e-3]) and rates[2:] == sorted(rates[2:], reverse=True)
    assert rates[-1] == pytest.approx(3e-4)
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


def test_chats_from_a_datasets_folder(folder, tmp_path, capsys):
    datasets = pytest.importorskip("datasets")

    def chat(*texts: str) -> dict:
        return {"messages": [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]}

    rows = [chat(f"What is {i} + {i}?", f"{2 * i}", "And one more?", f"{2 * i + 1}") for i in range(6)]
    rows += [chat("What is 1 + 1?", " "), chat("What is 1 + 1?"), chat("2" * 90, "3")]
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "chats"))
    output = tmp_path / "out"
    options = ("--condition", "synth,cot", "--length", "80", "--packed", "--epochs", "3", "--accumulate", "2")
    assert main(command(folder, tmp_path / "chats", output, *options, "--held-out", "0.2")) == 0
    summary = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert summary["rows"] == {"kept": 6, "left_out": {**NOTHING, EMPTY: 2, TOO_LONG: 1}}
    assert summary["held_out"] == 1 and summary["steps"] == 3
    assert json.loads((output / "training" / "summary.json").read_text()) == summary


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
        stored = load_file(output / "adapter_model.safetensors")
        assert {value.dtype for value in stored.values()} == {torch.float32}
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


def test_recurrence_multiplies_what_an_adapter_does(tokenizer):
    """What the README says of Nano: the same change of rank 8 and 1 % everywhere moves a deeper recurrence further."""
    texts = ["What is 48 + 27?", "Reverse the word stone.", "Sort 52, 7, 19 in ascending order."]
    prompt = tokenizer.encode_prompt(texts, "synth,cot", padding=True, return_tensors="pt")
    real = prompt["attention_mask"].bool()
    moved = []
    for cycles in ({"H_cycles": 1, "L_cycles": 1}, {}, {"H_cycles": 4, "L_cycles": 3}):
        model = AutoModelForCausalLM.from_pretrained(ROOT, trust_remote_code=True, **cycles).model
        weights = [weight for name, weight in model.named_parameters() if name.endswith("_proj.weight")]
        originals = [weight.detach().clone() for weight in weights]
        with torch.no_grad():
            before = model(**prompt).last_hidden_state[real]
            changes = []
            for seed in range(3):
                torch.manual_seed(seed)
                for weight, original in zip(weights, originals):
                    change = torch.randn(weight.shape[0], 8) @ torch.randn(8, weight.shape[1])
                    weight.copy_(original + 0.01 * change * (original.norm() / change.norm()))
                after = model(**prompt).last_hidden_state[real]
                changes.append(((after - before).norm() / before.norm()).item())
        moved.append(sum(changes) / len(changes))
    assert len(weights) == 16
    assert moved[0] < 0.012 and moved[1] > 1.5 * moved[0] and moved[2] > 1.5 * moved[1], moved


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
    # So named, its launcher starts several processes on processors too; with --cpu it would need MPI for that.
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    arguments = command(folder, data, tmp_path / "two", *options)
    subprocess.run(
        [*launch, "-m", "training.sft", *arguments], check=True, env=environment(), cwd=tmp_path, timeout=900
    )
    if "--packed" in more:  # few rows, which two processes share out in another way
        assert losses(tmp_path / "two")[-1] < losses(tmp_path / "two")[0]
    else:
        assert main(command(folder, data, tmp_path / "one", *options, "--batch-size", "8")) == 0
        assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    work = tmp_path / "two" / "training"
    assert json.loads((work / "options.json").read_text())["processes"] == "2"
    assert [file.name for file in (work / "checkpoint-4").glob("average_*")] == ["average_0.pt"]
    summary = json.loads((work / "summary.json").read_text())
    assert summary["held_out"] == 4 and 4 * summary["exact_match"] in range(5)


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), ("--lora", "4"), ("--gradient-steps", "2", "2", "--gradient-checkpointing")])
def test_shards_train_as_one_process_and_go_on_from_a_checkpoint(folder, data, tmp_path, more):
    options = ("--max-steps", "4", "--save-steps", "2", "--held-out", "0.1", *more)
    assert main(command(folder, data, tmp_path / "one", *options)) == 0
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    launch += ["-m", "tests.fsdp_on_processors"]
    arguments = command(folder, data, tmp_path / "two", *options, "--batch-size", "2", "--fsdp")
    for _ in range(2):
        subprocess.run([*launch, *arguments], check=True, env=environment(), cwd=tmp_path, timeout=900)
        one, two = (tmp_path / name / "training" for name in ("one", "two"))
        assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-3)
        assert len(list((two / "checkpoint-2").glob("average_*.pt"))) == 2
        judged = [json.loads((work / "summary.json").read_text())["exact_match"] for work in (one, two)]
        assert judged[0] == judged[1]
        shutil.rmtree(two / "checkpoint-4")
        (two / "summary.json").unlink()
    assert {file.name for file in (tmp_path / "two").iterdir()} == {file.name for file in (tmp_path / "one").iterdir()}
    name = "adapter_model.safetensors" if "--lora" in more else "model.safetensors"
    for part in ("", "raw"):
        ours, theirs = (load_file(tmp_path / run / part / name) for run in ("one", "two"))
        assert ours.keys() == theirs.keys()
        for key, value in ours.items():
            torch.testing.assert_close(theirs[key], value, atol=5e-4, rtol=1e-3, msg=lambda m, key=key: f"{key}: {m}")


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
    assert process.wait(timeout=60) == -signal.SIGKILL
    assert not (tmp_path / "cut" / "model.safetensors").exists()
    subprocess.run(arguments, check=True, env=environment(), cwd=tmp_path, timeout=300)
    assert losses(tmp_path / "cut") == pytest.approx(losses(tmp_path / "whole"), rel=1e-6)
    whole, cut = load(tmp_path / "whole"), load(tmp_path / "cut")
    for name, parameter in whole.named_parameters():
        torch.testing.assert_close(cut.get_parameter(name), parameter, msg=name)


def test_without_matplotlib_only_the_picture_is_missing(folder, data, tmp_path, monkeypatch, capsys, caplog):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(command(folder, data, tmp_path, "--max-steps", "2", "--held-out", "0")) == 0
    assert json.loads((tmp_path / "training" / "summary.json").read_text())["steps"] == 2
    assert "no loss.png: curves are drawn with matplotlib" in caplog.text
    assert not (tmp_path / "training" / "loss.png").exists()


def test_an_adapter_on_the_output_head(folder, data, tmp_path):
    pytest.importorskip("peft")
    options = ("--lora", "4", "--lora-targets", "lm_head", "o_proj", "--max-steps", "3", "--held-out", "0")
    assert main(command(folder, data, tmp_path, *options, "--learning-rate", "1e-2")) == 0
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert all("lora_" in name for name in stored) and any("lm_head" in name for name in stored)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["lora_alpha"] == 64
    # An adapter of the L stack acts L_cycles times where one of the H stack acts once.
    cycles = load(folder).config.L_cycles
    assert cycles > 1 and config["alpha_pattern"]
    for name, alpha in config["alpha_pattern"].items():
        assert "L_module" in name and name.endswith("o_proj") and alpha == pytest.approx(64 / cycles)
    assert losses(tmp_path)[-1] < losses(tmp_path)[0]


def test_tokens_that_only_the_output_head_can_learn_are_named(tmp_path, caplog):
    """In Nano the rows of all tokens that it was never trained on are one: below them nothing tells them apart."""
    pytest.importorskip("peft")
    file = tmp_path / "rows.jsonl"
    options = ("--lora", "2", "--max-steps", "1", "--held-out", "0", "--lora-targets", "o_proj")
    for number, (answer, more, warned) in enumerate((("[7]", (), 1), ("[7]", ("lm_head",), 0), ("7", (), 0))):
        caplog.clear()
        file.write_text(json.dumps({"instruction": "3 + 4", "response": answer}) + "\n")
        assert main(command(ROOT, file, tmp_path / str(number), *options, *more)) == 0
        said = [each.getMessage() for each in caplog.records if "--lora-targets" in each.getMessage()]
        assert len(said) == warned
        assert all(text.startswith("2 labels are tokens") and "([, ])" in text for text in said)


def test_fields_that_are_unknown_or_left_aside(folder, tmp_path, capsys):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"instruction": "a", "output": str(n), "id": n}) + "\n" for n in range(4)))
    options = ("--max-steps", "1", "--held-out", "0")
    assert main(command(folder, file, tmp_path / "out", *options)) == 1
    assert "row 1: the field `id` is unknown beside `instruction`" in capsys.readouterr().err
    assert main(command(folder, file, tmp_path / "out", *options, "--ignore-fields", "id")) == 0
    assert json.loads(capsys.readouterr().out.strip().splitlines()[-1])["rows"]["kept"] == 4


def test_a_folder_of_tokens(folder, data, tokenizer, tmp_path, capsys):
    examples, _ = encode_rows(read_rows(data), tokenizer, 200)
    splits = [example["labels"].count(-100) for example in examples]
    pairs = [(example["input_ids"][:at], example["input_ids"][at:]) for example, at in zip(examples, splits)]
    write_tokens(tmp_path / "tokens", pairs, tmp_path / "tokens" / "epoch_0")
    options = ("--max-steps", "2", "--held-out", "0")
    assert main(command(folder, data, tmp_path / "texts", *options)) == 0
    assert main(command(folder, tmp_path / "tokens", tmp_path / "ids", *options)) == 0
    assert losses(tmp_path / "ids") == losses(tmp_path / "texts")
    assert main(command(folder, tmp_path / "tokens", tmp_path / "no", *options, "--condition", "direct")) == 1
    assert "holds ids: leave --condition" in capsys.readouterr().err


def test_going_on_with_other_options_is_refused(folder, data, tmp_path, capsys):
    output = tmp_path / "out"
    assert main(command(folder, data, output, "--max-steps", "2", "--held-out", "0")) == 0
    assert main(command(folder, data, output, "--max-steps", "3", "--held-out", "0")) == 1
    assert "other options (max_steps)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "code", "message"),
    [
        (
            ("--length", "5"),
            1,
            "nothing to train on (40 rows: 0 kept, 0 without a response, 0 of weight 0, 40 too long)",
        ),
        (("--lora", "4", "--lora-targets", "q_proj"), 1, "--lora-targets q_proj: the linear layers are down_proj"),
        (("--data", "nowhere.jsonl"), 1, "nowhere.jsonl: there is no such file"),
        (("--model", "./nowhere"), 1, "nowhere"),
        (("--condition", "chatty"), 1, "--condition chatty: unknown"),
        (("--gradient-steps", "2", "9"), 1, "--gradient-steps ends at 9 and this model makes 8"),
        (("--gradient-steps", "1", "5"), 2, "--gradient-steps 1 5"),
        (("--gradient-warmup", "2"), 2, "--gradient-warmup 2"),
        (("--batch-size", "0"), 2, "--batch-size 0: give at least 1"),
        (("--max-steps", "0"), 2, "--max-steps 0"),
        (("--epochs", "0"), 2, "--epochs 0"),
        (("--warmup-steps", "-1"), 2, "--warmup-steps -1"),
        (("--held-out", "1"), 2, "--held-out 1"),
        (("--average", "1"), 2, "--average 1"),
        (("--learning-rate", "0"), 2, "--learning-rate 0"),
        (("--lora", "-4"), 2, "--lora -4"),
        (("--lora-alpha", "8"), 2, "add --lora RANK"),
        (("--lora-targets", "o_proj"), 2, "add --lora RANK"),
        (("--fsdp",), 2, "torchrun --nproc-per-node 2"),
        (("--output", __file__), 2, "is a file: name a folder"),
    ],
)
def test_what_cannot_be_is_refused(folder, data, tmp_path, capsys, more, code, message):
    try:
        assert main(command(folder, data, tmp_path / "out", *more)) == code
    except SystemExit as stop:
        assert stop.code == code
    assert message in capsys.readouterr().err


def test_processors_do_not_shard(folder, data, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit):
        main(command(folder, data, tmp_path / "out", "--fsdp"))
    assert "leave it out on the CPU" in capsys.readouterr().err


def test_another_model_is_refused(tokenizer, data, tmp_path, capsys):
    other = LlamaForCausalLM(
        LlamaConfig(vocab_size=len(tokenizer), hidden_size=8, num_attention_heads=1, num_hidden_layers=1)
    )
    other.save_pretrained(tmp_path / "llama")
    tokenizer.save_pretrained(tmp_path / "llama")
    assert main(command(tmp_path / "llama", data, tmp_path / "out")) == 1
    assert "not an HRM-Text folder of this port: run convert_weights.py" in capsys.readouterr().err


def test_the_model_is_not_replaced_by_its_own_offspring(folder, data, capsys):
    with pytest.raises(SystemExit):
        main(command(folder, data, folder))
    assert "choose another" in capsys.readouterr().err


def test_trl_trains_with_our_collator(folder, data, tokenizer, tmp_path):
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    examples, _ = encode_rows(read_rows(data), tokenizer, 200)
    model = load(folder).train()
    seen, steps = [], []
    model.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True)
    model.register_forward_pre_hook(lambda module, _: steps.append(module.gradient_steps))
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
        callbacks=[GradientStepsWarmup(fraction=0.6)],
    )
    trainer.train()
    assert steps == [2, 3, 4, 5, 5]
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == 5 and logged[-1] < logged[0]
    for inputs in seen:
        assert torch.equal(inputs["labels"] == -100, (inputs["token_type_ids"] == 1) | (inputs["attention_mask"] == 0))
