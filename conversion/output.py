"""Decides what a converted folder contains, and then writes it one tensor at a time."""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from math import prod
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from .card import model_card
from .errors import ConversionError
from .layout import TensorSpec, split_names
from .prompts import find_prompts
from .quantize import Scheme, round_to_nearest, store
from .sources import Source
from .tokenizer import MODULE as TOKENIZER_MODULE
from .writer import ShardWriter, plan_shards, shard_index, write_file


ROOT = Path(__file__).resolve().parent.parent
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LAYOUTS = ("fused", "split")
# By the published name of a weight, what returns its numbers and scales.
Solved = Mapping[str, Callable[[], tuple[torch.Tensor, torch.Tensor]]]
AUTO_CLASSES = {
    "AutoConfig": "configuration_hrm_text.HrmTextConfig",
    "AutoModel": "modeling_hrm_text.HrmTextModel",
    "AutoModelForCausalLM": "modeling_hrm_text.HrmTextForCausalLM",
    # `transformers serve` asks for this one first, and goes on with the library's own class where it is absent. Any
    # causal model decides, by the logits of the labels.
    "AutoModelForDecision": "modeling_hrm_text.HrmTextForCausalLM",
    "AutoModelForSequenceClassification": "modeling_hrm_text.HrmTextForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_hrm_text.HrmTextForTokenClassification",
}


@dataclass(frozen=True)
class Plan:
    """What a conversion will write.

    Attributes:
        source: the opened checkpoint.
        config: `config.json`.
        dtype: the model's dtype.
        layout: `fused` or `split`.
        specs: every tensor of the output, in file order.
        shards: the tensors in each weight file.
        files: content of every other file but the model card, which needs their digests.
        prompts: how prompts are read, in one line.
        warnings: what the user should know.
        scheme: how weights are quantized, None where they are not.
    """

    source: Source
    config: dict[str, Any]
    dtype: torch.dtype
    layout: str
    specs: dict[str, TensorSpec]
    shards: dict[str, list[str]]
    files: dict[str, bytes]
    prompts: str
    warnings: list[str]
    scheme: Scheme | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all weights."""
        return sum(spec.nbytes for spec in self.specs.values())

    @property
    def elements(self) -> int:
        """Elements of all weights, however they are stored."""
        return sum(prod(spec.shape) for spec in self.source.specs.values())

    def table(self) -> list[str]:
        """The files and tensors as lines of a table."""
        lines = [f"{'file':<40} {'bytes':>15}"]
        for file, names in self.shards.items():
            lines.append(f"{file:<40} {sum(self.specs[name].nbytes for name in names):>15,}")
        lines += [f"{name:<40} {len(content):>15,}" for name, content in sorted(self.files.items())]
        lines += [f"{'README.md':<40} {'model card':>15}", "", f"{'tensor':<56} {'shape':>16} {'dtype':>9}  file"]
        for file, names in self.shards.items():
            for name in names:
                spec = self.specs[name]
                shape = " x ".join(str(size) for size in spec.shape)
                lines.append(f"{name:<56} {shape:>16} {str(spec.dtype).removeprefix('torch.'):>9}  {file}")
        return [
            *lines,
            "",
            f"prompts: {self.prompts}",
            f"{len(self.specs)} tensors, {self.elements:,} parameters, {self.nbytes:,} bytes",
        ]


def make_plan(
    source: Source, dtype: str | None, layout: str, max_shard_bytes: int, scheme: Scheme | None = None
) -> Plan:
    """Decides every file of the output.

    Args:
        source: an opened checkpoint.
        dtype: a key of `DTYPES`; None keeps the weights' own. A tensor that is then narrower than most of them, as
            `z_L_init` in a training checkpoint, is widened to their dtype, which loses nothing.
        layout: `fused` (published) or `split` (as transformers' own class holds the weights).
        max_shard_bytes: upper bound of a weight file.
        scheme: how to quantize, None for not at all.
    """
    sizes: dict[torch.dtype, int] = {}
    for spec in source.specs.values():
        sizes[spec.dtype] = sizes.get(spec.dtype, 0) + prod(spec.shape)
    target = max(sizes, key=sizes.__getitem__) if dtype is None else DTYPES[dtype]
    specs = {}
    for name, spec in source.specs.items():
        kept = torch.promote_types(spec.dtype, target) if dtype is None else target
        parts = split_names(name) if layout == "split" else (name,)
        for part in parts:
            specs[part] = TensorSpec((spec.shape[0] // len(parts), *spec.shape[1:]), kept)
    specs = specs if scheme is None else scheme.specs(specs, target)
    shards = plan_shards(specs, max_shard_bytes)

    prompts = find_prompts(source, ROOT)
    modules = _modules(layout, prompts.own)
    config = {**source.config, **prompts.fields, "dtype": str(target).removeprefix("torch.")}
    if config["prefix_start_token_ids"] is None:
        del config["prefix_start_token_ids"]
    if layout == "fused":
        present = {module.stem for module in modules}
        config["auto_map"] = {auto: name for auto, name in AUTO_CLASSES.items() if name.split(".")[0] in present}
    if scheme is not None:
        config["quantization_config"] = scheme.config()
    special = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    generation = {key: value for key, value in source.generation.items() if key != "transformers_version"}
    if not generation.keys() - special.keys():
        # Greedy as the training code answers, and not the 20 tokens that are the library's default.
        generation |= {"do_sample": False, "max_new_tokens": config["max_position_embeddings"] // 4}
    files = {"config.json": _json(config), "generation_config.json": _json({**special, **generation})}
    if len(shards) > 1:
        files["model.safetensors.index.json"] = shard_index(shards, specs)
    files.update(prompts.files)
    files.update({module.name: module.read_bytes() for module in modules})
    warnings = [*source.warnings, *prompts.warnings]
    return Plan(source, config, target, layout, specs, shards, files, prompts.line, warnings, scheme)


def _modules(layout: str, with_tokenizer: bool) -> list[Path]:
    """This project's modules that a folder needs: all, or in the split layout those of the tokenizer."""
    if layout == "fused":
        return sorted(ROOT.glob("*_hrm_text.py"))
    needed = [ROOT / TOKENIZER_MODULE] if with_tokenizer else []
    for module in needed:  # grows as it goes
        names = re.findall(r"^\s*from \.(\w+) import", module.read_text(encoding="utf-8"), re.MULTILINE)
        needed += [ROOT / f"{name}.py" for name in names if ROOT / f"{name}.py" not in needed]
    return sorted(needed)


def write(plan: Plan, folder: Path, progress: bool = True, solved: Solved | None = None) -> dict[str, str]:
    """Writes all files of a plan but the card into an empty folder, one tensor at a time.

    Args:
        plan: what to write.
        folder: where to.
        progress: show a progress bar.
        solved: numbers and scales of the quantized weights that a calibration chose; others are rounded to nearest.

    Returns:
        SHA-256 by file name.

    Raises:
        ConversionError: a source tensor is damaged, or holds NaN or infinite values.
        OSError: the folder cannot be written.
    """
    files = {}
    values = _values(plan, {} if solved is None else solved)
    with tqdm(
        total=plan.nbytes, unit="B", unit_scale=True, unit_divisor=1024, desc="weights", disable=not progress
    ) as bar:
        for file, names in plan.shards.items():
            with ExitStack() as stack:
                writer = ShardWriter(folder / file, {name: plan.specs[name] for name in names})
                stack.callback(writer.abort)
                for name, value in islice(values, len(names)):
                    writer.add(name, value)
                    bar.update(value.nbytes)
                files[file] = writer.close()
    for name, content in plan.files.items():
        files[name] = write_file(folder / name, content)
    return files


def write_card(plan: Plan, folder: Path, files: dict[str, str], quantization: list[str]) -> None:
    """Writes README.md.

    Args:
        plan: what was written.
        folder: where to.
        files: SHA-256 by file name.
        quantization: what was done to the weights and how well that went, a line an item.
    """
    provenance = {
        **plan.source.provenance,
        "layout": plan.layout,
        "dtype": plan.config["dtype"],
    }
    remote_code = "auto_map" in plan.config
    card = model_card(plan.config, plan.prompts, provenance, plan.elements, files, remote_code, quantization)
    write_file(folder / "README.md", card.encode())


def checked_values(source: Source, name: str, dtype: torch.dtype) -> torch.Tensor:
    """A source's tensor in a dtype.

    Raises:
        ConversionError: it is damaged, or holds NaN, infinite values, or some that are too large for the dtype.
    """
    stored = source.read(name)
    # Both are NaN where any value is; rounding keeps the order, so that no other value leaves the range first.
    extremes = torch.stack(stored.aminmax())
    if not extremes.isfinite().all():
        raise ConversionError(f"{source.path}: {name} holds NaN or infinite values: use another epoch or file")
    if not extremes.to(dtype).isfinite().all():
        raise ConversionError(f"{source.path}: {name} has values too large for {dtype}: pass --dtype bfloat16")
    return stored.to(dtype)


def _values(plan: Plan, solved: Solved) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of the output in the order of `plan.specs`: checked, rounded, split and quantized as asked."""
    for name in plan.source.specs:
        parts = split_names(name) if plan.layout == "split" else (name,)
        precision = None if plan.scheme is None else plan.scheme.of(name)
        if precision is None:
            value = checked_values(plan.source, name, plan.specs[parts[0]].dtype)
            yield from zip(parts, value.chunk(len(parts)), strict=True)
            continue
        value = checked_values(plan.source, name, plan.specs[f"{parts[0]}_scale"].dtype)
        numbers, scales = solved[name]() if name in solved else round_to_nearest(value, precision)
        for part, *pair in zip(parts, numbers.chunk(len(parts)), scales.chunk(len(parts)), strict=True):
            yield from store(part, *pair, precision).items()


def _json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()
