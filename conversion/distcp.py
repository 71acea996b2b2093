"""A reader of `torch.distributed.checkpoint` folders that trusts nothing in them.

Such a folder holds `.metadata`, a pickled index, and `__RANK_N.distcp` files, in which every tensor (or the piece of
it that one rank held) is a `torch.save` archive at an offset that the index gives. The stock reader unpickles the
index without restriction. This one accepts only the names that the format needs and replaces each with an inert
stand-in, checks every number against the files, and reads tensors in the same way, one byte range at a time, so that
the optimizer state of a large checkpoint is never read.
"""

import io
import pickle
import struct
import zipfile
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from .errors import ConversionError
from .layout import TensorSpec
from .paths import inside
from .pickles import BoundedUnpickler
from .reading import read_bytes, said, shown


MAX_INDEX_BYTES = 64 * 2**20
# A tensor has at most a piece for each rank.
_MOST_PIECES = 4096
_MOST_PIECES_IN_ALL = 250_000
# In rows that lie side by side; pieces of rows need no comparison.
_MOST_COMPARISONS = 250_000
_MOST_DIMENSIONS = 16
# What an archive of `torch.save` holds besides the numbers.
_MOST_OF_ARCHIVE = 2**16
_METADATA = "torch.distributed.checkpoint.metadata"
_RECORDS = {
    *(
        (_METADATA, name)
        for name in (
            "Metadata",
            "TensorStorageMetadata",
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "MetadataIndex",
            "TensorProperties",
            "StorageMeta",
            "_MEM_FORMAT_ENCODING",
        )
    ),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    *(("pathlib", name) for name in ("Path", "PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath")),
    *(("pathlib._local", name) for name in ("PosixPath", "WindowsPath")),
}
_DTYPES = {name for name in dir(torch) if isinstance(getattr(torch, name), torch.dtype)}
_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
}


class _IndexUnpickler(BoundedUnpickler):
    """Unpickles an index into stand-ins. Each instance makes its own, so that a pickle cannot alter another's."""

    def __init__(self, content: bytes):
        super().__init__(content)
        self._record = type("Record", (), {"__init__": lambda record, *args: None, "__setstate__": _set_state})

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _RECORDS:
            return self._record
        if module == "torch" and name == "Size":
            return lambda values=(): _numbers(values)
        if module == "torch" and name in _DTYPES:
            return getattr(torch, name)
        if (module, name) == ("collections", "OrderedDict"):
            return _no_entries
        if (module, name) == ("builtins", "getattr"):
            # Some versions of Python pickle an enum member (here the memory format) as getattr(class, name).
            return lambda owner, attribute: None
        return super().find_class(module, name)


class _TensorUnpickler(BoundedUnpickler):
    """Unpickles what `torch.save` writes of a plain tensor into a `_StoredTensor`."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _StoredTensor.from_arguments
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        if (module, name) == ("collections", "OrderedDict"):  # of the hooks
            return _no_entries
        return super().find_class(module, name)

    def persistent_load(self, pid: Any) -> tuple[torch.dtype, str]:
        kind, dtype, key, _, _ = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype):
            raise pickle.UnpicklingError("it is not a tensor of floating numbers")
        return dtype, _text(key)


def _no_entries() -> dict[str, Any]:
    """An empty table. A `dict` could be asked to take keys that were not looked at."""
    return {}


def _set_state(record: Any, state: Any) -> None:
    """Keeps a dataclass's fields; TensorProperties alone has a tuple, of which the first entry is the dtype."""
    record.__dict__["fields"] = state if isinstance(state, dict) else {"state": state}


@dataclass(frozen=True)
class Piece:
    """One rank's part of a tensor: where it lies in the tensor, and in which bytes of which file."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int
    length: int


@dataclass(frozen=True)
class IndexedTensor:
    spec: TensorSpec
    pieces: tuple[Piece, ...]


def read_index(folder: Path) -> dict[str, IndexedTensor]:
    """Tensors of a distributed checkpoint by their full name.

    Args:
        folder: the folder with `.metadata`.

    Raises:
        ConversionError: the index is missing, damaged, asks for code, or describes impossible tensors.
    """
    path = folder / ".metadata"
    content = read_bytes(folder, path.name, MAX_INDEX_BYTES)
    try:
        metadata = _IndexUnpickler(content).load()
    except Exception as error:  # a hostile or damaged pickle can raise anything
        raise ConversionError(f"{path} is not a safe index ({said(error)}): copy the checkpoint again") from None
    try:
        return _tensors(metadata)
    except (ArithmeticError, AttributeError, KeyError, LookupError, TypeError, ValueError) as error:
        raise ConversionError(
            f"{path} is damaged ({type(error).__name__}: {said(error)}): copy the checkpoint again"
        ) from None


def _tensors(metadata: Any) -> dict[str, IndexedTensor]:
    storage: dict[tuple[str, tuple[int, ...]], dict[str, Any]] = {}
    for key, info in metadata.fields["storage_data"].items():
        offset = key.fields.get("offset")
        storage[_text(key.fields["fqn"]), () if offset is None else _numbers(offset)] = info.fields

    tensors, count, comparisons = {}, 0, 0
    for name, entry in metadata.fields["state_dict_metadata"].items():
        fields = getattr(entry, "fields", {})
        if "chunks" not in fields:  # a Python object of the optimizer, never read
            continue
        properties = fields["properties"].fields
        dtype = properties["state"][0] if "state" in properties else properties["dtype"]
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"{name} has no dtype")
        shape = _numbers(fields["size"])
        pieces = []
        count += len(fields["chunks"])
        if len(fields["chunks"]) > _MOST_PIECES or count > _MOST_PIECES_IN_ALL:
            raise ValueError(f"{_text(name)} is in too many pieces")
        for chunk in fields["chunks"]:
            offsets, sizes = _numbers(chunk.fields["offsets"]), _numbers(chunk.fields["sizes"])
            if prod(sizes) == 0:  # more ranks than rows
                continue
            info = storage[name, offsets]
            if info.get("transform_descriptors"):
                raise ValueError(f"{name} is stored with a transform, which is not supported; save it without")
            (start,), (length,) = _numbers([info["offset"]]), _numbers([info["length"]])
            pieces.append(Piece(offsets, sizes, _text(info["relative_path"]), start, length))
        tensors[_text(name)] = IndexedTensor(TensorSpec(shape, dtype), tuple(pieces))
        comparisons += _check_cover(name, shape, pieces, _MOST_COMPARISONS - comparisons)
    return tensors


def _numbers(values: Any) -> tuple[int, ...]:
    right = isinstance(values, list | tuple) and len(values) <= _MOST_DIMENSIONS
    if not right or any(type(value) is not int or not 0 <= value < 2**60 for value in values):
        raise ValueError(f"{shown(values)} are not sizes")
    return tuple(values)


def _text(value: Any) -> str:
    if type(value) is not str:
        raise ValueError(f"{shown(value)} is not a name")
    return value


def _check_cover(name: str, shape: tuple[int, ...], pieces: list[Piece], allowed: int) -> int:
    """Pieces must tile the tensor: inside it, apart from each other, as many elements as it has.

    Returns how many comparisons that took, of those that are allowed.
    """
    comparisons = 0
    for piece in pieces:
        if len(piece.offsets) != len(shape) or len(piece.sizes) != len(shape):
            raise ValueError(f"a piece of {name} has another number of dimensions")
        if any(o + s > n for o, s, n in zip(piece.offsets, piece.sizes, shape, strict=True)):
            raise ValueError(f"a piece of {name} lies outside of it")
    # Only pieces whose first rows have begun and not ended are compared: with pieces of rows that is one.
    begun: list[Piece] = []
    for a in sorted(pieces, key=lambda piece: piece.offsets):
        begun = [b for b in begun if not shape or a.offsets[0] < b.offsets[0] + b.sizes[0]]
        comparisons += len(begun)
        if comparisons > allowed:
            raise ValueError(f"{name} is in too many pieces that lie side by side")
        for b in begun:
            if all(
                ao < bo + bs and bo < ao + as_
                for ao, as_, bo, bs in zip(a.offsets, a.sizes, b.offsets, b.sizes, strict=True)
            ):
                raise ValueError(f"two pieces of {name} overlap")
        begun.append(a)
    if sum(prod(piece.sizes) for piece in pieces) != prod(shape):
        raise ValueError(f"the pieces of {name} do not cover it: a rank is missing")
    return comparisons


def check_files(folder: Path, tensors: list[IndexedTensor]) -> None:
    """Every file that `tensors` lie in is there, inside `folder`, and long enough, before anything is read."""
    ends: dict[str, int] = {}
    for tensor in tensors:
        for piece in tensor.pieces:
            ends[piece.file] = max(ends.get(piece.file, 0), piece.start + piece.length)
    for name, end in sorted(ends.items()):
        path = inside(folder, name, folder / ".metadata")
        if not path.is_file():
            raise ConversionError(f"{path} is missing: copy the files of every rank into {folder.name}")
        size = path.stat().st_size
        if size < end:
            raise ConversionError(f"{path} is truncated ({size:,} of at least {end:,} bytes): copy it again")


def read_tensor(folder: Path, name: str, tensor: IndexedTensor) -> torch.Tensor:
    """The whole tensor, put together from the pieces of all ranks.

    Raises:
        ConversionError: a piece is damaged, is not a plain tensor, or has another shape or dtype than the index says.
    """
    whole = None
    for piece in tensor.pieces:
        part = _read_piece(folder, name, tensor.spec.dtype, piece)
        if piece.sizes == tensor.spec.shape:
            return part
        if whole is None:
            whole = torch.empty(tensor.spec.shape, dtype=tensor.spec.dtype)
        whole[tuple(slice(o, o + s) for o, s in zip(piece.offsets, piece.sizes, strict=True))] = part
    if whole is None:
        raise ConversionError(f"{folder / '.metadata'}: {name} has no data; copy the checkpoint again")
    return whole


def _read_piece(folder: Path, name: str, dtype: torch.dtype, piece: Piece) -> torch.Tensor:
    path = inside(folder, piece.file, folder / ".metadata")
    expected = prod(piece.sizes) * dtype.itemsize
    if piece.length < expected:
        raise ConversionError(f"{folder / '.metadata'}: {name} claims more data than its file has; copy it again")
    if piece.length > expected + _MOST_OF_ARCHIVE:
        raise ConversionError(
            f"{folder / '.metadata'}: {name} would take {piece.length:,} bytes for {expected:,} of numbers; save the "
            "checkpoint again"
        )
    archive = bytearray(piece.length)
    try:
        with open(path, "rb") as file:
            file.seek(piece.start)
            if file.readinto(archive) != piece.length:
                raise ValueError("its file ends too soon")
        tensor = _read_archive(archive)
    except OSError as error:
        raise ConversionError(f"{path} cannot be read ({error.strerror}): check the disk and permissions") from None
    except Exception as error:  # a hostile or damaged archive can raise anything
        reason = said(error)
        raise ConversionError(f"{path} is damaged at {name} ({reason}): copy it again") from None
    if tensor.shape != piece.sizes or tensor.dtype != dtype:
        raise ConversionError(
            f"{path}: {name} is {tuple(tensor.shape)} {tensor.dtype} but its index says {piece.sizes} {dtype}; "
            "copy the checkpoint again"
        )
    return tensor


@dataclass(frozen=True)
class _StoredTensor:
    """A tensor as its pickle describes it: the numbers, of which it is a part, and where it lies in them."""

    dtype: torch.dtype
    key: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @classmethod
    def from_arguments(
        cls, storage: Any, offset: Any, shape: Any, strides: Any, requires_grad: Any, hooks: Any, metadata: Any = None
    ) -> "_StoredTensor":
        """From the arguments with which torch puts a plain tensor together."""
        if metadata:
            raise pickle.UnpicklingError("it is not a plain tensor")
        dtype, key = storage
        return cls(dtype, key, *_numbers([offset]), _numbers(shape), _numbers(strides))


def _read_archive(archive: bytearray) -> torch.Tensor:
    """The tensor in an archive of `torch.save`, in the memory of the archive.

    `torch.load(weights_only=True)` runs nothing either, but can be kept busy without an end.
    """
    with zipfile.ZipFile(io.BytesIO(archive)) as entries:
        found = {entry.filename.partition("/")[2]: entry for entry in entries.infolist()}
    # torch.save stores without compression: an archive that inflates is not its work.
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in found.values()):
        raise ValueError("its archive inflates")
    stored = _TensorUnpickler(_content(archive, found["data.pkl"])).load()
    if not isinstance(stored, _StoredTensor):
        raise ValueError("it is not a plain tensor")
    if "byteorder" in found and _content(archive, found["byteorder"]) != b"little":
        raise ValueError("its numbers are stored in another order of bytes")
    numbers = _content(archive, found[f"data/{stored.key}"])
    if len(stored.shape) != len(stored.strides) or len(numbers) % stored.dtype.itemsize:
        raise ValueError("its sizes do not fit")
    if len(numbers) < prod(stored.shape) * stored.dtype.itemsize:
        raise ValueError("it has less data than its shape")
    # Torch refuses a view that leaves the numbers.
    whole = torch.frombuffer(numbers, dtype=stored.dtype) if len(numbers) else torch.empty(0, dtype=stored.dtype)
    return whole.as_strided(stored.shape, stored.strides, stored.offset)


def _content(archive: bytearray, entry: zipfile.ZipInfo) -> memoryview:
    """The bytes of an entry. They lie behind a header of 30 bytes, which ends in the lengths of two more fields."""
    header = memoryview(archive)[entry.header_offset : entry.header_offset + 30]
    start = entry.header_offset + 30 + sum(struct.unpack("<HH", header[26:]))
    content = memoryview(archive)[start : start + entry.file_size]
    if len(content) != entry.file_size:
        raise ValueError("its archive is cut off")
    return content
