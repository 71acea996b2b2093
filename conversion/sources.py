"""Opens checkpoints of every form behind one interface: a config, tensor specs, and `read(name)`."""

import json
import os
import re
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from . import config as configs
from . import distcp
from .errors import ConversionError
from .layout import TensorSpec, group_names, measure
from .paths import inside
from .reading import is_there, read_json, read_yaml, shown
from .tokenizer import Envelope, Tokenizer, find_tokenizer, read_tokenizer
from .writer import tensor_bytes


# A header of 150 bytes a tensor; the library allows six times as much.
MAX_HEADER_BYTES = 16 * 2**20
_TRAINING_NAME = re.compile(r"model\.([HL])_level\.core\.layers\.(\d+)\.(.+)")
_TRAINING_OUTER_NAMES = {
    "model.zL_init": "model.z_L_init",
    "embed_tokens.embedding_weight": "model.embed_tokens.weight",
}
# Written by older training code and unused by the model.
_UNUSED = re.compile(r"model\.zH_init|model\.[HL]_level\.core\.rotary_emb\..*")
_SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(kw_only=True)
class Source:
    """An opened checkpoint. Opening reads headers only; `read` reads one tensor of the published layout.

    `envelope` is what the checkpoint calls the tokens of a prompt, and `prompts_stated` whether it says itself which
    of them the model looks for.
    """

    path: Path
    config: dict[str, Any]
    specs: dict[str, TensorSpec]
    provenance: dict[str, str]
    warnings: list[str]
    tokenizer: Tokenizer | None
    generation: dict[str, Any] = field(default_factory=dict)
    envelope: Envelope = field(default_factory=Envelope)
    prompts_stated: bool = True

    def read(self, name: str) -> torch.Tensor:
        """The tensor of this published name, on the CPU, in the dtype that it is stored in.

        Raises:
            ConversionError: the file is damaged or gone.
        """
        raise NotImplementedError


def open_source(
    path: Path, epoch: int | None = None, weights: str = "ema", tokenizer: Path | None = None, label: str | None = None
) -> Source:
    """Opens a checkpoint folder of any form.

    Args:
        path: a training checkpoint or a Hugging Face folder.
        epoch: which epoch of a training checkpoint; None is the latest.
        weights: `ema` (averages) or `raw`, of a training checkpoint.
        tokenizer: a tokenizer folder or `tokenizer.json` to use in place of the checkpoint's.
        label: what the model card calls the source; None is the folder's name.

    Raises:
        ConversionError: it is not a checkpoint, or a damaged or hostile one.
    """
    if not path.exists():
        raise ConversionError(f"{path} does not exist: pass a checkpoint folder or a Hub id like user/name")
    if not path.is_dir():
        raise ConversionError(f"{path} is a file: pass the folder that it lies in")
    entries = {entry.name for entry in _listing(path)}
    if re.fullmatch(r"fsdp2_epoch_\d+", path.name) and ".metadata" in entries:
        raise ConversionError(f"{path} is one epoch: pass the folder above it, with --epoch")
    label = label or path.resolve().name
    if "all_config.yaml" in entries or any(name.startswith("fsdp2_epoch_") for name in entries):
        return _TrainingCheckpoint.open(path, epoch, weights, tokenizer, label)
    if epoch is not None or weights != "ema":
        raise ConversionError(f"{path} is not a training checkpoint: --epoch and --weights do not apply to it")
    if "config.json" in entries:
        return _ModelFolder.open(path, tokenizer, label)
    if not entries:
        raise ConversionError(f"{path} is empty: pass a checkpoint folder")
    raise ConversionError(
        f"{path} is not a checkpoint: it has neither all_config.yaml (training) nor config.json (Hugging Face)"
    )


@dataclass(kw_only=True)
class _TrainingCheckpoint(Source):
    """What the training repository writes: two YAML files and a distributed checkpoint per epoch."""

    folder: Path
    index: dict[str, distcp.IndexedTensor]
    keys: dict[str, str]

    @classmethod
    def open(
        cls, path: Path, epoch: int | None, weights: str, tokenizer: Path | None, label: str
    ) -> "_TrainingCheckpoint":
        if weights not in {"ema", "raw"}:
            raise ConversionError(f"--weights {weights!r} is unknown: choose ema or raw")
        run, metadata = read_yaml(path, "all_config.yaml"), read_yaml(path, "train_metadata.yaml")
        epochs = sorted(
            int(match[1]) for entry in _listing(path) if (match := re.fullmatch(r"fsdp2_epoch_(\d+)", entry.name))
        )
        if not epochs:
            raise ConversionError(f"{path} has no fsdp2_epoch_N folder: copy the weights beside all_config.yaml")
        if epoch is not None and epoch not in epochs:
            raise ConversionError(f"{path} has no epoch {epoch}: --epoch may be one of {epochs}")
        epoch = epochs[-1] if epoch is None else epoch
        folder = inside(path, f"fsdp2_epoch_{epoch}", path)
        index = distcp.read_index(folder)
        keys = _training_keys(index, weights, folder)
        specs = {name: index[key].spec for name, key in keys.items()}
        dimensions = measure(specs, str(folder))
        specs = {name: specs[name] for name in dimensions.shapes()}
        distcp.check_files(folder, [index[key] for key in keys.values()])

        info = metadata.get("tokenizer_info") or {}
        if not isinstance(info, dict):
            raise ConversionError(f"{path / 'train_metadata.yaml'}: tokenizer_info is not a table")
        folder_of = find_tokenizer(tokenizer) if tokenizer else _tokenizer_within(path, info.get("tokenizer_path"))
        found = read_tokenizer(folder_of, dimensions.vocabulary)
        envelope = configs.training_envelope(info, found, str(path))
        config, warnings = configs.from_training(run, metadata, envelope, found, dimensions, str(path))
        return cls(
            path=path,
            config=config,
            specs=specs,
            provenance={
                "source": label,
                "kind": "training checkpoint",
                "epoch": str(epoch),
                "weights": "averages (ema)" if weights == "ema" else "raw",
            },
            warnings=warnings,
            tokenizer=found,
            envelope=envelope,
            folder=folder,
            index=index,
            keys=keys,
        )

    def read(self, name: str) -> torch.Tensor:
        key = self.keys[name]
        return distcp.read_tensor(self.folder, key, self.index[key])


@dataclass(kw_only=True)
class _ModelFolder(Source):
    """A Hugging Face folder: `config.json` in either dialect, safetensors in one file or shards, fused or split.

    `groups` names the stored tensors of each published one, `places` the file and offset of each stored one.
    """

    groups: dict[str, tuple[str, ...]]
    places: dict[str, tuple[Path, int]]

    @classmethod
    def open(cls, path: Path, tokenizer: Path | None, label: str) -> "_ModelFolder":
        settings = read_json(path, "config.json")
        configs.refuse_quantized(settings, str(path))
        files = _weight_files(path)
        stored: dict[str, TensorSpec] = {}
        places: dict[str, tuple[Path, int]] = {}
        for file, names in files.items():
            header = read_header(file)
            for name in header if names is not None else ():
                if name not in names:
                    raise ConversionError(
                        f"{file} holds {name}, which the index does not place there: download it again"
                    )
            for name in names or ():
                if name not in header:
                    raise ConversionError(f"{file} lacks the tensor {name} that the index names: download it again")
            for name, (spec, start) in header.items():
                stored[name], places[name] = spec, (file, start)
        groups = group_names(stored, str(path))
        specs = {name: _joined(name, members, stored, path) for name, members in groups.items()}
        dimensions = measure(specs, str(path))
        specs = {name: specs[name] for name in dimensions.shapes()}
        found = read_tokenizer(
            find_tokenizer(tokenizer or path, required=tokenizer is not None), dimensions.vocabulary
        )
        config, warnings = configs.from_published(settings, dimensions, found, str(path))
        split = any(len(members) > 1 for members in groups.values())
        return cls(
            path=path,
            config=config,
            specs=specs,
            provenance={
                "source": label,
                "kind": f"Hugging Face folder, {'split' if split else 'fused'} layout",
                "weights": "as stored",
            },
            warnings=warnings,
            tokenizer=found,
            generation=configs.check_generation(
                read_json(path, "generation_config.json") if is_there(path, "generation_config.json") else {},
                str(path),
            ),
            envelope=configs.published_envelope(found),
            prompts_stated="prefix_end_token_id" in settings,
            groups=groups,
            places=places,
        )

    def read(self, name: str) -> torch.Tensor:
        # Read, not mapped: a disk that fails under a map kills the process, and mapped pages count as its memory.
        whole = torch.empty(self.specs[name].shape, dtype=self.specs[name].dtype)
        members = self.groups[name]
        for member, part in zip(members, whole.chunk(len(members)), strict=True):
            _read_into(part, *self.places[member])
        return whole


def _training_keys(index: dict[str, distcp.IndexedTensor], weights: str, folder: Path) -> dict[str, str]:
    """Published name to the name in the distributed checkpoint: of the average, where there is to be one."""
    names = {}
    for key in index:
        name = key.removeprefix("model.")
        if name == key or _UNUSED.fullmatch(name):
            continue
        if match := _TRAINING_NAME.fullmatch(name):
            published = f"model.{match[1]}_module.layers.{match[2]}.{match[3]}"
        else:
            published = _TRAINING_OUTER_NAMES.get(name, name)
        names[published] = name
    if not names:
        raise ConversionError(f"{folder / '.metadata'} lists no model tensors: is it an HRM-Text checkpoint?")
    for published, members in group_names(names, str(folder)).items():
        if members != (published,):
            raise ConversionError(f"{folder}: {published} is split, which no training checkpoint is")
    if weights == "raw":
        return {published: f"model.{name}" for published, name in names.items()}

    keys = {}
    for published, name in names.items():
        raw, average = f"model.{name}", f"optim.state.{name}.param_ema"
        if published == "model.z_L_init":  # a buffer, which the optimizer does not average
            keys[published] = raw
            continue
        if average not in index:
            raise ConversionError(f"{folder / '.metadata'} has no average of {name}: pass --weights raw")
        if index[average].spec.shape != index[raw].spec.shape:
            raise ConversionError(f"{folder / '.metadata'}: {name} and its average differ in shape; copy it again")
        keys[published] = average
    return keys


def _weight_files(path: Path) -> dict[Path, dict[str, None] | None]:
    """The safetensors files, and the names of the tensors in each where an index says them."""
    index_path = path / "model.safetensors.index.json"
    if is_there(path, index_path.name):
        weight_map = read_json(path, index_path.name).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ConversionError(f"{index_path} has no weight_map: download it again")
        if (
            name := next((name for name, shard in weight_map.items() if not isinstance(shard, str)), None)
        ) is not None:
            raise ConversionError(f"{index_path}: {name} is not placed in a file; download it again")
        files = {shard: inside(path, shard, index_path) for shard in dict.fromkeys(weight_map.values())}
        for file in files.values():
            if not file.is_file():
                raise ConversionError(f"{file} is missing, and {index_path.name} names it: download it")
        names: dict[Path, dict[str, None]] = {file: {} for file in files.values()}
        for name, shard in weight_map.items():
            names[files[shard]][name] = None
        return names
    single = inside(path, "model.safetensors", path)
    if single.is_file():
        return {single: None}
    if any(path.glob("pytorch_model*.bin")):
        raise ConversionError(f"{path} holds pickled weights only: save it with safe_serialization=True first")
    raise ConversionError(f"{path} has no model.safetensors: download the weights")


def read_header(file: Path) -> dict[str, tuple[TensorSpec, int]]:
    """Spec and offset of each tensor in a safetensors file, whose header the library has checked."""
    try:
        with open(file, "rb", opener=_without_waiting) as opened:
            if not stat.S_ISREG(os.fstat(opened.fileno()).st_mode):
                raise ConversionError(f"{file} is not a regular file: copy the file itself there")
            length = int.from_bytes(opened.read(8), "little")
            if length > MAX_HEADER_BYTES:
                raise ValueError(f"its header would have {length:,} bytes")
            # The library says of every file that it cannot open that there is none.
            with safe_open(file, framework="pt", device="cpu"):
                pass
            header = json.loads(opened.read(length))
            size = os.fstat(opened.fileno()).st_size
    except PermissionError as error:
        raise ConversionError(f"{file} cannot be read ({error.strerror}): check its permissions") from None
    except (OSError, SafetensorError, OverflowError, MemoryError, ValueError) as error:
        raise ConversionError(f"{file} is damaged or not a safetensors file ({error}): download it again") from None
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        dtype = _SAFETENSORS_DTYPES.get(entry["dtype"])
        if dtype is None:
            raise ConversionError(f"{file}: {name} is {entry['dtype']}; convert the checkpoint before quantization")
        spec, start = TensorSpec(tuple(entry["shape"]), dtype), 8 + length + entry["data_offsets"][0]
        if start + spec.nbytes > size:
            raise ConversionError(f"{file} is truncated at {name}: download it again")
        tensors[name] = spec, start
    return tensors


def read_place(file: Path, spec: TensorSpec, start: int) -> torch.Tensor:
    """The tensor that `read_header` found at `start`."""
    tensor = torch.empty(spec.shape, dtype=spec.dtype)
    _read_into(tensor, file, start)
    return tensor


def _read_into(tensor: torch.Tensor, path: Path, start: int) -> None:
    try:
        with open(path, "rb", opener=_without_waiting) as file:
            file.seek(start)
            read = file.readinto(tensor_bytes(tensor))
    except OSError as error:
        raise ConversionError(f"{path} cannot be read ({error.strerror}): check the disk") from None
    if read != tensor.nbytes:
        raise ConversionError(f"{path} became shorter while it was read: download it again")


def _without_waiting(path: str, flags: int) -> int:
    """Opens a file, and a pipe that nobody writes to without waiting for a writer."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _joined(name: str, members: tuple[str, ...], stored: dict[str, TensorSpec], path: Path) -> TensorSpec:
    parts = [stored[member] for member in members]
    if len(parts) == 1:
        return parts[0]
    if any(part != parts[0] or len(part.shape) != 2 for part in parts):
        raise ConversionError(f"{path}: the parts of {name} differ in shape or dtype; save the checkpoint again")
    rows, columns = parts[0].shape
    return TensorSpec((rows * len(parts), columns), parts[0].dtype)


def _tokenizer_within(path: Path, named: Any) -> Path | None:
    """The tokenizer inside a training checkpoint. Its metadata names a path on the training machine."""
    if not isinstance(named, str | None):
        raise ConversionError(f"{path / 'train_metadata.yaml'}: tokenizer_path is {shown(named)}; it must be a string")
    for folder in (path, path / Path(named).name if named else path):
        if folder.is_dir() and folder.resolve().is_relative_to(path.resolve()):
            found = find_tokenizer(folder, required=False)
            if found:
                return found
    return None


def _listing(path: Path) -> list[Path]:
    try:
        return list(path.iterdir())
    except OSError as error:
        raise ConversionError(f"{path} cannot be read ({error.strerror}): check its permissions") from None
