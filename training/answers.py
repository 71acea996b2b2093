"""Answers of a model to many prompts at once, and how many of them are right."""

from collections.abc import Sequence
from typing import Any

import torch
from tqdm import tqdm

from .data import IGNORED, Example


def split_last_answer(example: Example) -> tuple[dict[str, list[int]], list[int]]:
    """The prompt before the last response of an example, and the ids of that response without the end token."""
    asked = [label != IGNORED for label in example["labels"]]
    end = len(asked) - asked[::-1].index(True)
    start = end
    while start and asked[start - 1]:
        start -= 1
    prompt = {name: example[name][:start] for name in ("input_ids", "token_type_ids")}
    return prompt, example["input_ids"][start : end - 1]


@torch.no_grad()
def answer(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[dict[str, list[int]]],
    max_new_tokens: int,
    batch_size: int = 128,
    prefix: bool = True,
    progress: str | None = None,
) -> list[str]:
    """Greedy answers, in the order of the prompts.

    Args:
        model: an HRM-Text.
        tokenizer: its `HrmTextTokenizer`.
        prompts: `input_ids` and `token_type_ids` of each.
        max_new_tokens: most tokens of an answer.
        batch_size: prompts answered at a time, the longest together.
        prefix: whether prompts are read in both directions; False is plain causal attention.
        progress: label of a progress bar, None for no bar.
    """
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]["input_ids"]))
    texts = [""] * len(prompts)
    model.eval()
    for start in tqdm(range(0, len(order), batch_size), desc=progress, disable=progress is None, leave=False):
        chosen = order[start : start + batch_size]
        batch = tokenizer.pad(
            {name: [prompts[index][name] for index in chosen] for name in ("input_ids", "token_type_ids")},
            padding=True,
            return_tensors="pt",
        ).to(model.device)
        if not prefix:
            batch["token_type_ids"] = torch.zeros_like(batch["token_type_ids"])
        written = model.generate(**batch, max_new_tokens=max_new_tokens, do_sample=False)
        for index, ids in zip(chosen, written[:, batch["input_ids"].shape[1] :]):
            texts[index] = tokenizer.decode(ids, skip_special_tokens=True)
    return texts


def exact_matches(
    model: Any, tokenizer: Any, examples: Sequence[Example], batch_size: int = 16, progress: str | None = None
) -> int:
    """Number of examples whose last response the model writes exactly, white space at its ends aside.

    Args:
        model, tokenizer, batch_size, progress: as for `answer`.
        examples: from `encode_rows`.
    """
    if not examples:
        return 0
    prompts, wanted = zip(*map(split_last_answer, examples))
    longest = max(map(len, wanted)) + 1
    texts = answer(model, tokenizer, prompts, longest, batch_size, progress=progress)
    return sum(
        text.strip() == tokenizer.decode(ids, skip_special_tokens=True).strip() for text, ids in zip(texts, wanted)
    )
