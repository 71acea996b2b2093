"""Supervised fine-tuning with `trl.SFTTrainer`: teaches Nano to double a number.

    python -m training.recipes.sft --output runs/sft

Prompt/completion rows are trained on their completion alone, whole chats with `assistant_only_loss=True` on the
answers. TRL's default for chats would ask for the prompt's own tokens too, each of which sees the next one there:
`PrefixCheck` refuses that.
"""

import sys
from typing import Any

from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from ..optimization import make_optimizer
from .common import Question, callbacks, command_line, doubles, load, run, settings


def rows(questions: list[Question], chats: bool) -> Dataset:
    """Questions as rows of prompt and completion, or as whole chats."""
    pairs = [
        ([{"role": "user", "content": each.text}], [{"role": "assistant", "content": each.answer}])
        for each in questions
    ]
    if chats:
        return Dataset.from_list([{"messages": prompt + completion} for prompt, completion in pairs])
    return Dataset.from_list([{"prompt": prompt, "completion": completion} for prompt, completion in pairs])


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Command line; returns the summary."""
    parser = command_line(
        "sft", "Supervised fine-tuning with TRL: doubling a number.", steps=40, learning_rate=1e-3, batch_size=16
    )
    parser.add_argument("--chats", action="store_true", help="whole chats in place of prompts and completions")
    options = parser.parse_args(arguments)
    model, tokenizer = load(options.model)
    train, held_out = doubles(options.seed)
    parts = callbacks(options, tokenizer, held_out)
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(assistant_only_loss=options.chats, **settings(options)),
        train_dataset=rows(train, options.chats),
        processing_class=tokenizer,
        callbacks=parts,
        optimizers=(make_optimizer(model, options.learning_rate, weight_decay=0.0), None),
    )
    return run(trainer, options, parts)


if __name__ == "__main__":
    main()
    sys.exit(0)
