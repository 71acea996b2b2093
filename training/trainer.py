"""`transformers.Trainer` with the optimizer of `optimization.py`, and which of its checkpoints are whole."""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer

from .optimization import make_optimizer


class HrmTextTrainer(Trainer):
    """A `Trainer` whose optimizer is made by `make_optimizer`, once weights are sharded where they are.

    Args:
        args, kwargs: as for `Trainer`; learning rate and weight decay are those of its arguments.
        optimizer: see `make_optimizer`.
    """

    def __init__(self, *args: Any, optimizer: str = "auto", **kwargs: Any):
        self.optimizer_name = optimizer
        super().__init__(*args, **kwargs)

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            trained = self.model if model is None else model
            rate, decay = self.args.learning_rate, self.args.weight_decay
            self.optimizer = make_optimizer(trained, rate, self.optimizer_name, decay)
        return self.optimizer


def last_checkpoint(folder: str | Path, with_average: bool = True, averages: int = 1) -> Path | None:
    """The latest checkpoint in a trainer's folder that was written to its end, None if there is none.

    Args:
        folder: output folder of the trainer.
        with_average: whether the average weights lie beside it.
        averages: number of files that they are in.
    """
    checkpoints = sorted(
        Path(folder).glob("checkpoint-*"), key=lambda path: int(path.name.rsplit("-", 1)[1]), reverse=True
    )
    for checkpoint in checkpoints:
        # The trainer writes its state last, and the average follows.
        complete = _is_json(checkpoint / "trainer_state.json")
        if with_average:
            complete &= all((checkpoint / f"average_{process}.pt").exists() for process in range(averages))
        if complete:
            return checkpoint
    return None


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return False
    return True
