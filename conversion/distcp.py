"""A reader of `torch.distributed.checkpoint` folders that trusts nothing in them.

Such a folder holds `.metadata`, a pickled index, and `__RANK_N.distcp` files, in which every tensor (or the piece of
it that one rank held) is a `torch.save` archive at an offset that the index gives. The stock reader unpickles the
index without restriction. This one accepts only the names that the format needs and replaces each with an inert
stand-in, checks every number against the files, and reads tensors with `weights_only=True`, one byte range at a time,
so that the optimizer state of a large checkpoint is never read.
"""

import io
import pickle
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from .errors import ConversionError
from .layout import TensorSpec
from .paths import inside
from .reading import read_bytes, said, shown


MAX_INDEX_BYTES = 64 * 2**20
# The index of a checkpoint nests tuples three deep, and a tensor has at most a piece for each rank.
_MOST_NESTED = 16
_MOST_PIECES = 4096
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


class _IndexUnpickler(pickle._Unpickler):
    """Unpickles an index into stand-ins. Each instance makes its own, so that a pickle cannot alter another's.

    This is the unpickler written in Python. The one written in C reserves memory for whatever number a pickle gives a
    remembered object, and computes the hash of a deeply nested tuple until the stack of the process is used up.
    """

    def __init__(self, file: io.BufferedIOBase):
        super().__init__(file)
        self._record = type("Record", (), {"__init__": lambda record, *args: None, "__setstate__": _set_state})

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _RECORDS:
            return self._record
        if module == "torch" and name == "Size":
            return lambda values=(): _numbers(values)
        if module == "torch" and name in _DTYPES:
            return getattr(torch, name)
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        if (module, name) == ("builtins", "getattr"):
            # Some versions of Python pickle an enum member (here the memory format) as getattr(class, name).
            return lambda owner, attribute: None
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which the format does not need")


def _nesting(value: tuple, levels: int = _MOST_NESTED) -> None:
    if levels == 0:
        raise pickle.UnpicklingError("its tuples are nested too deeply")
    for item in value:
        if type(item) is tuple:
            _nesting(item, levels - 1)


def _checking(load: Callable[[Any], None]) -> Callable[[Any], None]:
    def checked(unpickler: Any) -> None:
        load(unpickler)
        _nesting(unpickler.stack[-1])

    return checked


_IndexUnpickler.dispatch = {
    **pickle._Unpickler.dispatch,
    **{
        opcode[0]: _checking(pickle._Unpickler.dispatch[opcode[0]])
        for opcode in (pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3)
    },
}


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
        metadata = _IndexUnpickler(io.BytesIO(content)).load()
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

    tensors = {}
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
        _check_cover(name, shape, pieces)
    return tensors


def _numbers(values: Any) -> tuple[int, ...]:
    numbers = tuple(values)
    if any(type(value) is not int or not 0 <= value < 2**62 for value in numbers):
        raise ValueError(f"{shown(numbers)} are not sizes")
    return numbers


def _text(value: Any) -> str:
    if type(value) is not str:
        raise ValueError(f"{shown(value)} is not a name")
    return value


def _check_cover(name: str, shape: tuple[int, ...], pieces: list[Piece]) -> None:
    """Pieces must tile the tensor: inside it, apart from each other, as many elements as it has."""
    for piece in pieces:
        if len(piece.offsets) != len(shape) or len(piece.sizes) != len(shape):
            raise ValueError(f"a piece of {name} has another number of dimensions")
        if any(o + s > n for o, s, n in zip(piece.offsets, piece.sizes, shape, strict=True)):
            raise ValueError(f"a piece of {name} lies outside of it")
    if len(pieces) > _MOST_PIECES:
        raise ValueError(f"{name} is in more than {_MOST_PIECES} pieces")
    # Only pieces whose first rows have begun and not ended are compared: with pieces of rows that is one.
    begun: list[Piece] = []
    for a in sorted(pieces, key=lambda piece: piece.offsets):
        begun = [b for b in begun if not shape or a.offsets[0] < b.offsets[0] + b.sizes[0]]
        for b in begun:
            if all(
                ao < bo + bs and bo < ao + as_
                for ao, as_, bo, bs in zip(a.offsets, a.sizes, b.offsets, b.sizes, strict=True)
            ):
                raise ValueError(f"two pieces of {name} overlap")
        begun.append(a)
    if sum(prod(piece.sizes) for piece in pieces) != prod(shape):
        raise ValueError(f"the pieces of {name} do not cover it: a rank is missing")


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
    try:
        with open(path, "rb") as file:
            file.seek(piece.start)
            archive = io.BytesIO(file.read(piece.length))
        # torch.save stores without compression: an archive that inflates is not its work.
        with zipfile.ZipFile(archive) as entries:
            if sum(entry.file_size for entry in entries.infolist()) > piece.length:
                raise ValueError("its archive inflates")
        archive.seek(0)
        tensor = torch.load(archive, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ConversionError(f"{path} cannot be read ({error.strerror}): check the disk and permissions") from None
    except Exception as error:  # a hostile or damaged archive can raise anything
        reason = said(error)
        raise ConversionError(f"{path} is damaged at {name} ({reason}): copy it again") from None
    if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided or tensor.is_quantized:
        raise ConversionError(f"{path}: {name} is not a plain tensor; save the checkpoint again")
    if tensor.shape != piece.sizes or tensor.dtype != dtype:
        raise ConversionError(
            f"{path}: {name} is {tuple(tensor.shape)} {tensor.dtype} but its index says {piece.sizes} {dtype}; "
            "copy the checkpoint again"
        )
    if tensor.untyped_storage().nbytes() < expected:
        raise ConversionError(f"{path}: {name} has less data than its shape; save the checkpoint again")
    return tensor.detach()
