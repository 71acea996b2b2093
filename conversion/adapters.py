"""Converts LoRA adapters between this project's fused projections and the split ones of transformers' own class.

A fused projection holds its parts as blocks of rows. Adapters of the parts become one adapter of the whole that equals
their sum exactly: the A matrices are stacked, the B matrices become blocks on a diagonal, and the ranks add up. In the
other direction each part takes the A matrix of the whole and its own rows of B, at the same rank.
"""

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .errors import ConversionError
from .layout import SPLIT_PARTS, TensorSpec
from .reading import is_there, read_json, shown
from .sources import read_header, read_place
from .writer import ShardWriter, staged, write_file


CONFIG, WEIGHTS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
_KEY = re.compile(r"(.*?[HL]_module\.layers\.(?:0|[1-9]\d{0,5})\.)([a-z_]+\.[a-z_]+)\.lora_([AB])\.weight")
_PREFIX = "base_model.model."
_PLAIN_NAME = re.compile(r"[\w.]{1,200}")
# Fields that say nothing of what the tensors mean, or that are written anew.
_HARMLESS = {
    *("auto_mapping", "base_model_name_or_path", "inference_mode", "lora_dropout", "peft_type", "peft_version"),
    *("revision", "task_type", "modules_to_save", "init_lora_weights", "bias", "r", "lora_alpha", "use_rslora"),
    *("target_modules", "rank_pattern", "alpha_pattern", "layers_to_transform", "layers_pattern", "exclude_modules"),
    *("megatron_core", "qalora_group_size", "ensure_weight_tying", "use_bdlora"),
}
# Of a fused projection, which the check multiplies out in float64. The largest of the family has 35 million.
_MOST_ELEMENTS = 2**26
_MOST_RANK_OR_ALPHA = 2**31
_INITS = (True, False, "gaussian", "orthogonal", None)


@dataclass
class _Pair:
    """The two matrices of one projection, A [rank, in] and B [out, rank], and the factor on their product."""

    a: torch.Tensor
    b: torch.Tensor
    scale: float

    @property
    def rank(self) -> int:
        return self.a.shape[0]


@dataclass(frozen=True)
class AdapterConversion:
    """What was done: the layout that was written, the adapted projections in it, and the largest rank."""

    layout: str
    projections: int
    largest_rank: int
    rounded: bool

    def lines(self) -> list[str]:
        """The report, one line per item."""
        exactly = "within rounding: the parts have different scales" if self.rounded else "exactly"
        return [
            f"adapter    {self.projections} projections, {self.layout} layout, rank up to {self.largest_rank}",
            f"verified   the products of the matrices are those of the source, {exactly}",
        ]


def is_adapter(path: Path) -> bool:
    """Whether a folder holds an adapter and no model."""
    return path.is_dir() and is_there(path, CONFIG) and not (path / "config.json").exists()


def convert_adapter(path: Path, output: Path, layout: str) -> AdapterConversion:
    """Converts the LoRA adapter in a folder to another layout.

    Args:
        path: a folder as peft writes it.
        output: the folder to write; it has been checked.
        layout: `fused`, for this project's models, or `split`, for those of transformers' own class.

    Raises:
        ConversionError: it is not a plain LoRA adapter of an HRM-Text, or is in that layout already.
    """
    config = read_json(path, CONFIG)
    _check_config(config, path / CONFIG)
    if not is_there(path, WEIGHTS):
        reason = (
            "holds pickled weights only: save it with safe_serialization=True" if (path / PICKLED).exists() else ""
        )
        raise ConversionError(f"{path} {reason or f'has no {WEIGHTS}: download it again'}")
    pairs, others = _read(path, config)
    _check_matrices(pairs, path / WEIGHTS)
    told = {name for name in pairs if SPLIT_PARTS.get(_short(name)) != (_short(name),)}  # down_proj is named alike
    fused = {name for name in told if _short(name) in SPLIT_PARTS}
    if fused and fused != told:
        raise ConversionError(f"{path / WEIGHTS} holds both layouts ({min(fused)}): train the adapter again")
    if not told:
        raise ConversionError(f"{path} adapts down_proj alone, which both layouts call alike: it loads as it is")
    if bool(fused) == (layout == "fused"):
        raise ConversionError(f"{path} is in the {layout} layout already: nothing to convert")
    made, rounded = _fuse(pairs, path) if layout == "fused" else (_split(pairs), False)
    written = _settings(config, pairs, made)
    tensors = {
        f"{name}.lora_{side}.weight": getattr(pair, side.lower()) for name, pair in made.items() for side in "AB"
    }
    tensors |= others
    size = sum(tensor.nbytes for tensor in tensors.values())
    with staged(output, size + 2**20) as (temporary, put_in_place):
        writer = ShardWriter(temporary / WEIGHTS, {n: TensorSpec(tuple(t.shape), t.dtype) for n, t in tensors.items()})
        try:
            for name, tensor in tensors.items():
                writer.add(name, tensor)
            writer.close()
        finally:
            writer.abort()
        write_file(temporary / CONFIG, (json.dumps(written, indent=2, sort_keys=True) + "\n").encode())
        _verify(temporary, pairs, layout)
        put_in_place()
    return AdapterConversion(layout, len(made), max(pair.rank for pair in made.values()), rounded)


def _check_config(config: dict[str, Any], where: Path) -> None:
    if config.get("peft_type") != "LORA":
        raise ConversionError(
            f"{where}: peft_type is {shown(config.get('peft_type'))}, and only LORA can be converted"
        )
    unknown = sorted(key for key, value in config.items() if key not in _HARMLESS and value)
    if unknown:
        raise ConversionError(
            f"{where}: {shown(unknown[0])} is set, which cannot be converted; merge the adapter instead"
        )
    if config.get("bias", "none") != "none":
        raise ConversionError(f"{where}: bias is {shown(config['bias'])}, and HRM-Text has no biases")
    if not any(config.get("init_lora_weights") is init or config.get("init_lora_weights") == init for init in _INITS):
        raise ConversionError(
            f"{where}: init_lora_weights is {shown(config['init_lora_weights'])}, which changes the model's weights "
            "too: merge the adapter instead"
        )
    for field in ("r", "lora_alpha"):
        value = config.get(field)
        if type(value) not in (int, float) or not 0 < value < _MOST_RANK_OR_ALPHA:
            raise ConversionError(f"{where}: {field} is {shown(value)}; it must be a number above 0, and below 2**31")
    for field in ("rank_pattern", "alpha_pattern"):
        table = config.get(field) or {}
        if not isinstance(table, dict):
            raise ConversionError(f"{where}: {field} is not a table")
        for key, value in table.items():
            # peft reads the keys as patterns; what is more than a name is not guessed at.
            if (
                not _PLAIN_NAME.fullmatch(key)
                or type(value) not in (int, float)
                or not 0 < value < _MOST_RANK_OR_ALPHA
            ):
                raise ConversionError(f"{where}: {field} has {shown(key)}: {shown(value)}; give names and numbers")


def _read(path: Path, config: dict[str, Any]) -> tuple[dict[str, _Pair], dict[str, torch.Tensor]]:
    """The pairs by the name of their projection, and the tensors that are the same in both layouts."""
    file = path / WEIGHTS
    sides: dict[str, dict[str, torch.Tensor]] = {}
    others: dict[str, torch.Tensor] = {}
    for key, (spec, start) in read_header(file).items():
        if not spec.dtype.is_floating_point or spec.dtype.itemsize < 2:
            raise ConversionError(f"{file}: {key} is {spec.dtype}; save the adapter in a floating type")
        match = _KEY.fullmatch(key)
        if match and (match[2] in SPLIT_PARTS or any(match[2] in parts for parts in SPLIT_PARTS.values())):
            if len(spec.shape) != 2:
                raise ConversionError(f"{file}: {key} has the shape {spec.shape}; is it an adapter of an HRM-Text?")
            sides.setdefault(f"{match[1]}{match[2]}", {})[match[3]] = read_place(file, spec, start)
        elif "_module.layers." not in key and ".lora_" not in key:  # modules_to_save
            others[key] = read_place(file, spec, start)
        else:
            raise ConversionError(f"{file} holds {shown(key)}, which is not a LoRA matrix of an HRM-Text's projection")
    pairs = {}
    for name, found in sides.items():
        if found.keys() != {"A", "B"} or found["A"].shape[0] != found["B"].shape[1] or found["A"].numel() == 0:
            raise ConversionError(f"{file}: the two matrices of {name} do not fit; save the adapter again")
        rank, alpha = (
            _value(config, name, *fields) for fields in (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern"))
        )
        if rank != found["A"].shape[0]:
            raise ConversionError(
                f"{path / CONFIG} gives {name} the rank {shown(rank)}, and its matrices have another"
            )
        scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        pairs[name] = _Pair(found["A"], found["B"], scale)
    if not pairs:
        raise ConversionError(f"{file} has no LoRA matrix of an HRM-Text's projection")
    return pairs, others


def _check_matrices(pairs: dict[str, _Pair], file: Path) -> None:
    """Refuses matrices that make a larger projection than any HRM-Text has, or hold numbers without a value."""
    for name, pair in pairs.items():
        rows, columns = pair.b.shape[0], pair.a.shape[1]
        parts = next((parts for parts in SPLIT_PARTS.values() if _short(name) in parts), (name,))
        if rows * columns * len(parts) > _MOST_ELEMENTS:
            raise ConversionError(
                f"{file}: {name} would have {rows:,} rows and {columns:,} columns, more than any projection of an "
                "HRM-Text: is it an adapter of one?"
            )
        if not all(matrix.isfinite().all() for matrix in (pair.a, pair.b)):
            raise ConversionError(f"{file}: {name} holds NaN or infinite values: use another save of the adapter")


def _value(config: dict[str, Any], name: str, field: str, pattern: str) -> float:
    """Rank or alpha of a projection, by peft's rule: the first key that is its name or the end of it."""
    name = name.removeprefix(_PREFIX)
    matches = (value for key, value in (config.get(pattern) or {}).items() if f".{name}".endswith(f".{key}"))
    return next(matches, config[field])


def _short(name: str) -> str:
    return ".".join(name.rsplit(".", 2)[-2:])


def _fuse(pairs: dict[str, _Pair], path: Path) -> tuple[dict[str, _Pair], bool]:
    fused_of = {part: (fused, index) for fused, parts in SPLIT_PARTS.items() for index, part in enumerate(parts)}
    groups: dict[str, dict[int, _Pair]] = {}
    for name, pair in pairs.items():
        fused, index = fused_of[_short(name)]
        groups.setdefault(name.removesuffix(_short(name)) + fused, {})[index] = pair
    made, rounded = {}, False
    for name, parts in groups.items():
        first = next(iter(parts.values()))
        if any(p.a.shape[1] != first.a.shape[1] or p.b.shape[0] != first.b.shape[0] for p in parts.values()):
            raise ConversionError(f"{path / WEIGHTS}: the parts of {name} differ in size; save the adapter again")
        rank, rows = sum(pair.rank for pair in parts.values()), first.b.shape[0]
        b = torch.zeros(rows * len(SPLIT_PARTS[_short(name)]), rank, dtype=first.b.dtype)
        column = 0
        for index, pair in sorted(parts.items()):
            block = pair.b
            if pair.scale != first.scale:
                block = (pair.b.double() * (pair.scale / first.scale)).to(pair.b.dtype)
                rounded = True
            b[index * rows : (index + 1) * rows, column : column + pair.rank] = block
            column += pair.rank
        made[name] = _Pair(torch.cat([pair.a for _, pair in sorted(parts.items())]), b, first.scale)
    return made, rounded


def _split(pairs: dict[str, _Pair]) -> dict[str, _Pair]:
    made = {}
    for name, pair in pairs.items():
        parts = SPLIT_PARTS[_short(name)]
        for part, rows in zip(parts, pair.b.chunk(len(parts)), strict=True):
            made[name.removesuffix(_short(name)) + part] = _Pair(pair.a, rows.contiguous(), pair.scale)
    return made


def _settings(config: dict[str, Any], pairs: dict[str, _Pair], made: dict[str, _Pair]) -> dict[str, Any]:
    """The adapter's config for the other layout. Ranks and scales are spelled for each kind of projection."""
    targets = config.get("target_modules")
    everywhere = isinstance(targets, list) and all("." not in str(target) for target in targets)
    everywhere &= not (config.get("layers_to_transform") or config.get("exclude_modules"))
    values: dict[str, set[tuple[int, float]]] = {}
    for name, pair in made.items():
        values.setdefault(_kind(name), set()).add((pair.rank, pair.scale * pair.rank))
    everywhere &= all(len(found) == 1 for found in values.values())
    everywhere &= len({tuple(sorted(_layers_of(made, kind))) for kind in values}) == 1
    named = {
        (_kind(name) if everywhere else name.removeprefix(_PREFIX)): (pair.rank, pair.scale * pair.rank)
        for name, pair in made.items()
    }
    rank, alpha = next(iter(named.values()))
    return {
        **config,
        "target_modules": sorted(named),
        "r": rank,
        "lora_alpha": _whole(alpha),
        "rank_pattern": {name: value for name, (value, _) in named.items() if value != rank},
        "alpha_pattern": {name: _whole(value) for name, (_, value) in named.items() if value != alpha},
        "use_rslora": False,
        "layers_to_transform": None,
        "layers_pattern": None,
        "exclude_modules": None,
    }


def _kind(name: str) -> str:
    """What a projection is called in every layer; attention and the MLP of the library's class both have a gate."""
    return _short(name) if name.endswith(".gate_proj") else name.rsplit(".", 1)[1]


def _layers_of(made: dict[str, _Pair], kind: str) -> Iterator[str]:
    return (name.removesuffix(_short(name)) for name in made if name.endswith(f".{kind}"))


def _whole(value: float) -> int | float:
    return int(value) if value == int(value) else value


def _verify(folder: Path, pairs: dict[str, _Pair], layout: str) -> None:
    """Reads the result and compares what it adds to each weight with what the source adds, in float64."""
    found, _ = _read(folder, read_json(folder, CONFIG))
    fused, parts = (found, pairs) if layout == "fused" else (pairs, found)
    for name, whole in fused.items():
        stem, kinds = name.removesuffix(_short(name)), SPLIT_PARTS[_short(name)]
        for kind, rows in zip(kinds, _product(whole).chunk(len(kinds)), strict=True):
            part = parts.get(stem + kind)
            wanted = torch.zeros_like(rows) if part is None else _product(part)
            # Two sums of the same products, and where the scales differ a rounding of B.
            allowed = 1e-12 if part is None or part.scale == whole.scale else torch.finfo(whole.b.dtype).eps
            if not (rows - wanted).abs().max() <= allowed * max(1.0, float(wanted.abs().max())):
                raise ConversionError(f"{folder / WEIGHTS}: {stem + kind} is not what the source adds: report this")


def _product(pair: _Pair) -> torch.Tensor:
    return pair.scale * (pair.b.double() @ pair.a.double())
