"""Gradient steps, optimizer, averages and the loss, each alone and inside the trainer."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, TrainerCallback, TrainingArguments

from convert_weights import convert
from training.credit import GradientStepsWarmup, steps_at
from training.data import IGNORED, PrefixLMCollator
from training.optimization import AverageWeights, complete_state, make_optimizer
from training.trainer import HrmTextTrainer, last_checkpoint

from .test_collator import PAD, random_examples
from .tiny import tiny_model


FIXTURE = Path(__file__).parent / "fixtures" / "reference"


class Watch(TrainerCallback):
    """Notes the gradient steps that each forward pass of training runs with, and can stop like an interrupt."""

    def __init__(self, model, stop_at: int | None = None):
        self.steps, self.model, self.stop_at = [], model, stop_at
        model.register_forward_pre_hook(lambda module, _: self.steps.append(module.gradient_steps))

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.stop_at:
            raise KeyboardInterrupt


def trainer_for(folder, model, items, packed=False, callbacks=(), **arguments):
    settings = {"max_steps": 10, "per_device_train_batch_size": 2, "logging_steps": 1, "save_strategy": "no"}
    return HrmTextTrainer(
        model,
        TrainingArguments(
            output_dir=str(folder),
            learning_rate=1e-3,
            lr_scheduler_type="cosine",
            use_cpu=True,
            report_to=[],
            remove_unused_columns=False,
            disable_tqdm=True,
            **{**settings, **arguments},
        ),
        train_dataset=items,
        data_collator=PrefixLMCollator(PAD, packed=packed),
        callbacks=list(callbacks),
    )


def losses(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


# ---- the training code's figures ---------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("bp_steps", [2, 3, 4, 5])
def test_loss_and_gradients_are_those_of_the_training_code(tmp_path_factory, bp_steps, packed):
    folder = tmp_path_factory.mktemp("reference") / "raw"
    convert(FIXTURE / "checkpoint", folder, weights="raw", verification=False)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).train()
    figures = np.load(FIXTURE / "expected.npz")
    expected = json.loads((FIXTURE / "gradients.json").read_text())
    examples, start = [], 0
    for prefix, causal in zip(figures["prefix_lens"].tolist(), figures["causal_lens"].tolist()):
        end = start + prefix + causal
        # There a label is the next token, and the last one is not among the inputs.
        ids = [*figures["inputs"][start:end].tolist(), int(figures["labels"][end - 1])]
        types = [1] * prefix + [0] * (causal + 1)
        examples.append({"input_ids": ids, "labels": [IGNORED] * prefix + ids[prefix:], "token_type_ids": types})
        start = end
    model.set_gradient_steps(bp_steps)
    batch = PrefixLMCollator(PAD, packed=packed)([examples] if packed else examples)
    loss = model(**batch, use_cache=False).loss
    loss.backward()
    assert loss.item() == pytest.approx(expected[f"loss_bp{bp_steps}"], rel=1e-6)
    norms = {
        name.split(":", 1)[1]: value for name, value in expected.items() if name.startswith(f"gradnorm_bp{bp_steps}:")
    }
    ours = [p.grad.double().norm().item() for p in model.parameters() if p.grad is not None]
    assert np.allclose(sorted(ours), sorted(value for value in norms.values() if value), rtol=1e-4)


# ---- warm-up of credit assignment --------------------------------------------------------------------------------


def test_steps_go_linearly_from_2_to_5():
    assert [steps_at(step / 10) for step in range(12)] == [2, 2, 2, 2, 3, 3, 3, 4, 4, 4, 5, 5]
    assert [steps_at(step / 4, 3, 8) for step in range(5)] == [3, 4, 5, 6, 8]


@pytest.mark.parametrize("accumulate", [1, 3])
def test_warmup_counts_optimizer_steps_and_ends_with_the_config(tmp_path, accumulate):
    model = tiny_model().train()
    watch = Watch(model)
    callbacks = [watch, GradientStepsWarmup(fraction=0.6)]
    trainer_for(
        tmp_path, model, random_examples(60), callbacks=callbacks, gradient_accumulation_steps=accumulate
    ).train()
    wanted = [2, 2, 3, 3, 4, 4, 5, 5, 5, 5]
    assert watch.steps == [steps for steps in wanted for _ in range(accumulate)]
    assert model.gradient_steps == 5 == sum(model.config.gradient_calls()[1]) + model.config.gradient_calls()[0]


def test_warmup_refuses_what_cannot_be(tmp_path):
    for wrong in ({"first": 1}, {"first": 4, "last": 3}, {"fraction": 1.5}):
        with pytest.raises(ValueError):
            GradientStepsWarmup(**wrong)
    with pytest.raises(ValueError, match="`bp_steps` is 9"):
        trainer_for(tmp_path, tiny_model(), random_examples(4), callbacks=[GradientStepsWarmup(last=9)]).train()
    with pytest.raises(TypeError, match="holds no HRM-Text"):
        GradientStepsWarmup._set(torch.nn.Linear(1, 1), 2)


# ---- interruption ------------------------------------------------------------------------------------------------


def test_an_interrupted_run_ends_like_one_that_was_not(tmp_path):
    examples = random_examples(24)
    settings = {"save_strategy": "steps", "save_steps": 3, "gradient_accumulation_steps": 2}
    whole, average = tiny_model().train(), AverageWeights(0.9)
    callbacks = [GradientStepsWarmup(), average]
    first = trainer_for(tmp_path / "whole", whole, examples, callbacks=callbacks, **settings)
    first.train()

    model = tiny_model().train()
    callbacks = [GradientStepsWarmup(), AverageWeights(0.9), Watch(model, stop_at=8)]
    with pytest.raises(KeyboardInterrupt):
        trainer_for(tmp_path / "cut", model, examples, callbacks=callbacks, **settings).train()
    checkpoint = last_checkpoint(tmp_path / "cut")
    assert checkpoint.name == "checkpoint-6"
    model = tiny_model(seed=1).train()
    watch, resumed = Watch(model), AverageWeights(0.9, checkpoint)
    second = trainer_for(
        tmp_path / "cut", model, examples, callbacks=[GradientStepsWarmup(), resumed, watch], **settings
    )
    second.train(resume_from_checkpoint=str(checkpoint))
    assert watch.steps == [5] * 8
    assert len(losses(second)) == 10 and losses(second) == pytest.approx(losses(first), rel=1e-6)
    for name, parameter in whole.named_parameters():
        torch.testing.assert_close(model.get_parameter(name), parameter, msg=name)
    for mine, theirs in zip(resumed.average, average.average, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_a_checkpoint_that_a_kill_cut_off_is_passed_over(tmp_path):
    for step, files in ((2, ("trainer_state.json", "average_0.pt")), (10, ("trainer_state.json",)), (30, ())):
        (tmp_path / f"checkpoint-{step}").mkdir()
        for file in files:
            (tmp_path / f"checkpoint-{step}" / file).write_text("{}")
    assert last_checkpoint(tmp_path).name == "checkpoint-2"
    assert last_checkpoint(tmp_path, averages=2) is None
    assert last_checkpoint(tmp_path, with_average=False).name == "checkpoint-10"
    (tmp_path / "checkpoint-10" / "trainer_state.json").write_text('{"glob')
    assert last_checkpoint(tmp_path, with_average=False).name == "checkpoint-2"
    assert last_checkpoint(tmp_path / "nowhere") is None


# ---- packing -----------------------------------------------------------------------------------------------------


def test_twenty_steps_packed_and_padded_reach_the_same_loss(tmp_path):
    examples = random_examples(60)
    groups = [examples[start : start + 3] for start in range(0, 60, 3)]
    ends = []
    for packed in (True, False):
        trainer = trainer_for(tmp_path, tiny_model().train(), groups, packed=packed, max_steps=20)
        trainer.train()
        ends.append(losses(trainer))
    packed, padded = ends
    assert len(packed) == 20 and packed[-1] < packed[0]
    assert packed == pytest.approx(padded, rel=1e-4)


def test_accumulated_batches_are_one_large_one(tmp_path):
    examples = random_examples(24)
    ends = []
    for size, parts in ((6, 1), (2, 3)):
        settings = {"per_device_train_batch_size": size, "gradient_accumulation_steps": parts}
        trainer = trainer_for(tmp_path, tiny_model().train(), examples, max_steps=4, **settings)
        trainer.train()
        ends.append(losses(trainer))
    assert ends[1] == pytest.approx(ends[0], rel=1e-5)


# ---- optimizer, average --------------------------------------------------------------------------------


def test_auto_takes_adam_atan2_and_falls_back_to_adamw(monkeypatch, caplog):
    pytest.importorskip("adam_atan2_pytorch")
    model = tiny_model()
    assert type(make_optimizer(model, 1e-3)).__name__ == "AdamAtan2"
    monkeypatch.setitem(sys.modules, "adam_atan2_pytorch", None)
    with caplog.at_level(logging.WARNING):
        assert isinstance(make_optimizer(model, 1e-3), torch.optim.AdamW)
    assert "AdamW is used" in caplog.text
    with pytest.raises(ImportError, match="pip install adam-atan2-pytorch"):
        make_optimizer(model, 1e-3, "adam_atan2")
    with pytest.raises(ValueError, match="use one of"):
        make_optimizer(model, 1e-3, "sgd")
    with pytest.raises(ValueError, match="nothing to train"):
        make_optimizer(model.requires_grad_(False), 1e-3)


def test_adam_atan2_takes_the_step_of_its_paper():
    pytest.importorskip("adam_atan2_pytorch")
    weight = torch.nn.Linear(3, 2, bias=False)
    before = weight.weight.detach().clone()
    optimizer = make_optimizer(weight, 0.1, "adam_atan2", weight_decay=0.0)
    weight.weight.grad = torch.tensor([[1e-12, 3.0, -2.0], [0.5, 0.0, -1e8]])
    optimizer.step()
    # In the first step both bias-corrected moments are those of the gradient alone, whatever its size.
    wanted = before - 0.1 * 1.27 * torch.atan2(weight.weight.grad, weight.weight.grad.abs())
    torch.testing.assert_close(weight.weight.detach(), wanted)


@pytest.mark.parametrize("name", ["adam_atan2", "muon", "adamw"])
def test_z_L_init_is_left_alone_and_all_else_moves(name):
    pytest.importorskip("adam_atan2_pytorch")
    model = tiny_model().train()
    optimizer = make_optimizer(model, 1e-2, name)
    before = {key: value.detach().clone() for key, value in model.named_parameters()}
    model(**PrefixLMCollator(PAD)(random_examples(4)), use_cache=False).loss.backward()
    optimizer.step()
    moved = {key for key, value in model.named_parameters() if not torch.equal(before[key], value)}
    assert moved == set(before) - {"model.z_L_init"}
    # The order of the parameters, by which a checkpoint finds their states again, is always the same.
    shapes = [[p.shape for p in group["params"]] for group in optimizer.param_groups]
    again = make_optimizer(tiny_model(), 1e-2, name)
    assert shapes == [[p.shape for p in group["params"]] for group in again.param_groups]


def test_average_follows_its_formula_and_changes_places_with_the_weights(tmp_path):
    model = torch.nn.Linear(2, 1, bias=False)
    average = AverageWeights(0.5)
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    state = type("State", (), {"global_step": 0})()
    expected = model.weight.detach().clone()
    average.on_train_begin(arguments, state, None, model=model)
    for step in range(1, 30):
        with torch.no_grad():
            model.weight += step
        average.on_step_end(arguments, state, None, model=model)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * model.weight.detach()
    raw = model.weight.detach().clone()
    with average.applied(model):
        torch.testing.assert_close(model.weight.detach(), expected)
    assert torch.equal(model.weight.detach(), raw)
    with pytest.raises(ValueError, match="decay=1"):
        AverageWeights(1.0)
    with pytest.raises(FileNotFoundError, match="without an average"):
        AverageWeights(0.9, resume=tmp_path)


@pytest.mark.parametrize("name", ["adam_atan2", "adamw"])
def test_a_state_for_parameters_without_gradient(name):
    """Trained further, a model is the same whether its untouched parameters had their state made or not."""
    if name == "adam_atan2":
        pytest.importorskip("adam_atan2_pytorch")
    ends = []
    for complete in (False, True):
        torch.manual_seed(0)
        first, second = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
        optimizer = make_optimizer(torch.nn.Sequential(first, second), 0.01, name)
        first(torch.ones(1, 4)).square().sum().backward()
        optimizer.step()
        before = [parameter.clone() for parameter in (*first.parameters(), *second.parameters())]
        if complete:
            complete_state(optimizer)
            assert all(optimizer.state[parameter] for parameter in second.parameters())
            assert optimizer.param_groups[0]["lr"] == 0.01 and second.weight.grad is None
            for parameter, old in zip((*first.parameters(), *second.parameters()), before):
                assert torch.equal(parameter, old)
        second(first(torch.ones(1, 4))).square().sum().backward()
        optimizer.step()
        ends.append([parameter.detach() for parameter in (*first.parameters(), *second.parameters())])
    for plain, completed in zip(*ends):
        torch.testing.assert_close(completed, plain, atol=0, rtol=0)
