"""From rows of questions and answers to batches.

`formats.py` says what a row may look like. Prompts become prefix blocks (`token_type_ids` 1), and the loss is asked
for on responses and the token that ends them.
"""

import csv
import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from heapq import heapify, heapreplace
from pathlib import Path
from random import Random
from typing import Any, TextIO

import torch
from jinja2 import TemplateError

from .formats import Row, read_row


IGNORED = -100

# Ids, labels and token types of one sequence, lists of the same length. A label stands at its own token: the model
# compares it with the logits of the token before.
Example = dict[str, list[int]]


# Why a row is left out.
EMPTY, WEIGHTLESS, TOO_LONG = "without a response", "of weight 0", "too long"


@dataclass
class EncodingReport:
    """What became of the rows: how many were kept, and how many were left out for which reason."""

    kept: int = 0
    left_out: dict[str, int] = field(default_factory=lambda: {EMPTY: 0, WEIGHTLESS: 0, TOO_LONG: 0})

    def __str__(self) -> str:
        parts = [f"{self.kept} kept", *(f"{count} {reason}" for reason, count in self.left_out.items())]
        return f"{self.kept + sum(self.left_out.values())} rows: {', '.join(parts)}"


# Files


def read_rows(source: str | Path | Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """Rows of a file (JSON Lines, a JSON list, CSV, Parquet), of a folder saved by `datasets`, or of any mappings.

    In a CSV file everything is text but `weight`, and an empty cell is an absent field.

    Raises:
        FileNotFoundError: the path does not exist.
        ImportError: Parquet, or a folder, without `datasets`.
        ValueError: a row that cannot be read; the message names file and line.
    """
    if not isinstance(source, (str, Path)):
        yield from source
        return
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(f"{path}: there is no such file or folder")
    if path.is_dir() or path.suffix == ".parquet":
        yield from (dict(row) for row in _dataset(path))
        return
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            yield from _csv_rows(file, path) if path.suffix == ".csv" else _json_rows(file, path)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: not text in UTF-8; give JSON Lines, JSON, .csv or .parquet, or a folder that `datasets` saved"
        ) from error


def _csv_rows(file: TextIO, path: Path) -> Iterator[dict[str, Any]]:
    reader = csv.DictReader(file, strict=True)
    try:
        for row in reader:
            if None in row or None in row.values():
                raise ValueError(
                    f"{path}, line {reader.line_num}: not as many cells as the first line, which names them, has: "
                    f"{len(reader.fieldnames)}"
                )
            # A column with gaps comes out of pandas as 0.0 and 1.0.
            weight = {"weight": int(row["weight"][0])} if row.get("weight") in ("0", "1", "0.0", "1.0") else {}
            yield {**{name: value or None for name, value in row.items()}, **weight}
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: not CSV ({error})") from error


def _json_rows(file: TextIO, path: Path) -> Iterator[dict[str, Any]]:
    beginning = next((line for line in file if line.strip()), "")
    file.seek(0)
    if beginning.lstrip().startswith("["):
        try:
            rows = json.load(file)
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"{path}: begins like a JSON list and is none ({error})") from error
        numbered = (("row", number, row) for number, row in enumerate(rows, start=1))
    else:
        numbered = (("line", number, line) for number, line in enumerate(file, start=1) if line.strip())
    for unit, number, row in numbered:
        if unit == "line":
            try:
                row = json.loads(row)
            except (json.JSONDecodeError, RecursionError) as error:
                raise ValueError(f"{path}, line {number}: not JSON ({error})") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}, {unit} {number}: a row must be a JSON object, this is {type(row).__name__}")
        yield row


def _dataset(path: Path) -> Iterable[Mapping[str, Any]]:
    try:
        import datasets
    except ImportError as error:
        raise ImportError(f"{path} is read by the package `datasets`: pip install datasets") from error
    if path.is_file():
        try:
            # Streamed, so that nothing is written to a cache.
            yield from datasets.load_dataset("parquet", data_files=str(path), split="train", streaming=True)
        except (ValueError, datasets.exceptions.DatasetGenerationError) as error:  # pyarrow's errors are ValueErrors
            raise ValueError(f"{path}: not Parquet ({error})") from error
        return
    loaded = datasets.load_from_disk(str(path))
    if isinstance(loaded, datasets.DatasetDict):
        if "train" not in loaded:
            raise ValueError(
                f"{path} holds the splits {', '.join(loaded)} and no `train`: pass the folder of one split"
            )
        loaded = loaded["train"]
    yield from loaded


# Rows to examples


def encode_rows(
    rows: Iterable[Mapping[str, Any]],
    tokenizer: Any,
    max_length: int,
    condition: str | None = None,
    ignored: Collection[str] = (),
) -> tuple[list[Example], EncodingReport]:
    """Tokenizes rows; those with nothing to learn and those above `max_length` tokens are left out and counted.

    Args:
        rows: see `formats.py`.
        tokenizer: an `HrmTextTokenizer`.
        max_length: most tokens of a sequence.
        condition: condition of the rows that name none; None is the tokenizer's default.
        ignored: fields of rows that are left aside.

    Raises:
        ValueError: a row of no known form, with an unknown field or condition; the message names the row, from 1.
    """
    if not hasattr(tokenizer, "encode_prompt"):
        raise TypeError(
            f"{type(tokenizer).__name__} does not know HRM-Text's prompts: load the tokenizer with "
            "trust_remote_code=True from a folder that holds tokenization_hrm_text.py"
        )
    examples, report = [], EncodingReport()
    for number, row in enumerate(rows, start=1):
        try:
            read = read_row(row, ignored)
            example = None if read is None else _encode(read, tokenizer, condition)
        except (ValueError, TypeError) as error:
            raise ValueError(f"row {number}: {error}") from error
        _keep(example, WEIGHTLESS if read is None else EMPTY, examples, report, max_length)
    return examples, report


def keep_fitting(examples: Iterable[Example], max_length: int) -> tuple[list[Example], EncodingReport]:
    """Examples of at most `max_length` tokens, and what became of the others."""
    kept, report = [], EncodingReport()
    for example in examples:
        _keep(example, EMPTY, kept, report, max_length)
    return kept, report


def _keep(
    example: Example | None, reason: str, examples: list[Example], report: EncodingReport, max_length: int
) -> None:
    if example is not None and len(example["input_ids"]) > max_length:
        example, reason = None, TOO_LONG
    if example is None:
        report.left_out[reason] += 1
    else:
        report.kept += 1
        examples.append(example)


def _encode(row: Row, tokenizer: Any, condition: str | None) -> Example | None:
    """One sequence, or None for a row with nothing to learn from."""
    condition = condition if row.condition is None else row.condition
    messages, learned = list(row.messages), list(row.learned)
    while messages and messages[-1].get("role") != "assistant":  # a prompt that nothing answers teaches nothing
        messages.pop()
    answers = [message for message in messages if message.get("role") == "assistant"]
    if not any(learned) or not all(_says_something(message) for message in answers):
        return None
    roles = [message.get("role") for message in messages]
    plain = all(isinstance(each.get("content"), str) and not each.get("tool_calls") for each in messages)
    if roles == ["user", "assistant"] and plain and not row.tools:
        # The same as by the template, and a good deal faster.
        prompt = tokenizer.encode_prompt(messages[0]["content"], condition)["input_ids"]
        return join(prompt, plain_ids(tokenizer, [messages[1]["content"]])[0], tokenizer.eos_token_id)
    try:
        encoded = tokenizer.apply_chat_template(
            messages, tools=row.tools, condition=condition, return_dict=True, return_assistant_tokens_mask=True
        )
    except TemplateError as error:
        raise ValueError(str(error)) from error
    ids, answered = encoded["input_ids"], encoded["assistant_masks"]
    return {
        "input_ids": ids,
        "labels": [token if asked else IGNORED for token, asked in zip(ids, _learned_only(answered, learned))],
        "token_type_ids": encoded["token_type_ids"],
    }


def _says_something(message: Mapping[str, Any]) -> bool:
    content = message.get("content")
    return bool(message.get("tool_calls") or (content.strip() if isinstance(content, str) else content))


def _learned_only(answered: Sequence[int], learned: Sequence[bool]) -> list[int]:
    """The mask of the answers without those that are not to be learned; answers lie apart, prompts between them."""
    result, answer, before = [], -1, 0
    if sum(asked and not previous for previous, asked in zip((0, *answered), answered)) != len(learned):
        raise ValueError("the chat template does not mark each answer apart, by which they are weighed")
    for asked in answered:
        answer += asked and not before
        result.append(int(asked and learned[answer]))
        before = asked
    return result


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


def closing_id(tokenizer: Any) -> int | None:
    """The token that ends a prompt and stands nowhere else; None for an envelope that ends in ordinary tokens."""
    end = tokenizer.prefix_end_token_id
    return end if isinstance(end, int) else None


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
