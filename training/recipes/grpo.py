"""Reinforcement learning with `trl.GRPOTrainer`: Nano learns to reverse longer words from its own samples.

    python -m training.recipes.grpo --output runs/grpo

No right answer is shown. A sampled answer earns 1 if it is the word reversed, which a program checks, and 0 otherwise.
"""

import sys
from typing import Any

from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from ..optimization import make_optimizer
from .common import callbacks, command_line, load, reversals, run, settings


def exact(completions: list[list[dict[str, str]]], answer: list[str], **columns: Any) -> list[float]:
    """The reward: 1 for the right answer, 0 for any other."""
    return [float(written[0]["content"].strip() == right) for written, right in zip(completions, answer)]


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Command line; returns the summary."""
    parser = command_line(
        "grpo", "GRPO with TRL: reversing words of seven letters.", steps=40, learning_rate=3e-4, batch_size=64
    )
    parser.add_argument("--beta", type=float, default=0.0, help="weight of the divergence from the model at first")
    options = parser.parse_args(arguments)
    model, tokenizer = load(options.model)
    train, held_out = reversals(options.seed, count=640)
    parts = callbacks(options, tokenizer, held_out)
    trainer = GRPOTrainer(
        model=model,
        args=GRPOConfig(
            num_generations=8,
            max_completion_length=12,
            temperature=1.0,
            beta=options.beta,
            **settings(options),
        ),
        reward_funcs=exact,
        train_dataset=Dataset.from_list(
            [{"prompt": [{"role": "user", "content": each.text}], "answer": each.answer} for each in train]
        ),
        processing_class=tokenizer,
        callbacks=parts,
        optimizers=(make_optimizer(model, options.learning_rate, weight_decay=0.0), None),
    )
    return run(trainer, options, parts, trained="reward")


if __name__ == "__main__":
    main()
    sys.exit(0)
