"""From rows of questions and answers to batches.

A row is `{"instruction": ..., "response": ..., "condition": ...}`, or `{"messages": [...], "condition": ...}` with
messages `{"role": ..., "content": ...}`; the condition may be left out. Prompts become prefix blocks (`token_type_ids`
1), and the loss is asked for on responses and the token that ends them.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from heapq import heapify, heapreplace
from pathlib import Path
from random import Random
from typing import Any

import torch
from jinja2 import TemplateError


IGNORED = -100

# Ids, labels and token types of one sequence, lists of the same length. A label stands at its own token: the model
# compares it with the logits of the token before.
Example = dict[str, list[int]]


@dataclass
class EncodingReport:
    """What became of the rows."""

    kept: int = 0
    empty: int = 0
    too_long: int = 0

    def __str__(self) -> str:
        rows = self.kept + self.empty + self.too_long
        return f"{rows} rows: {self.kept} kept, {self.empty} without a response, {self.too_long} too long"


def read_rows(source: str | Path | Iterable[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Rows of a JSON Lines file, of a folder saved by `datasets`, or of anything that yields mappings.

    Raises:
        FileNotFoundError: the path does not exist.
        ValueError: a line is not a JSON object; the message names file and line.
    """
    if not isinstance(source, (str, Path)):
        yield from (dict(row) for row in source)
        return
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(f"{path}: there is no such file or folder")
    if path.is_dir():
        yield from (dict(row) for row in _saved_dataset(path))
        return
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(_text_lines(lines, path), start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number}: not JSON ({error})") from error
            if not isinstance(row, dict):
                raise ValueError(f"{path}, line {number}: a row must be a JSON object, this is {type(row).__name__}")
            yield row


def _text_lines(lines: Iterable[str], path: Path) -> Iterator[str]:
    try:
        yield from lines
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: not text in UTF-8; give JSON Lines, or load it with `datasets` and save_to_disk() it to a folder"
        ) from error


def _saved_dataset(path: Path) -> Iterable[Mapping[str, Any]]:
    try:
        import datasets
    except ImportError as error:
        raise ImportError(f"{path} is a folder, which the package `datasets` reads: pip install datasets") from error
    loaded = datasets.load_from_disk(str(path))
    if isinstance(loaded, datasets.DatasetDict):
        if "train" not in loaded:
            raise ValueError(
                f"{path} holds the splits {', '.join(loaded)} and no `train`: pass the folder of one split"
            )
        loaded = loaded["train"]
    return loaded


def encode_rows(
    rows: Iterable[Mapping[str, Any]],
    tokenizer: Any,
    max_length: int,
    condition: str | None = None,
) -> tuple[list[Example], EncodingReport]:
    """Tokenizes rows; those without a response and those above `max_length` tokens are left out and counted.

    Args:
        rows: see the top of this file.
        tokenizer: an `HrmTextTokenizer`.
        max_length: most tokens of a sequence.
        condition: condition of the rows that name none; None is the tokenizer's default.

    Raises:
        ValueError: a row with neither form, or with a condition that is unknown; the message names the row, from 1.
    """
    if not hasattr(tokenizer, "encode_prompt"):
        raise TypeError(
            f"{type(tokenizer).__name__} does not know HRM-Text's prompts: load the tokenizer with "
            "trust_remote_code=True from a folder that holds tokenization_hrm_text.py"
        )
    examples, report = [], EncodingReport()
    for number, row in enumerate(rows, start=1):
        try:
            example = _encode(row, tokenizer, condition)
        except (ValueError, TypeError) as error:
            raise ValueError(f"row {number}: {error}") from error
        if example is None:
            report.empty += 1
        elif len(example["input_ids"]) > max_length:
            report.too_long += 1
        else:
            report.kept += 1
            examples.append(example)
    return examples, report


def _encode(row: Mapping[str, Any], tokenizer: Any, condition: str | None) -> Example | None:
    """One sequence, or None for a row with nothing to learn from."""
    condition = row.get("condition") or condition
    if row.get("messages") is not None:
        return _encode_messages(row["messages"], tokenizer, condition)
    missing = [name for name in ("instruction", "response") if not isinstance(row.get(name), str | None)]
    if missing or row.get("instruction") is None:
        raise ValueError(
            f"a row needs `instruction` and `response`, both strings, or `messages`; this one has {sorted(row)}"
        )
    if not (row.get("response") or "").strip():
        return None
    prompt = tokenizer.encode_prompt(row["instruction"], condition)["input_ids"]
    return join(prompt, plain_ids(tokenizer, [row["response"]])[0], tokenizer.eos_token_id)


def _encode_messages(messages: Any, tokenizer: Any, condition: str | None) -> Example | None:
    if not isinstance(messages, (list, tuple)) or not all(isinstance(message, Mapping) for message in messages):
        raise ValueError('`messages` must be a list of {"role": ..., "content": ...}')
    messages = list(messages)
    while messages and messages[-1].get("role") != "assistant":  # a prompt that nothing answers teaches nothing
        messages.pop()
    answers = [message.get("content") for message in messages if message.get("role") == "assistant"]
    if not answers or not all(answer.strip() if isinstance(answer, str) else answer for answer in answers):
        return None
    try:
        encoded = tokenizer.apply_chat_template(
            messages, condition=condition, return_dict=True, return_assistant_tokens_mask=True
        )
    except TemplateError as error:
        raise ValueError(str(error)) from error
    ids, answered = encoded["input_ids"], encoded["assistant_masks"]
    return {
        "input_ids": ids,
        "labels": [token if asked else IGNORED for token, asked in zip(ids, answered)],
        "token_type_ids": encoded["token_type_ids"],
    }


def plain_ids(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Ids of texts, in which no special token is read."""
    return [ids[1:-1] for ids in tokenizer.encode_prompt(list(texts), condition=())["input_ids"]]


def join(prompt: list[int], response: list[int], eos_token_id: int) -> Example:
    """A prompt as one prefix block, the response and its end."""
    answer = [*response, eos_token_id]
    return {
        "input_ids": prompt + answer,
        "labels": [IGNORED] * len(prompt) + answer,
        "token_type_ids": [1] * len(prompt) + [0] * len(answer),
    }


# Groups of examples


def pack(examples: Sequence[Example], length: int) -> list[list[Example]]:
    """Groups of examples that fit a row of `length` tokens; as few as it takes, and filled evenly.

    The longest example goes first, always into the emptiest row, and a row is added when one does not fit.

    Raises:
        ValueError: an example is longer than a row.
    """
    order = sorted(range(len(examples)), key=lambda index: -len(examples[index]["input_ids"]))
    lengths = [len(examples[index]["input_ids"]) for index in order]
    if lengths and lengths[0] > length:
        raise ValueError(f"an example has {lengths[0]} tokens and a row only {length}: raise the row's length")
    rows = -(-sum(lengths) // length)
    while (groups := _fill(order, lengths, rows, length)) is None:
        rows += 1 + rows // 100
    return [[examples[index] for index in group] for group in groups]


def _fill(order: list[int], lengths: list[int], rows: int, capacity: int) -> list[list[int]] | None:
    groups: list[list[int]] = [[] for _ in range(rows)]
    filled = [(0, row) for row in range(rows)]
    heapify(filled)
    for index, length in zip(order, lengths):
        tokens, row = filled[0]
        if tokens + length > capacity:
            return None
        groups[row].append(index)
        heapreplace(filled, (tokens + length, row))
    return groups


def bucket(examples: Sequence[Example], tokens: int, rng: Random) -> list[list[Example]]:
    """Groups of examples of about the same length, to be padded into a batch of at most `tokens` tokens.

    An example that is longer than `tokens` makes a group of its own. Ties and the order of groups are random.
    """
    groups: list[list[Example]] = []
    for example in sorted(examples, key=lambda example: (len(example["input_ids"]), rng.random())):
        if not groups or (len(groups[-1]) + 1) * len(example["input_ids"]) > tokens:
            groups.append([])
        groups[-1].append(example)
    rng.shuffle(groups)
    return groups


# Batches


@dataclass
class PrefixLMCollator:
    """Makes tensors of examples.

    An item is an example or a group of examples. With `packed`, each item becomes one row in which `position_ids`
    restart at every example; without, each example becomes a row of its own.

    Attributes:
        pad_token_id: what fills rows up, on the right.
        packed: see above.
        row_length: length of every row; None is the longest of the batch.

    Returns (on call):
        `input_ids`, `labels`, `token_type_ids`, `attention_mask` and, if packed, `position_ids`: int64 [rows, length].

    Raises:
        ValueError: a row is longer than `row_length`, or an item lacks labels or token types.
    """

    pad_token_id: int
    packed: bool = False
    row_length: int | None = None

    def __call__(self, items: Sequence[Example | Sequence[Example]]) -> dict[str, torch.Tensor]:
        groups = [[item] if isinstance(item, Mapping) else list(item) for item in items]
        if not self.packed:
            groups = [[example] for group in groups for example in group]
        lengths = [sum(len(example["input_ids"]) for example in group) for group in groups]
        width = self.row_length or max(lengths)
        if max(lengths) > width:
            raise ValueError(f"a row has {max(lengths)} tokens and row_length={width}: raise it, or pack to it")
        fills = {"input_ids": self.pad_token_id, "labels": IGNORED, "token_type_ids": 0}
        for name in fills:
            if any(name not in example for group in groups for example in group):
                raise ValueError(f"an item lacks `{name}`: make items with encode_rows()")
        batch = {
            name: torch.tensor(
                [
                    [value for example in group for value in example[name]] + [fill] * (width - length)
                    for group, length in zip(groups, lengths)
                ]
            )
            for name, fill in fills.items()
        }
        batch["attention_mask"] = torch.tensor([[1] * length + [0] * (width - length) for length in lengths])
        if self.packed:
            # The first label of a sequence would be predicted from the last token of the one before; it is a prompt's
            # and never asked for.
            batch["position_ids"] = torch.tensor(
                [
                    [place for example in group for place in range(len(example["input_ids"]))] + [0] * (width - length)
                    for group, length in zip(groups, lengths)
                ]
            )
        return batch
