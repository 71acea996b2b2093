"""Direct preference optimization with `trl.DPOTrainer`: teaches Nano which of two spellings is the right one.

    python -m training.recipes.dpo --output runs/dpo

The preferred answer is right, the other one is a wrong answer that Nano itself gave. The reference is a second model
of the same folder, made by TRL; with `trust_remote_code=True` it is of this port, and the first loss is log 2.
"""

import sys
from typing import Any

import torch
from datasets import Dataset
from trl import DPOConfig, DPOTrainer

from ..optimization import make_optimizer
from .common import Question, callbacks, command_line, load, reversals, run, settings


@torch.no_grad()
def pairs(model: Any, tokenizer: Any, questions: list[Question], seed: int) -> Dataset:
    """Rows of the right answer and a wrong one that the model sampled, for all questions that it ever gets wrong."""
    torch.manual_seed(seed)
    rows = []
    for start in range(0, len(questions), 64):
        asked = questions[start : start + 64]
        prompt = tokenizer.encode_prompt([each.text for each in asked], padding=True, return_tensors="pt")
        written = model.generate(**prompt, max_new_tokens=12, do_sample=True, num_return_sequences=4)
        texts = tokenizer.batch_decode(written[:, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
        for place, each in enumerate(asked):
            wrong = [text for text in texts[4 * place : 4 * place + 4] if text.strip() != each.answer]
            if wrong:
                rows.append(
                    {
                        "prompt": [{"role": "user", "content": each.text}],
                        "chosen": [{"role": "assistant", "content": each.answer}],
                        "rejected": [{"role": "assistant", "content": wrong[0]}],
                    }
                )
    return Dataset.from_list(rows)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Command line; returns the summary."""
    parser = command_line(
        "dpo", "DPO with TRL: reversing words of seven letters.", steps=24, learning_rate=1e-4, batch_size=16
    )
    options = parser.parse_args(arguments)
    model, tokenizer = load(options.model)
    train, held_out = reversals(options.seed, count=640)
    parts = callbacks(options, tokenizer, held_out)
    trainer = DPOTrainer(
        model=model,
        args=DPOConfig(beta=0.1, **settings(options)),
        train_dataset=pairs(model.eval(), tokenizer, train, options.seed),
        processing_class=tokenizer,
        callbacks=parts,
        optimizers=(make_optimizer(model, options.learning_rate, weight_decay=0.0), None),
    )
    return run(trainer, options, parts)


if __name__ == "__main__":
    main()
    sys.exit(0)
