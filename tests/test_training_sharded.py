"""Weights sharded over two processes (FSDP2 on gloo): gradient steps, optimizer and averages as in one process."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from transformers import TrainingArguments, get_scheduler

from training.credit import GradientStepsWarmup
from training.data import PrefixLMCollator
from training.optimization import AverageWeights, make_optimizer

from .test_collator import PAD, random_examples
from .tiny import tiny_model


STEPS = 5


def train(model, folder: Path, checkpoint: Path | None = None, begin: int = 0) -> AverageWeights:
    """Five steps with the trainer's callbacks, the state kept after the third."""
    arguments = TrainingArguments(output_dir=str(folder), use_cpu=True, report_to=[])
    optimizer = make_optimizer(model, 1e-2, "adamw")
    rates = get_scheduler("cosine", optimizer, num_warmup_steps=2, num_training_steps=STEPS)
    average, warmup = AverageWeights(0.8, checkpoint), GradientStepsWarmup(2, 5, 0.8)
    state = type("State", (), {"global_step": begin, "max_steps": STEPS})()
    average.on_train_begin(arguments, state, None, model=model)
    batch = PrefixLMCollator(PAD)(random_examples(6))
    while state.global_step < STEPS:
        warmup.on_step_begin(arguments, state, None, model=model)
        model(**batch, use_cache=False).loss.backward()
        optimizer.step()
        rates.step()
        optimizer.zero_grad()
        state.global_step += 1
        average.on_step_end(arguments, state, None, model=model)
        if state.global_step == 3:
            (folder / "checkpoint-3").mkdir(parents=True, exist_ok=True)
            average.on_save(arguments, state, None)
    return average


def sharded(rank: int, folder: Path, port: int) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1")
    os.environ["MASTER_PORT"] = str(port)
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    try:
        from torch.distributed.fsdp import fully_shard

        mesh = torch.distributed.init_device_mesh("cpu", (2,))
        model = tiny_model().train()
        for stack in (model.model.L_module, model.model.H_module):
            for layer in stack.layers:
                fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        average = train(model, folder)
        stored = torch.load(folder / "checkpoint-3" / f"average_{rank}.pt", weights_only=True)
        held = [value.to_local() for value in average.average]
        assert [value.shape for value in stored] == [value.shape for value in held]
        assert 0 < sum(value.numel() for value in stored) < sum(value.numel() for value in average.average)
        again = AverageWeights(0.8, folder / "checkpoint-3")
        arguments = TrainingArguments(output_dir=str(folder), use_cpu=True, report_to=[])
        again.on_train_begin(arguments, type("State", (), {"global_step": 3})(), None, model=model)
        for value, kept in zip(again.average, stored, strict=True):
            assert torch.equal(value.to_local(), kept)
        raw = {name: value.full_tensor() for name, value in model.state_dict().items()}
        average.swap(model)
        mean = {name: value.full_tensor() for name, value in model.state_dict().items()}
        if rank == 0:
            torch.save((raw, mean), folder / "weights.pt")
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_shards_train_as_one(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(sharded, (tmp_path, port), nprocs=2)
    raw, mean = torch.load(tmp_path / "weights.pt", weights_only=True)
    model = tiny_model().train()
    average = train(model, tmp_path / "one")
    for name, value in model.state_dict().items():
        torch.testing.assert_close(raw[name], value, atol=1e-5, rtol=1e-4, msg=name)
    average.swap(model)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(mean[name], value, atol=1e-5, rtol=1e-4, msg=name)
    assert not torch.equal(raw["lm_head.weight"], mean["lm_head.weight"])
