"""Trains HRM-Text-Nano, the small model in the root of this repository.

    python -m training.nano --output DIR

Everything is made here and seeded: questions (nano_tasks.py), tokenizer and weights. After an interruption the same
command goes on from the last checkpoint.
"""

import argparse
import json
import logging
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors.torch import load_file
from torch.utils.data import IterableDataset
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments, set_seed

from .credit import GradientStepsWarmup
from .data import Example, PrefixLMCollator, bucket, join, plain_ids
from .hub_folder import load_class, save_nano
from .nano_tasks import CONDITIONS, TASKS, Question, draw, questions, tokenizer_corpus
from .optimization import AverageWeights
from .plots import plot_curves
from .tokenizer import train_tokenizer
from .trainer import HrmTextTrainer, last_checkpoint


VOCABULARY = 665
HIDDEN = 128
TOKENS_PER_STEP = 2048
# How many pools of questions, and for each task its share of them and the part that is asked for a direct answer.
Stages = tuple[tuple[int, dict[str, tuple[float, float]]], ...]
# Questions are drawn in pools and sorted by length within them.
POOL = 4096
# Numbers come first and once more, since their columns take longest to find.
NUMBERS = {
    "addition": (4, 0.7),
    "subtraction": (5, 0.7),
    "multiplication": (2, 0.7),
    "comparison": (1, 0.6),
    "sorting": (1.5, 0.6),
    "reversal": (1.5, 0.6),
    "letters": (2.5, 0.7),
    "story": (2, 0.7),
}
COLUMNS = {
    "addition": (24, 0.85),
    "subtraction": (34, 0.85),
    "multiplication": (12, 0.7),
    "comparison": (6, 0.4),
    "sorting": (12, 0.5),
    "reversal": (9, 0.4),
    "letters": (14, 0.6),
    "story": (14, 0.65),
}
EVERYTHING = {
    "addition": (12, 0.75),
    "subtraction": (20, 0.68),
    "multiplication": (14, 0.7),
    "comparison": (8, 0.35),
    "sorting": (15, 0.45),
    "reversal": (11, 0.4),
    "letters": (20, 0.58),
    "story": (14, 0.65),
}
STAGES: Stages = ((40, NUMBERS), (16, EVERYTHING), (32, COLUMNS), (sys.maxsize, EVERYTHING))
# Then once more, from the last weights: a phase with a lower peak, its average over fewer steps.
POLISH: Stages = (
    (
        sys.maxsize,
        {
            "addition": (12, 0.8),
            "subtraction": (26, 0.8),
            "multiplication": (16, 0.75),
            "comparison": (6, 0.2),
            "sorting": (17, 0.5),
            "reversal": (11, 0.4),
            "letters": (16, 0.6),
            "story": (16, 0.7),
        },
    ),
)


@dataclass(frozen=True)
class Phase:
    """Part of the training with questions of its own.

    Attributes:
        steps: optimizer steps.
        learning_rate: peak, from which a cosine goes down to 2 %.
        warmup_steps: steps to the peak.
        decay_from: part of the steps at which the cosine begins.
        average: decay of the average weights.
        gradient_warmup: part of the steps that goes from 2 to 5 gradient steps, or to as many as the model has calls.
        stages: what is asked when.
    """

    steps: int
    learning_rate: float
    warmup_steps: int
    decay_from: float
    average: float
    gradient_warmup: float
    stages: Stages


PHASES = (
    Phase(11500, 5e-3, 100, decay_from=0.7, average=0.998, gradient_warmup=0.14, stages=STAGES),
    Phase(3500, 2.5e-3, 50, decay_from=0.0, average=0.99, gradient_warmup=0.0, stages=POLISH),
)
LOGGING_STEPS = 50
PROBE_STEPS = 500
SAVE_STEPS = 200


def make_config() -> Any:
    """Nano's `HrmTextConfig`."""
    return load_class("configuration_hrm_text.HrmTextConfig")(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=256,
        num_layers_per_stack=2,
        num_attention_heads=4,
        H_cycles=2,
        L_cycles=3,
        max_position_embeddings=1024,
        initializer_range=1 / math.sqrt(HIDDEN),
        prefix_end_token_id=7,
        bos_token_id=6,
        eos_token_id=11,
        pad_token_id=5,
        dtype="float32",
    )


def make_tokenizer() -> Any:
    """Nano's `HrmTextTokenizer`."""
    tokenizer = train_tokenizer(tokenizer_corpus(), VOCABULARY)
    return load_class("tokenization_hrm_text.HrmTextTokenizer")(tokenizer_object=tokenizer)


class QuestionGroups(IterableDataset):
    """Training questions without end, in groups of similar length that make one step each.

    Args:
        tokenizer: Nano's.
        seed: the same seed gives the same groups in the same order.
        stages: what is asked how often.
    """

    def __init__(self, tokenizer: Any, seed: int, stages: Stages = STAGES):
        self.tokenizer, self.seed, self.stages = tokenizer, seed, stages

    def __iter__(self) -> Iterator[list[Example]]:
        rng = Random(self.seed)
        direct, cot = CONDITIONS
        for stage, (pools, shares) in enumerate(self.stages):
            weights = [weight for weight, _ in shares.values()]
            stream = questions(self.seed + 1000 * stage, held_out=False, tasks=list(shares), weights=weights)
            for _ in range(pools):
                drawn: dict[str, list[Question]] = {direct: [], cot: []}
                for question in islice(stream, POOL):
                    drawn[direct if rng.random() < shares[question.task][1] else cot].append(question)
                examples = [
                    example
                    for condition, asked in drawn.items()
                    for example in encode(asked, condition, self.tokenizer)
                ]
                yield from bucket(examples, TOKENS_PER_STEP, rng)


def encode(asked: list[Question], condition: str, tokenizer: Any) -> list[Example]:
    """Questions and their answers under a condition, as examples."""
    prompts = tokenizer.encode_prompt([question.instruction for question in asked], condition)["input_ids"]
    responses = plain_ids(tokenizer, [question.response(condition) for question in asked])
    return [join(prompt, response, tokenizer.eos_token_id) for prompt, response in zip(prompts, responses)]


class Probe(TrainerCallback):
    """Logs the share of held-out questions that the average weights answer without a mistake.

    All tokens of an answer are judged at once, each after the right ones before it: where every one of them is the
    most likely, greedy decoding writes exactly this answer.
    """

    def __init__(self, tokenizer: Any, seed: int, count: int = 40):
        rng = Random(seed)
        self.collator = PrefixLMCollator(tokenizer.pad_token_id)
        self.batches = {
            (task, condition): self.collator(
                encode([draw(task, rng, held_out=True) for _ in range(count)], condition, tokenizer)
            )
            for task in TASKS
            for condition in CONDITIONS
        }
        self.trainer: HrmTextTrainer | None = None
        self.average: AverageWeights | None = None

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        if state.global_step % PROBE_STEPS and state.global_step != state.max_steps:
            return
        right = {}
        with self.average.applied(model), torch.no_grad():
            for (task, condition), batch in self.batches.items():
                inputs = {name: values for name, values in batch.items() if name != "labels"}
                written = model(**inputs, use_cache=False).logits[:, :-1].argmax(-1)
                wanted = batch["labels"][:, 1:]
                right[f"{task}/{condition}"] = ((written == wanted) | (wanted == -100)).all(1).float().mean().item()
        self.trainer.log(right)


class Clock(TrainerCallback):
    """Adds to each entry of the log the seconds trained so far: on the wall, and of all threads of the process."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        before = state.log_history[-1] if state.log_history else {"seconds": 0.0, "cpu_seconds": 0.0}
        self.started = time.monotonic() - before["seconds"]
        self.cpu_started = time.process_time() - before["cpu_seconds"]

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        state.log_history[-1]["seconds"] = round(time.monotonic() - self.started, 1)
        state.log_history[-1]["cpu_seconds"] = round(time.process_time() - self.cpu_started, 1)


def train(model: Any, tokenizer: Any, phase: Phase, work: Path, seed: int) -> list[torch.Tensor]:
    """Trains for a phase, or goes on with it; returns the average of every trained parameter."""
    resume = last_checkpoint(work)
    if resume is not None and resume.name == f"checkpoint-{phase.steps}":
        model.load_state_dict(load_file(resume / "model.safetensors"))
        return torch.load(resume / "average_0.pt", weights_only=True)
    warmup = min(phase.warmup_steps, phase.steps)
    arguments = TrainingArguments(
        output_dir=str(work),
        max_steps=phase.steps,
        per_device_train_batch_size=1,
        learning_rate=phase.learning_rate,
        weight_decay=0.1,
        warmup_steps=warmup,
        lr_scheduler_type="warmup_stable_decay",
        lr_scheduler_kwargs={
            "num_decay_steps": phase.steps - max(warmup, int(phase.decay_from * phase.steps)),
            "min_lr_ratio": 0.02,
        },
        logging_steps=LOGGING_STEPS,
        save_steps=SAVE_STEPS,
        save_total_limit=3,
        max_grad_norm=0.0,
        remove_unused_columns=False,
        use_cpu=True,
        seed=seed,
        report_to=[],
    )
    probe, average = Probe(tokenizer, seed + 1), AverageWeights(phase.average, resume)
    steps = min(5, model.config.H_cycles * (model.config.L_cycles + 1))
    trainer = HrmTextTrainer(
        model,
        arguments,
        train_dataset=QuestionGroups(tokenizer, seed, phase.stages),
        data_collator=PrefixLMCollator(tokenizer.pad_token_id),
        optimizer="muon",
        callbacks=[GradientStepsWarmup(last=steps, fraction=phase.gradient_warmup), average, Clock(), probe],
    )
    probe.trainer, probe.average = trainer, average
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    return average.average


def joined_log(folders: Sequence[Path]) -> list[dict[str, Any]]:
    """The logs of the phases one after the other, steps and seconds counted through."""
    entries: list[dict[str, Any]] = []
    for folder in folders:
        base = entries[-1] if entries else {"step": 0, "seconds": 0.0, "cpu_seconds": 0.0}
        state = TrainerState.load_from_json(str(last_checkpoint(folder) / "trainer_state.json"))
        for entry in state.log_history:
            counted = {name: round(entry[name] + base[name], 1) for name in ("step", "seconds", "cpu_seconds")}
            entries.append({**entry, **counted})
    return entries


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m training.nano",
        description="Train HRM-Text-Nano from scratch, on a CPU.",
        epilog="example: python -m training.nano --output nano    (the same again goes on after an interruption)",
    )
    parser.add_argument("--output", type=Path, required=True, help="folder of the model, ready to load")
    parser.add_argument("--work", type=Path, help="folder of checkpoints and log (default OUTPUT-training)")
    parser.add_argument("--part", type=float, default=1.0, help="part of the steps, for a trial (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="seed of questions and weights (default %(default)s)")
    options = parser.parse_args(arguments)
    if not 0 < options.part <= 1:
        parser.error(f"--part {options.part}: give a number above 0 and up to 1")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    output = options.output.resolve()
    work = options.work or output.with_name(output.name + "-training")
    set_seed(options.seed)
    tokenizer = make_tokenizer()
    model = load_class("modeling_hrm_text.HrmTextForCausalLM")(make_config())
    print(f"{sum(parameter.numel() for parameter in model.parameters()):,} parameters", flush=True)
    folders = [work / f"phase-{number}" for number in range(1, len(PHASES) + 1)]
    for number, (phase, folder) in enumerate(zip(PHASES, folders)):
        phase = replace(phase, steps=max(1, round(options.part * phase.steps)))
        average = train(model, tokenizer, phase, folder, options.seed + 10000 * number)
    with torch.no_grad():
        for parameter, mean in zip((each for each in model.parameters() if each.requires_grad), average):
            parameter.copy_(mean)
    save_nano(model, tokenizer, output)
    log = joined_log(folders)
    (work / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in log), encoding="utf-8")
    plot_curves(log, work / "curves.png")
    print(f"{output}: the model; {work}: log and curves")
    return 0


if __name__ == "__main__":
    sys.exit(main())
