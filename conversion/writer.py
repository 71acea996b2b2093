"""Writes safetensors one tensor at a time, and puts a finished folder in place in one step."""

import ctypes
import errno
import glob
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from .errors import ConversionError
from .layout import TensorSpec


try:
    import fcntl
except ImportError:  # no file locks on this system: what a killed run leaves behind is then left to the user
    fcntl = None

_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_NAMES |= {torch.int64: "I64", torch.int32: "I32", torch.int8: "I8"}
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_SYNC_BYTES = 2**26
# What a converted or saved model folder consists of; a folder with anything else is not deleted.
_MODEL_FILES = {".gitattributes", "LICENSE", "README.md", "chat_template.jinja", "merges.txt", "vocab.txt"}
_MODEL_FILES |= {"tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "spm.model"}
_MODEL_SUFFIXES = {".json", ".py", ".safetensors"}
_TEMPLATES = "additional_chat_templates"


def plan_shards(specs: dict[str, TensorSpec], max_bytes: int) -> dict[str, list[str]]:
    """File name to the tensors in it, in order, none above `max_bytes` unless one tensor alone is.

    Shards follow one another in the order of the tensors, so that each is read once and written at once.
    `huggingface_hub`'s function takes a tensor that is larger than a shard out of that order.
    """
    shards: list[list[str]] = [[]]
    size = 0
    for name, spec in specs.items():
        if shards[-1] and size + spec.nbytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += spec.nbytes
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": names for i, names in enumerate(shards, 1)}


def shard_index(shards: dict[str, list[str]], specs: dict[str, TensorSpec]) -> bytes:
    """The content of `model.safetensors.index.json`."""
    index = {
        "metadata": {"total_size": sum(spec.nbytes for spec in specs.values())},
        "weight_map": {name: file for file, names in shards.items() for name in names},
    }
    return (json.dumps(index, indent=2, sort_keys=True) + "\n").encode()


class ShardWriter:
    """One safetensors file, written in the order of its specs.

    The file's header comes first and holds every offset, so that the tensors can follow one by one without being held
    together (https://github.com/huggingface/safetensors, "Format"). A tensor is hashed, and what was written before it
    goes to the disk, while the next is read: two tensors are in memory.
    """

    def __init__(self, path: Path, specs: dict[str, TensorSpec]):
        self._pending = dict(specs)
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, spec in specs.items():
            header[name] = {
                "dtype": _NAMES[spec.dtype],
                "shape": list(spec.shape),
                "data_offsets": [end, end + spec.nbytes],
            }
            end += spec.nbytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._path = path
        self._hash = hashlib.sha256()
        self._file = open(path, "xb")  # noqa: SIM115 - `close` and `abort` end it
        self._threads = ThreadPoolExecutor(2)
        self._hashed: Future | None = None
        self._synced: Future | None = None
        self._unsynced = 0
        self._put(len(text).to_bytes(8, "little") + text)

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Appends the next tensor, which must not be changed after. It must be the next of the specs, as they say."""
        expected = next(iter(self._pending))
        spec = self._pending.pop(expected)
        if name != expected or TensorSpec(tuple(tensor.shape), tensor.dtype) != spec:
            raise ValueError(f"{name} {tuple(tensor.shape)} {tensor.dtype} follows, but {expected} {spec} is due")
        self._put(tensor_bytes(tensor))

    def _put(self, data: bytes | memoryview) -> None:
        with naming(self._path):
            if self._hashed is not None:
                self._hashed.result()
            self._hashed = self._threads.submit(self._hash.update, data)
            self._file.write(data)
            self._unsynced += len(data)
            if self._unsynced >= _SYNC_BYTES and (self._synced is None or self._synced.done()):
                if self._synced is not None:
                    self._synced.result()
                # The system would leave the disk idle until gigabytes are due, and `close` would wait for them all.
                self._synced = self._threads.submit(os.fsync, self._file.fileno())
                self._unsynced = 0

    def close(self) -> str:
        """Flushes the file to the disk and returns its SHA-256."""
        if self._pending:
            raise ValueError(f"{next(iter(self._pending))} was not written")
        with naming(self._path):
            self._threads.shutdown()
            if self._synced is not None:
                self._synced.result()
            _flush(self._file)
        return self._hash.hexdigest()

    def abort(self) -> None:
        """Closes an unfinished file."""
        self._threads.shutdown()
        with suppress(OSError):  # what could not be written is written once more, and fails again without the name
            self._file.close()


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Lets an error of the system name the file: an error in writing to an open file does not."""
    try:
        yield
    except OSError as error:
        error.filename = str(path)
        raise


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The tensor's bytes in row order, without a copy where it is contiguous."""
    return memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors agree in shape, dtype and every bit, also in the sign of zeros."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    bits = _BITS[a.element_size()]
    return torch.equal(a.contiguous().view(bits), b.contiguous().view(bits))


def write_file(path: Path, content: bytes) -> str:
    """Writes a small file to the disk, in a folder that is made if it is missing, and returns its SHA-256."""
    path.parent.mkdir(exist_ok=True)
    with naming(path), open(path, "xb") as file:
        file.write(content)
        _flush(file)
    return hashlib.sha256(content).hexdigest()


def _flush(file) -> None:
    with file:
        file.flush()
        os.fsync(file.fileno())


def check_output(output: Path, source: Path, force: bool) -> None:
    """Refuses an output that would overwrite the user's data.

    Raises:
        ConversionError: it exists and `force` is off, it is or holds the source, or it holds what no conversion wrote.
    """
    target, origin = output.resolve(), source.resolve()
    _recover(target)
    if origin == target or origin.is_relative_to(target):
        raise ConversionError(f"--output {output} is or holds the source itself: choose another folder")
    try:
        if not target.exists():
            return
        if not target.is_dir():
            raise ConversionError(f"--output {output} is a file: choose another name")
        entries = sorted(entry.name for entry in target.iterdir())
        if not entries:
            return
        if not force:
            raise ConversionError(f"--output {output} exists: pass --force to replace it, or choose another folder")
        for name in entries:
            if not _is_of_a_model(target / name):
                raise ConversionError(
                    f"--output {output} holds {name}, which no conversion wrote: move it, or choose another folder"
                )
        if not {"config.json", "adapter_config.json"} & set(entries):
            raise ConversionError(f"--output {output} is not a model's folder: choose another")
    except OSError as error:
        raise ConversionError(f"--output {output} cannot be read ({error.strerror}): check its permissions") from None


def _is_of_a_model(path: Path) -> bool:
    """Whether a file, or the folder of named chat templates, is one that a converted or saved model has."""
    if path.is_dir():
        return path.name == _TEMPLATES and all(entry.suffix == ".jinja" for entry in path.iterdir())
    return path.name in _MODEL_FILES or path.suffix in _MODEL_SUFFIXES


@contextmanager
def staged(output: Path, needed: int) -> Iterator[tuple[Path, Callable[[], None]]]:
    """A temporary folder beside `output`, and the function that puts it in `output`'s place in one step.

    Without that call, or if it fails, the folder is removed and `output` is unchanged. What a killed run left behind
    is removed by the next run for the same output: a live run holds a lock on its folder.

    Args:
        output: where the finished folder is to be.
        needed: bytes that will be written; a disk with less space is refused at once.

    Raises:
        ConversionError: the disk is full or not writable.
    """
    output = output.resolve()
    prefix = f".{output.name}.converting-"
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        for leftover in output.parent.glob(f"{glob.escape(prefix)}*"):
            _remove_if_abandoned(leftover)
        free = shutil.disk_usage(output.parent).free
        if free < needed:
            raise ConversionError(
                f"--output {output}: the disk has {free:,} bytes free, and {needed:,} are needed; make room"
            )
    except OSError as error:
        raise ConversionError(f"--output {output} cannot be written ({error.strerror}): choose another") from None
    folder = output.parent / f"{prefix}{secrets.token_hex(4)}"
    lock = None
    # The folder is made inside: an interruption right after that removes it too.
    try:
        try:
            folder.mkdir()
        except OSError as error:
            raise ConversionError(f"--output {output} cannot be written ({error.strerror}): choose another") from None
        lock = _lock(folder)
        yield folder, lambda: _put_in_place(folder, output)
    except OSError as error:
        reason = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else error.strerror
        path = Path(error.filename or folder)
        file = f": {path.name}" if path.parent == folder else ""
        raise ConversionError(
            f"--output {output}{file} could not be written ({reason}): make room or choose another disk; "
            "the output is unchanged"
        ) from None
    finally:
        # After the swap this name holds the old output, or nothing.
        shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _recover(output: Path) -> None:
    """Brings back an old output that a run killed between the two renames of `_put_in_place` had put aside."""
    aside = sorted(output.parent.glob(f".{glob.escape(output.name)}.converting-*-old"))
    if aside and not output.exists():
        os.rename(aside[0], output)


def _put_in_place(folder: Path, output: Path) -> None:
    _sync(folder)
    if not output.exists() or not any(output.iterdir()):
        if output.exists():
            output.rmdir()
        os.rename(folder, output)
    elif not _exchange(folder, output):
        # Without an exchange in one step there is a moment with no output; the old one is then in `aside`.
        aside = folder.with_name(folder.name + "-old")
        os.rename(output, aside)
        try:
            os.rename(folder, output)
        except OSError:
            os.rename(aside, output)
            raise
        os.rename(aside, folder)
    _sync(output.parent)


def _exchange(a: Path, b: Path) -> bool:
    """Swaps two folders in one step where the system can (Linux's renameat2), else returns False."""
    at_fdcwd, exchange = -100, 2
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    return rename(at_fdcwd, os.fsencode(a), at_fdcwd, os.fsencode(b), exchange) == 0


def _sync(folder: Path) -> None:
    """Flushes a folder's entries to the disk, where the system can open a folder."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError:
        pass
    finally:
        os.close(descriptor)


def _lock(folder: Path) -> int | None:
    if fcntl is None:
        return None
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _remove_if_abandoned(folder: Path) -> None:
    try:
        descriptor = _lock(folder)
    except FileNotFoundError:  # another run was quicker
        return
    if descriptor is not None:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(descriptor)
