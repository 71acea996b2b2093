"""`transformers.Trainer` with HRM-Text's optimizer, schedule, warm-up of credit assignment and average weights."""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .credit import GradientStepsWarmup
from .optimization import AverageWeights, complete_state, make_optimizer, schedule


LOG_FILE = "log.jsonl"


@dataclass(frozen=True)
class Recipe:
    """What the paper's training has that a plain `Trainer` has not; defaults are the paper's where it names them.

    Attributes:
        learning_rate: peak.
        warmup_steps: optimizer steps until the peak.
        decay_from: part of the training at which the decay begins.
        floor: last learning rate, as a part of the peak.
        optimizer: see `make_optimizer`.
        weight_decay: see `make_optimizer`.
        average: decay of the average weights, 0 for none.
        first_gradient_steps, last_gradient_steps, gradient_warmup: see `GradientStepsWarmup`.
    """

    learning_rate: float
    warmup_steps: int = 0
    decay_from: float = 0.0
    floor: float = 0.1
    optimizer: str = "auto"
    weight_decay: float = 0.1
    average: float = 0.999
    first_gradient_steps: int = 2
    last_gradient_steps: int = 5
    gradient_warmup: float = 0.2


class HrmTextTrainer(Trainer):
    """Trains by a `Recipe`.

    Args:
        model: an HRM-Text, or a peft model around one.
        arguments: as for `Trainer`; its learning rate, warm-up and optimizer are not read, the recipe's are.
        recipe: see `Recipe`.
        train_dataset: items that the collator reads: examples, or groups of them.
        collator: a `PrefixLMCollator`.
        resume: checkpoint folder to go on from.
        kwargs: as for `Trainer`.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        arguments: TrainingArguments,
        recipe: Recipe,
        train_dataset: Dataset,
        collator: Any,
        resume: str | Path | None = None,
        **kwargs: Any,
    ):
        self.recipe = recipe
        self.resume = resume
        self.average = AverageWeights(recipe.average, resume) if recipe.average else None
        warmup = GradientStepsWarmup(recipe.first_gradient_steps, recipe.last_gradient_steps, recipe.gradient_warmup)
        super().__init__(model=model, args=arguments, train_dataset=train_dataset, data_collator=collator, **kwargs)
        self.add_callback(warmup)
        self.add_callback(Log(resume))
        if self.average is not None:
            self.add_callback(self.average)

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            recipe = self.recipe
            self.optimizer = make_optimizer(
                self.model if model is None else model, recipe.learning_rate, recipe.optimizer, recipe.weight_decay
            )
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        if self.lr_scheduler is None:
            recipe = self.recipe
            self.lr_scheduler = schedule(
                self.optimizer if optimizer is None else optimizer,
                min(recipe.warmup_steps, num_training_steps),
                num_training_steps,
                recipe.decay_from,
                recipe.floor,
            )
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.is_fsdp_enabled:
            complete_state(getattr(self.optimizer, "optimizer", self.optimizer))
        super()._save_optimizer_and_scheduler(output_dir)

    def run(self) -> float:
        """Trains to the end, from the checkpoint to resume from if there is one; returns the last logged loss."""
        self.train(resume_from_checkpoint=str(self.resume) if self.resume else None)
        return next((entry["loss"] for entry in reversed(self.state.log_history) if "loss" in entry), float("nan"))


class Log(TrainerCallback):
    """Appends what the trainer logs to `log.jsonl` in its output folder, with the seconds trained so far.

    `seconds` is time on the wall, `cpu_seconds` that of all threads of the process. On resume, what was logged after
    the checkpoint is dropped, and both clocks go on from there.
    """

    def __init__(self, resume: str | Path | None = None):
        self.resuming = resume is not None
        self.started, self.cpu_started = time.monotonic(), time.process_time()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero:
            return
        self.path = Path(args.output_dir) / LOG_FILE
        self.path.parent.mkdir(parents=True, exist_ok=True)
        kept = read_log(self.path) if self.resuming and self.path.exists() else []
        kept = [entry for entry in kept if entry["step"] <= state.global_step]
        self.started = time.monotonic() - (kept[-1]["seconds"] if kept else 0.0)
        self.cpu_started = time.process_time() - (kept[-1]["cpu_seconds"] if kept else 0.0)
        self.path.write_text("".join(json.dumps(entry) + "\n" for entry in kept), encoding="utf-8")

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        control.should_log |= state.global_step == state.max_steps

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        model: Any = None,
        **kwargs: Any,
    ) -> None:
        if not state.is_world_process_zero or not hasattr(self, "path"):
            return
        entry = {
            "step": state.global_step,
            "seconds": round(time.monotonic() - self.started, 1),
            "cpu_seconds": round(time.process_time() - self.cpu_started, 1),
            **(logs or {}),
        }
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")


def read_log(path: str | Path) -> list[dict[str, Any]]:
    """Entries of a `log.jsonl`; a last line that a kill cut off is left out."""
    entries = []
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        try:
            entries.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return entries


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
