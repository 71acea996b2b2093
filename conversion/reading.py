"""Reads the small files of a checkpoint within bounds: regular files only, of limited size, depth and nodes."""

import json
import math
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from reprlib import repr as _short
from typing import Any

import yaml

from .errors import ConversionError
from .paths import inside


# Settings, lists of tokens and templates; the largest known is a megabyte or two.
MAX_BYTES = 8 * 2**20
# What can hold a whole vocabulary or the name of every tensor. Models of pieces are a few megabytes.
_LARGER = {"tokenizer.json": 48 * 2**20, "model.safetensors.index.json": 64 * 2**20}
_LARGER |= dict.fromkeys(("vocab.json", "vocab.txt", "merges.txt"), 16 * 2**20)
_LARGER |= dict.fromkeys(("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "spm.model"), 16 * 2**20)
# Each takes up to 200 bytes of memory; the largest vocabulary that is published, with its merges, has two million.
MAX_JSON_VALUES = 3_000_000
# Training settings are a few kilobytes, and the parser reads a tenth of a megabyte a second.
MAX_YAML_BYTES = 256 * 2**10
# Values in a YAML file with every alias written out, and levels of nesting in either format.
MAX_YAML_NODES = 100_000
MAX_DEPTH = 64
_HALF_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")


def shown(value: Any) -> str:
    """A value from a checkpoint for a message, of bounded length."""
    try:
        text = _short(value)
        return text if len(text) <= 200 else text[:200] + "..."
    except (ValueError, RecursionError):  # an integer of thousands of digits has no decimal form
        return f"a {type(value).__name__} that is too large to show"


def is_there(folder: Path, name: str) -> bool:
    """Whether a file of this name is in the checkpoint.

    Raises:
        ConversionError: it is not a regular file, or is a link out of the checkpoint.
    """
    path = inside(folder, name, folder)
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    if not path.is_file():
        raise ConversionError(f"{path} is not a regular file: copy the file itself there")
    return True


def read_bytes(folder: Path, name: str, limit: int | None = None) -> bytes:
    """The content of a small file of a checkpoint.

    Args:
        folder: the checkpoint.
        name: name of the file in it.
        limit: most bytes that such a file has; None is that of files of this name.

    Raises:
        ConversionError: it is missing, unreadable, too large, or not a regular file; a pipe is never waited for.
    """
    path = inside(folder, name, folder)
    limit = _LARGER.get(name, MAX_BYTES) if limit is None else limit
    try:
        # What a name stands for may change between a look at it and opening it; an open file stays what it is.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise ConversionError(f"{path} is not a regular file: copy the file itself there")
            with open(descriptor, "rb", closefd=False) as file:
                content = file.read(limit + 1)
        finally:
            os.close(descriptor)
    except FileNotFoundError:
        raise ConversionError(f"{path} is missing: the checkpoint is incomplete; copy it again") from None
    except OSError as error:
        if path.exists() and not path.is_file():
            raise ConversionError(f"{path} is not a regular file: copy the file itself there") from None
        raise ConversionError(f"{path} cannot be read ({error.strerror}): check its permissions") from None
    if len(content) > limit:
        raise ConversionError(f"{path} is larger than {limit:,} bytes: it is not what it should be")
    return content


def read_text(folder: Path, name: str, limit: int | None = None) -> str:
    """As `read_bytes`, for text in UTF-8."""
    try:
        return read_bytes(folder, name, limit).decode("utf-8")
    except UnicodeDecodeError:
        raise ConversionError(f"{folder / name} is not UTF-8 text: copy it again") from None


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """A JSON object of a checkpoint; as `read_text`, and refuses what is not an object, or is too deep or too large.

    Numbers without a value, which Python reads and writes and JSON does not have, are refused too.
    """
    text = read_text(folder, name)
    if text.count(",") + text.count("[") + text.count("{") > MAX_JSON_VALUES:
        raise ConversionError(f"{folder / name} has more than {MAX_JSON_VALUES:,} values: it is not what it should be")
    try:
        value = json.loads(text, parse_constant=_refuse_constant, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise ConversionError(f"{folder / name} is not valid JSON ({said(error)}): download it again") from None
    if not isinstance(value, dict):
        raise ConversionError(f"{folder / name} is not a JSON object: download it again")
    if _is_deeper(value, MAX_DEPTH):
        raise ConversionError(f"{folder / name} is nested deeper than {MAX_DEPTH} levels: download it again")
    if _HALF_ESCAPE.search(text) and not all(map(_is_unicode, _texts(value))):
        raise ConversionError(f"{folder / name} holds half a surrogate pair, which is not text: download it again")
    return value


def read_yaml(folder: Path, name: str) -> dict[str, Any]:
    """A YAML mapping of a checkpoint, plain data only; as `read_text`, and refuses what is not a mapping.

    A small file that becomes large when its aliases are expanded is refused before that happens.
    """
    text = read_text(folder, name, MAX_YAML_BYTES)
    try:
        loader = yaml.SafeLoader(text)
        try:
            node = loader.get_single_node()
            if node is not None:
                _check_size(node, folder / name)
            value = None if node is None else loader.construct_document(node)
        finally:
            loader.dispose()
    except (yaml.YAMLError, ArithmeticError, LookupError, TypeError, ValueError, RecursionError) as error:
        raise ConversionError(f"{folder / name} is not plain YAML ({said(error)}): copy it again") from None
    if not isinstance(value, dict):
        raise ConversionError(f"{folder / name} is not a YAML mapping: copy it again")
    return value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def _finite(text: str) -> float:
    value = float(text)
    if value in (math.inf, -math.inf):
        raise ValueError(f"{text[:20]} is too large")
    return value


def _check_size(root: yaml.Node, path: Path) -> None:
    """Refuses a tree of nodes that is too deep or, with every alias written out, too large; or that holds itself."""
    sizes: dict[int, int] = {}

    def size(node: yaml.Node, depth: int) -> int:
        if depth > MAX_DEPTH:
            raise ConversionError(f"{path} is nested deeper than {MAX_DEPTH} levels: copy it again")
        if isinstance(node.value, str) and not _is_unicode(node.value):
            raise ConversionError(f"{path} holds half a surrogate pair, which is not text: copy it again")
        if id(node) not in sizes:
            children = node.value if isinstance(node.value, list) else []
            pairs = [part for child in children for part in (child if isinstance(child, tuple) else (child,))]
            sizes[id(node)] = 1 + sum(size(part, depth + 1) for part in pairs)
        return sizes[id(node)]

    if size(root, 0) > MAX_YAML_NODES:
        raise ConversionError(f"{path} has more than {MAX_YAML_NODES:,} values with its aliases: copy it again")


def _is_unicode(text: str) -> bool:
    """Whether text can be written as UTF-8; a lone surrogate, which JSON can escape, cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _texts(value: Any) -> Iterator[str]:
    """Every string in lists and tables, keys too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from value
        value = list(value.values())
    for item in value if isinstance(value, list) else ():
        yield from _texts(item)


def _is_deeper(value: Any, levels: int) -> bool:
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return levels < 0 or any(_is_deeper(child, levels - 1) for child in children)


def said(error: Exception) -> str:
    """What an error says, in one line of bounded length."""
    try:
        return " ".join(str(error).split())[:300] or type(error).__name__
    except (ValueError, RecursionError):
        return type(error).__name__
