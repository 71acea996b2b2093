"""TRL's trainers: which class they take, by path and by object, and the number that shows it on the first step."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from training.check import PrefixCheck

from .tiny import ROOT


trl = pytest.importorskip("trl")
pytest.importorskip("datasets")

from .trl_material import (  # noqa: E402  (both need the packages above)
    CHATS,
    COMPLETIONS,
    JUDGED,
    PREFERENCES,
    PROMPTS,
    SAMPLING,
    exact,
    is_ours,
    settings,
)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(ROOT, trust_remote_code=True)


@pytest.fixture(params=["path", "object"])
def nano(request):
    return str(ROOT) if request.param == "path" else load(ROOT)


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)


def first_step(trainer, tokenizer):
    """Takes the one step with the check of the mask inside; returns what was logged."""
    check = PrefixCheck(tokenizer)
    trainer.add_callback(check)
    trainer.train()
    assert is_ours(trainer.model)
    assert check.checked > 0 and check.worst <= 1e-4
    return trainer.state.log_history[0]


def test_sft(nano, tokenizer, tmp_path):
    trainer = trl.SFTTrainer(model=nano, args=trl.SFTConfig(**settings(tmp_path)), train_dataset=COMPLETIONS)
    logged = first_step(trainer, tokenizer)
    assert logged["loss"] < 0.05 and logged["mean_token_accuracy"] > 0.95  # read causally, it is above 2


@pytest.mark.parametrize("more", [{}, {"packing": True, "max_length": 96}, {"padding_free": True, "max_length": None}])
def test_sft_on_chats(more, tokenizer, tmp_path):
    arguments = trl.SFTConfig(assistant_only_loss=True, **settings(tmp_path, **more))
    trainer = trl.SFTTrainer(model=str(ROOT), args=arguments, train_dataset=CHATS)
    assert first_step(trainer, tokenizer)["loss"] < 0.05


def test_dpo(nano, tokenizer, tmp_path):
    trainer = trl.DPOTrainer(model=nano, args=trl.DPOConfig(**settings(tmp_path)), train_dataset=PREFERENCES)
    assert is_ours(trainer.ref_model)
    logged = first_step(trainer, tokenizer)
    assert logged["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert logged["rewards/margins"] == pytest.approx(0, abs=1e-4)


def test_kto(nano, tokenizer, tmp_path):
    trainer = trl.KTOTrainer(model=nano, args=trl.KTOConfig(**settings(tmp_path)), train_dataset=JUDGED)
    assert is_ours(trainer.ref_model)
    logged = first_step(trainer, tokenizer)
    assert logged["loss"] == pytest.approx(0.5, abs=1e-5) and logged["kl"] == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("name", ["GRPO", "RLOO"])
def test_sampling(name, nano, tokenizer, tmp_path):
    trainer_class, config_class = getattr(trl, f"{name}Trainer"), getattr(trl, f"{name}Config")
    trainer = trainer_class(
        model=nano, args=config_class(**settings(tmp_path), **SAMPLING), reward_funcs=exact, train_dataset=PROMPTS
    )
    assert is_ours(trainer.ref_model)
    logged = first_step(trainer, tokenizer)
    assert logged["kl"] == pytest.approx(0, abs=1e-5) and logged["reward"] >= 0.75


@pytest.mark.skipif(not hasattr(trl, "DistillationTrainer"), reason="TRL before 1.16 or so has no such trainer")
def test_distillation(nano, tokenizer, tmp_path):
    """A teacher of the same folder says what its pupil says."""
    trainer = trl.DistillationTrainer(
        model=nano,
        teacher_model=str(ROOT),
        args=trl.DistillationConfig(max_completion_length=8, **settings(tmp_path)),
        train_dataset=PROMPTS.remove_columns("answer"),
    )
    assert is_ours(trainer.teacher_model)
    assert first_step(trainer, tokenizer)["loss"] == pytest.approx(0, abs=1e-5)


def test_reward(tmp_path):
    """By path TRL makes the classifier itself, which reads a whole text as one block: so do plain forwards here."""
    trainer = trl.RewardTrainer(
        model=str(ROOT), args=trl.RewardConfig(**settings(tmp_path, max_length=64)), train_dataset=PREFERENCES
    )
    assert is_ours(trainer.model) and type(trainer.model).__name__ == "HrmTextForSequenceClassification"
    seen = []
    trainer.model.register_forward_hook(lambda module, args, kwargs, out: seen.append((kwargs, out)), with_kwargs=True)
    trainer.train()
    kwargs, out = seen[0]
    for row, (ids, mask) in enumerate(zip(kwargs["input_ids"], kwargs["attention_mask"])):
        ids = ids[mask.bool()]
        with torch.no_grad():
            plain = trainer.model(input_ids=ids[None], token_type_ids=torch.ones_like(ids[None])).logits[0]
        torch.testing.assert_close(out.logits[row], plain, atol=1e-4, rtol=1e-4)


def test_what_a_trainer_saves_is_taken_again(tokenizer, tmp_path):
    trainer = trl.SFTTrainer(
        model=str(ROOT), args=trl.SFTConfig(**settings(tmp_path / "work")), train_dataset=COMPLETIONS
    )
    trainer.save_model(str(tmp_path / "saved"))
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["architectures"] == ["HrmTextForCausalLM"]
    again = trl.SFTTrainer(
        model=str(tmp_path / "saved"), args=trl.SFTConfig(**settings(tmp_path / "again")), train_dataset=COMPLETIONS
    )
    assert first_step(again, tokenizer)["loss"] < 0.05


def test_adapters_need_no_second_model(tokenizer, tmp_path):
    peft = pytest.importorskip("peft")
    trainer = trl.DPOTrainer(
        model=str(ROOT),
        args=trl.DPOConfig(**settings(tmp_path)),
        train_dataset=PREFERENCES,
        peft_config=peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=4),
    )
    check = PrefixCheck(tokenizer)
    trainer.add_callback(check)
    trainer.train()
    assert trainer.ref_model is None and is_ours(trainer.model.get_base_model())
    assert trainer.state.log_history[0]["loss"] == pytest.approx(math.log(2), abs=1e-5) and check.checked


@pytest.mark.slow
def test_from_a_module_cache(tmp_path):
    """A Hub id, as it lies in the cache after a download: no network, a process of its own."""
    snapshot = tmp_path / "hub" / "models--someone--nano" / "snapshots" / ("0" * 40)
    shutil.copytree(ROOT, snapshot, ignore=lambda folder, names: [n for n in names if Path(folder, n).is_dir()])
    refs = snapshot.parent.parent / "refs"
    refs.mkdir()
    (refs / "main").write_text("0" * 40)
    program = """
import sys, trl
from tests.trl_material import PREFERENCES, is_ours, settings
trainer = trl.DPOTrainer(model="someone/nano", args=trl.DPOConfig(**settings(sys.argv[1])), train_dataset=PREFERENCES)
trainer.train()
assert is_ours(trainer.model) and is_ours(trainer.ref_model)
assert abs(trainer.state.log_history[0]["loss"] - 0.693147) < 1e-5
"""
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_MODULES_CACHE": str(tmp_path / "modules")}
    environment["HF_HUB_OFFLINE"] = "1"
    subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "out")], cwd=ROOT, env=environment, check=True, timeout=600
    )


# ---- other tools that pick a class -------------------------------------------------------------------------------


def test_model_init_and_classifiers(tmp_path):
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    assert is_ours(Trainer(model_init=lambda: load(ROOT), args=arguments).model)
    assert is_ours(AutoModelForSequenceClassification.from_pretrained(ROOT, trust_remote_code=True))


def test_auto_peft_model(tmp_path):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(load(ROOT), peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=2))
    model.save_pretrained(tmp_path)
    again = peft.AutoPeftModelForCausalLM.from_pretrained(str(tmp_path), trust_remote_code=True)
    assert is_ours(again.get_base_model())


def test_lm_eval():
    models = pytest.importorskip("lm_eval.models.huggingface")
    assert is_ours(models.HFLM(pretrained=str(ROOT), trust_remote_code=True, device="cpu").model)


def test_sentence_transformers():
    """Embeddings of a sentence: the mean of the last states of a plain forward, the prompt read as one block."""
    package = pytest.importorskip("sentence_transformers", reason="not a package of ours; it loads any folder")
    model = package.SentenceTransformer(str(ROOT), trust_remote_code=True, device="cpu")
    inner = next(module for module in model.modules() if type(module).__name__ == "HrmTextModel")
    assert is_ours(inner)


def test_the_written_config_names_the_model_alone(tmp_path):
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(ROOT, trust_remote_code=True)
    # The first is what TRL and `transformers serve` look up in transformers, the second what vLLM knows.
    assert config.architectures == ["AutoModelForCausalLM", "HrmTextForCausalLM"]
    config.architectures = config.architectures
    for written in (config.to_dict(), config.to_diff_dict(), json.loads(config.to_json_string(use_diff=False))):
        assert written["architectures"] == ["HrmTextForCausalLM"]
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["HrmTextForCausalLM"]
    assert type(config)().architectures is None
    config.architectures = ["SomethingElse"]
    assert config.architectures == config.to_dict()["architectures"] == ["SomethingElse"]
