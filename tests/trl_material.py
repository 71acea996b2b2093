"""Rows for TRL's trainers that Nano can answer, and one step of each trainer at learning rate 0."""

from __future__ import annotations

from random import Random
from typing import Any

import datasets

from training.nano_tasks import draw


def _question(number: int) -> tuple[list[dict[str, str]], list[dict[str, str]], list[dict[str, str]]]:
    """A prompt, its right answer and a wrong one, as messages."""
    asked = draw("addition", Random(number), held_out=True)
    right, wrong = ([{"role": "assistant", "content": str(int(asked.answer) + off)}] for off in (0, 11))
    return [{"role": "user", "content": asked.instruction}], right, wrong


QUESTIONS = [_question(number) for number in range(8)]
COMPLETIONS = datasets.Dataset.from_list([{"prompt": p, "completion": right} for p, right, _ in QUESTIONS])
CHATS = datasets.Dataset.from_list([{"messages": p + right} for p, right, _ in QUESTIONS])
PREFERENCES = datasets.Dataset.from_list(
    [{"prompt": p, "chosen": right, "rejected": wrong} for p, right, wrong in QUESTIONS]
)
JUDGED = datasets.Dataset.from_list(
    [
        {"prompt": p, "completion": (right, wrong)[i % 2], "label": i % 2 == 0}
        for i, (p, right, wrong) in enumerate(QUESTIONS)
    ]
)
PROMPTS = datasets.Dataset.from_list([{"prompt": p, "answer": right[0]["content"]} for p, right, _ in QUESTIONS])


def exact(completions: list[Any], answer: list[str], **columns: Any) -> list[float]:
    """Reward 1 for the right answer."""
    return [float(written[0]["content"].strip() == right) for written, right in zip(completions, answer)]


def settings(folder: Any, **more: Any) -> dict[str, Any]:
    """Arguments of one step that changes nothing, on the CPU in float32."""
    return {
        "output_dir": str(folder),
        "max_steps": 1,
        "learning_rate": 0.0,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "report_to": [],
        "trust_remote_code": True,
        **more,
    }


SAMPLING = {"num_generations": 2, "max_completion_length": 8, "beta": 0.1}


def is_ours(model: Any) -> bool:
    """Whether a model is of this repository's classes, not of transformers' own of the same names."""
    return type(model).__module__.startswith("transformers_modules.") and type(model).__name__.startswith("HrmText")
