"""Folders of tokens that the data pipeline of the training repository writes (github.com/sapientinc/data_io).

`tokens.npy` holds the ids of all texts in a row. `inst_start`, `inst_len`, `resp_start` and `resp_len` say where each
prompt, with its envelope, and each response, with its end token, lie in it: beside it in a folder of one data set, in
`epoch_N/` after sampling, one shuffle for each epoch. `metadata.json` names the tokens of the envelope.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from .data import IGNORED, Example, closing_id


INDICES = ("inst_start", "inst_len", "resp_start", "resp_len")


def is_tokenized(folder: Path) -> bool:
    """Whether a folder is one of these."""
    return (folder / "tokens.npy").is_file()


def read_tokenized(folder: Path, tokenizer: Any, epoch: int = 0) -> Iterator[Example]:
    """Examples of a folder, in the order of one of its epochs; a response that was cut has no end token.

    Args:
        folder: see the top of this file.
        tokenizer: an `HrmTextTokenizer`, to which the ids must belong.
        epoch: which shuffle is read, where there are several.

    Raises:
        FileNotFoundError: an index file is missing.
        ValueError: indices that lie outside the tokens, ids outside the vocabulary, or tokens of another envelope.
    """
    tokens = _load(folder / "tokens.npy")
    indices = folder / f"epoch_{epoch}" if (folder / f"epoch_{epoch}").is_dir() else folder
    starts, lengths, answers, answer_lengths = (_load(indices / f"{name}.npy") for name in INDICES)
    if not len(starts) == len(lengths) == len(answers) == len(answer_lengths):
        raise ValueError(f"{indices}: the four index files are not of one length: make the folder again")
    _check_envelope(folder, tokenizer)
    opening, closing = tokenizer.bos_token_id, closing_id(tokenizer)
    for number, spans in enumerate(zip(starts.tolist(), lengths.tolist(), answers.tolist(), answer_lengths.tolist())):
        prompt, answer = (_slice(tokens, *span, folder, number) for span in (spans[:2], spans[2:]))
        if max(prompt + answer) >= len(tokenizer):
            raise ValueError(
                f"{folder}, row {number}: an id is outside the vocabulary of {len(tokenizer)}: take the tokenizer "
                "that made it"
            )
        if prompt[0] != opening or prompt[-1] != closing:
            raise ValueError(
                f"{folder}, row {number}: the prompt runs from id {prompt[0]} to {prompt[-1]} and not from {opening} "
                f"to {closing}: take the tokenizer that made it"
            )
        yield {
            "input_ids": prompt + answer,
            "labels": [IGNORED] * len(prompt) + answer,
            "token_type_ids": [1] * len(prompt) + [0] * len(answer),
        }


def _load(file: Path) -> np.ndarray:
    if not file.is_file():
        raise FileNotFoundError(f"{file}: there is no such file; a tokenized folder has {', '.join(INDICES)}")
    try:
        array = np.load(file, mmap_mode="r", allow_pickle=False)
    except ValueError as error:
        raise ValueError(f"{file}: not an array of numbers ({error})") from error
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise ValueError(f"{file}: an array of {array.dtype} with {array.ndim} dimensions, and not a row of integers")
    return array


def _slice(tokens: np.ndarray, start: int, length: int, folder: Path, number: int) -> list[int]:
    if start < 0 or length < 1 or start + length > len(tokens):
        raise ValueError(
            f"{folder}, row {number}: {length} tokens from {start} on do not lie in the {len(tokens)} of tokens.npy"
        )
    return tokens[start : start + length].tolist()


def _check_envelope(folder: Path, tokenizer: Any) -> None:
    for name in ("metadata.json", "tokenizer_info.json"):
        file = folder / name
        if not file.is_file():
            continue
        stated = json.loads(file.read_text(encoding="utf-8"))
        stated = stated.get("tokenizer_info", stated)
        closing = tokenizer.convert_ids_to_tokens(closing_id(tokenizer))
        wanted = {"boq": tokenizer.bos_token, "eoq": closing, "eoa": tokenizer.eos_token}
        for field, token in wanted.items():
            if stated.get(field, token) != token:
                raise ValueError(f"{file}: `{field}` is {stated[field]!r} and the tokenizer's is {token!r}")
