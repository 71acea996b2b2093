"""Quantization that knows data: GPTQ on calibration rows, in a process of its own, which gives its memory back.

Prompts are prefix blocks, as the model reads them, and the sums of x x^T are taken over all passes through a stack.
"""

import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from .errors import ConversionError
from .gptq import solve
from .layout import split_names
from .output import checked_values
from .quantize import EMBEDDING, requested_scheme
from .verify import library_class, model_in_memory, open_requested, run_apart, tensors_of
from .writer import write_file


# More tokens change the sums little, and each takes time.
MOST_TOKENS = 32_768
ROW_LENGTH = 1024
# Of so many rows one is kept back to measure on, of so many at most.
_KEPT_BACK, _MOST_KEPT_BACK = 8, 16
# Sums that are held at a time; more of them take further passes over the rows.
_MOST_BYTES = 2**30


@dataclass(frozen=True)
class Rows:
    """Encoded rows: those to calibrate on and those to measure on, and how many were left out.

    Examples are those of `training/data.py`, in which prompts are prefix blocks.
    """

    used: list[dict[str, list[int]]]
    kept_back: list[dict[str, list[int]]]
    left_out: int


def check_rows(path: Path) -> None:
    """Reads the file once, before anything is converted.

    Raises:
        ConversionError: it cannot be read, or has a row of no known form, or too few rows with an answer.
    """
    from training.data import read_rows
    from training.formats import read_row

    count = 0
    try:
        for number, row in enumerate(read_rows(path), start=1):
            try:
                read = read_row(row)
            except (ValueError, TypeError) as error:
                raise ValueError(f"row {number}: {error}") from error
            count += read is not None and any(read.learned) and _answers(read.messages)
    except (ValueError, TypeError, ImportError, OSError) as error:
        raise ConversionError(f"--calibration {path}: {' '.join(str(error).split())[:300]}") from None
    if count < 2:
        raise ConversionError(
            f"--calibration {path} has {count} rows with an answer: give at least 2, better hundreds"
        )


def _answers(messages: list[dict[str, Any]]) -> bool:
    return any(
        each.get("role") == "assistant" and (each.get("content") or each.get("tool_calls")) for each in messages
    )


def encode(path: Path, folder: Path, config: Mapping[str, Any]) -> Rows:
    """The rows of a file as token ids, in the envelope that the folder's tokenizer writes.

    Raises:
        ConversionError: the tokenizer knows no envelopes, or no row fits the context.
    """
    from transformers import AutoTokenizer

    from training.data import encode_rows, read_rows

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    try:
        examples, report = encode_rows(read_rows(path), tokenizer, config["max_position_embeddings"])
    except (ValueError, TypeError) as error:
        raise ConversionError(f"--calibration {path}: {' '.join(str(error).split())[:300]}") from None
    if len(examples) < 2:
        raise ConversionError(f"--calibration {path}: of its rows {report}; at least 2 must fit the context")
    kept = examples[1::_KEPT_BACK][:_MOST_KEPT_BACK]
    chosen = {id(example) for example in kept}
    used, tokens = [], 0
    for example in examples:
        if id(example) in chosen or tokens + len(example["input_ids"]) > MOST_TOKENS:
            continue
        used.append(example)
        tokens += len(example["input_ids"])
    return Rows(used, kept, sum(report.left_out.values()) + len(examples) - len(kept) - len(used))


def calibrate(folder: Path, files: Mapping[str, bytes], request: dict[str, Any]) -> tuple["Solved", str]:
    """Solves all weights of a request's source that have a linear layer.

    Args:
        folder: a new one, for the results.
        files: code, config and tokenizer of the model.
        request: as of `verify`; and `progress`, whether to show any.

    Returns:
        what was solved, and what was done, in a few words.

    Raises:
        ConversionError: rows that do not fit the model, or the process failed; the message ends in its last line.
    """
    folder.mkdir()
    for name, content in files.items():
        write_file(folder / name, content)
    done = run_apart("conversion.calibrate", {"folder": str(folder), **request}, quiet=not request["progress"])
    lines = (done.stdout or "").strip().splitlines()
    if done.returncode != 0 or not lines:
        said = [*lines, *(done.stderr or "").strip().splitlines()] or [f"exit code {done.returncode}"]
        raise ConversionError(f"--calibration failed ({said[-1]})")
    answer = json.loads(lines[-1])
    if "refused" in answer:
        raise ConversionError(answer["refused"])
    return Solved(folder, answer["names"]), answer["method"]


class Solved(Mapping[str, Callable[[], tuple[torch.Tensor, torch.Tensor]]]):
    """What returns numbers and scales of a weight, by its published name; each is in a file of its own."""

    def __init__(self, folder: Path, names: list[str]):
        self._files = {name: folder / f"{name}.safetensors" for name in names}

    def __getitem__(self, name: str) -> Callable[[], tuple[torch.Tensor, torch.Tensor]]:
        file = self._files[name]
        return lambda: _read(file)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def _read(file: Path) -> tuple[torch.Tensor, torch.Tensor]:
    with safe_open(file, framework="pt") as opened:
        return opened.get_tensor("numbers"), opened.get_tensor("scales")


# ---- in the process -------------------------------------------------------------------------------------------------


def _run(request: dict[str, Any]) -> dict[str, Any]:
    config, wanted = request["config"], request["quantization"]
    if not request["remote_code"] and library_class() is None:
        raise ConversionError("--calibration with --format split needs transformers 5.9 or later")
    rows = encode(Path(wanted["calibration"]), Path(request["folder"]), config)
    scheme = requested_scheme(request)
    source, dtype = open_requested(request), getattr(torch, config["dtype"])
    model = model_in_memory(request, lambda names: tensors_of(source, names, dtype)).eval()
    batches = _batches(rows.used, config["pad_token_id"], min(ROW_LENGTH, config["max_position_embeddings"]))
    # A fused weight has one input, whichever layout holds its parts: the first of them is listened to.
    weights = {split_names(name)[0]: name for name in source.specs if scheme.of(name) and name != EMBEDDING}
    weights |= {name: name for name in weights.values()}
    layers = {
        module: weights[f"{name}.weight"] for name, module in model.named_modules() if f"{name}.weight" in weights
    }
    portions = _portions(layers)
    with tqdm(total=len(portions) * len(batches), desc="calibration", disable=not request["progress"]) as bar:
        for portion in portions:
            for name, hessian in _sums(model, portion, batches, bar).items():
                precision = scheme.of(name)
                numbers, scales = solve(checked_values(source, name, dtype), hessian, precision)
                save_file({"numbers": numbers, "scales": scales}, Path(request["folder"]) / f"{name}.safetensors")
    tokens = sum(len(example["input_ids"]) for example in rows.used)
    method = f"GPTQ on {len(rows.used)} calibration rows, {tokens:,} tokens"
    return {
        "names": sorted(layers.values()),
        "method": method + f", {rows.left_out} rows left out" * bool(rows.left_out),
    }


def _batches(examples: list[dict[str, list[int]]], pad_token_id: int, length: int) -> list[dict[str, torch.Tensor]]:
    """Rows without padding, in which several examples are packed."""
    from training.data import PrefixLMCollator, pack

    length = max(length, *(len(example["input_ids"]) for example in examples))
    collate = PrefixLMCollator(pad_token_id, packed=True)
    batches = [collate([group]) for group in pack(examples, length)]
    return [{name: values for name, values in batch.items() if name != "labels"} for batch in batches]


def _portions(layers: dict[torch.nn.Module, str]) -> list[dict[torch.nn.Module, str]]:
    """Layers whose sums are held together."""
    portions: list[dict[torch.nn.Module, str]] = [{}]
    held = 0
    for module, name in layers.items():
        size = 4 * module.in_features**2
        if portions[-1] and held + size > _MOST_BYTES:
            portions.append({})
            held = 0
        portions[-1][module] = name
        held += size
    return portions


@torch.no_grad()
def _sums(
    model: torch.nn.Module, layers: dict[torch.nn.Module, str], batches: list[dict[str, torch.Tensor]], bar: tqdm
) -> dict[str, torch.Tensor]:
    """The sum of x x^T, float32 [columns, columns], over all inputs of each layer in every pass, by weight."""
    sums = {
        name: torch.zeros(module.in_features, module.in_features, device=module.weight.device)
        for module, name in layers.items()
    }

    def add(module: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        x = arguments[0].flatten(0, -2)
        x = x.float() if x.dtype is torch.float16 else x  # whose sums would leave its range
        sums[layers[module]] += x.T @ x

    hooks = [module.register_forward_pre_hook(add) for module in layers]
    try:
        for batch in batches:
            model(**batch, use_cache=False)
            bar.update()
    finally:
        for hook in hooks:
            hook.remove()
    return sums


if __name__ == "__main__":
    with contextlib.redirect_stdout(sys.stderr):
        try:
            answer = _run(json.load(sys.stdin))
        except ConversionError as error:
            answer = {"refused": str(error)}
    print(json.dumps(answer))
