"""What the recipes share: questions that Nano cannot answer yet, callbacks, and how a run begins and ends."""

import argparse
import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from random import Random
from string import ascii_lowercase
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from ..answers import answer
from ..check import PrefixCheck
from ..credit import GradientStepsWarmup
from ..hub_folder import ROOT
from ..optimization import AverageWeights
from ..plots import plot_run
from ..trainer import last_checkpoint


logger = logging.getLogger(__name__)

WORK = "training"
ACCURACY = "exact match"


@dataclass(frozen=True)
class Question:
    """A prompt's text, and the only right answer."""

    text: str
    answer: str


def doubles(seed: int, held_out: int = 100) -> tuple[list[Question], list[Question]]:
    """Questions as "Double 437.", to train on and held out; Nano answers 3 % of them."""
    numbers = list(range(10, 1000))
    Random(seed).shuffle(numbers)
    asked = [Question(f"Double {number}.", str(2 * number)) for number in numbers]
    return asked[held_out:], asked[:held_out]


def reversals(seed: int, count: int, held_out: int = 100) -> tuple[list[Question], list[Question]]:
    """Questions as "Reverse the word bbgvirk.", to train on and held out; Nano answers a third of them."""
    rng = Random(seed)
    words: dict[str, None] = {}
    while len(words) < count + held_out:
        words["".join(rng.choices(ascii_lowercase, k=7))] = None
    asked = [Question(f"Reverse the word {word}.", word[::-1]) for word in words]
    return asked[held_out:], asked[:held_out]


class HeldOut(TrainerCallback):
    """Logs the share of held-out questions that greedy decoding answers exactly.

    Args:
        tokenizer: an `HrmTextTokenizer`.
        questions: what is asked, under the tokenizer's default condition.
        every: optimizer steps between two rounds; the first comes before training and the last after it.
    """

    def __init__(self, tokenizer: Any, questions: list[Question], every: int):
        self.tokenizer, self.questions, self.every = tokenizer, questions, every
        encoded = tokenizer.encode_prompt([question.text for question in questions])
        self.prompts = [
            {"input_ids": ids, "token_type_ids": types}
            for ids, types in zip(encoded["input_ids"], encoded["token_type_ids"])
        ]
        self.longest = max(len(tokenizer(question.answer)["input_ids"]) for question in questions) + 2

    def share(self, model: torch.nn.Module) -> float:
        """Share of the questions that a model answers exactly."""
        was_training = model.training
        texts = answer(model, self.tokenizer, self.prompts, self.longest)
        model.train(was_training)
        return sum(text.strip() == each.answer for text, each in zip(texts, self.questions)) / len(self.questions)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        if state.global_step == 0:
            self._note(state, model)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        if state.global_step % self.every == 0 or state.global_step == state.max_steps:
            self._note(state, model)

    def _note(self, state: TrainerState, model: torch.nn.Module) -> None:
        # In the trainer's own history, which a checkpoint keeps.
        state.log_history.append({"step": state.global_step, ACCURACY: self.share(model)})


def command_line(
    program: str, description: str, steps: int, learning_rate: float, batch_size: int
) -> argparse.ArgumentParser:
    """Options of every recipe."""
    parser = argparse.ArgumentParser(prog=f"python -m training.recipes.{program}", description=description)
    parser.add_argument("--model", default=str(ROOT), help="folder of an HRM-Text (default: Nano, in the root)")
    parser.add_argument("--output", type=Path, required=True, help="folder of the trained model")
    parser.add_argument("--steps", type=int, default=steps, help="optimizer steps (default %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=learning_rate, help="peak (default %(default)s)")
    parser.add_argument(
        "--batch-size", type=int, default=batch_size, help="rows a step and process (default %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of questions and sampling (default %(default)s)")
    parser.add_argument("--save-steps", type=int, default=50, help="steps between checkpoints (default %(default)s)")
    return parser


def load(folder: str) -> tuple[torch.nn.Module, Any]:
    """Model in float32 and tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype="float32"), tokenizer


def settings(options: argparse.Namespace) -> dict[str, Any]:
    """Arguments that the recipes give to any TRL config. Several processes are started by torchrun or accelerate."""
    several, on_cpu = int(os.environ.get("WORLD_SIZE", "1")) > 1, not torch.cuda.is_available()
    return {
        "output_dir": str(options.output / WORK),
        "max_steps": options.steps,
        "per_device_train_batch_size": options.batch_size,
        "learning_rate": options.learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": min(10, options.steps),
        "logging_steps": 1,
        "save_steps": options.save_steps,
        "save_total_limit": 2,
        "seed": options.seed,
        "bf16": False,
        "use_cpu": on_cpu,
        "ddp_backend": "gloo" if several and on_cpu else None,
        # At two gradient steps the embedding gets none.
        "ddp_find_unused_parameters": True if several else None,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "report_to": [],
        # Whoever makes a second model of the folder, as DPO does for its reference, makes one of this port.
        "trust_remote_code": True,
    }


def callbacks(options: argparse.Namespace, tokenizer: Any, held_out: list[Question]) -> list[TrainerCallback]:
    """What the paper's training adds, the check of the prompt's mask, and the held-out questions."""
    resume = last_checkpoint(options.output / WORK)
    return [
        GradientStepsWarmup(2, 5, 0.2),
        PrefixCheck(tokenizer),
        HeldOut(tokenizer, held_out, every=max(5, options.steps // 10)),
        AverageWeights(0.9, resume),
    ]


def run(
    trainer: Any, options: argparse.Namespace, parts: list[TrainerCallback], trained: str = "loss"
) -> dict[str, Any]:
    """Trains, from the last checkpoint where there is one; saves the average weights, a summary and the curves.

    Args:
        trainer: of TRL.
        options: of the command line.
        parts: `callbacks(...)`, which the trainer has.
        trained: name of the logged figure that the curves show beside the held-out questions.

    Returns:
        The share of held-out questions before and after, and what `PrefixCheck` found.
    """
    check, judge, average = (
        next(each for each in parts if isinstance(each, kind)) for kind in (PrefixCheck, HeldOut, AverageWeights)
    )
    trainer.train(resume_from_checkpoint=str(average.resume) if average.resume else None)
    average.swap(trainer.model)
    trainer.model.config.use_cache = True  # the trainer switches it off
    trainer.save_model(str(options.output))
    log = trainer.state.log_history
    shares = [entry[ACCURACY] for entry in log if ACCURACY in entry]
    summary = {
        "steps": trainer.state.global_step,
        "before": shares[0],
        "after": judge.share(trainer.model),
        "checked_tokens": check.checked,
        "largest_difference": check.worst,
    }
    if trainer.is_world_process_zero():
        (options.output / WORK / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
        (options.output / WORK / "log.json").write_text(json.dumps(log, indent=1) + "\n", encoding="utf-8")
        print(json.dumps(summary))
        try:
            plot_run(log, trained, ACCURACY, options.output / WORK / "curves.png")
        except ImportError as error:
            logger.warning("no curves.png: %s", error)
    return summary
