"""Converts an HRM-Text checkpoint of any form to a folder ready for the Hub.

As a program: `python convert_weights.py SOURCE --output DIR`; `--help` tells the rest. As a function: `convert()`.
"""

import argparse
import hashlib
import json
import logging
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from tqdm import tqdm

from conversion.card import model_card
from conversion.errors import ConversionError
from conversion.layout import TensorSpec, split_names
from conversion.sources import Source, open_source
from conversion.tokenizer import tokenizer_files
from conversion.writer import ShardWriter, check_output, plan_shards, shard_index, staged, tensor_bytes, write_file


logger = logging.getLogger("convert_weights")

ROOT = Path(__file__).resolve().parent
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
AUTO_CLASSES = {
    "AutoConfig": "configuration_hrm_text.HrmTextConfig",
    "AutoModel": "modeling_hrm_text.HrmTextModel",
    "AutoModelForCausalLM": "modeling_hrm_text.HrmTextForCausalLM",
    "AutoModelForSequenceClassification": "heads_hrm_text.HrmTextForSequenceClassification",
    "AutoModelForTokenClassification": "heads_hrm_text.HrmTextForTokenClassification",
}


@dataclass(frozen=True)
class Plan:
    """What a conversion will write, known before anything is."""

    source: Source
    config: dict
    specs: dict[str, TensorSpec]
    shards: dict[str, list[str]]
    files: dict[str, bytes]
    provenance: dict[str, str]

    @property
    def nbytes(self) -> int:
        return sum(spec.nbytes for spec in self.specs.values())


def make_plan(source: Source, dtype: str | None, layout: str, max_shard_bytes: int) -> Plan:
    """Decides every file of the output.

    Args:
        source: an opened checkpoint.
        dtype: a key of `DTYPES`; None keeps the weights' own. A tensor whose dtype is narrower than most, as
            `z_L_init` in a training checkpoint, is then widened, which loses nothing.
        layout: `fused` (published) or `split` (as transformers' own class holds the weights).
        max_shard_bytes: upper bound of a weight file.
    """
    sizes: dict[torch.dtype, int] = {}
    for spec in source.specs.values():
        sizes[spec.dtype] = sizes.get(spec.dtype, 0) + spec.nbytes
    target = max(sizes, key=sizes.__getitem__) if dtype is None else DTYPES[dtype]

    specs = {}
    for name, spec in source.specs.items():
        kept = torch.promote_types(spec.dtype, target) if dtype is None else target
        parts = split_names(name) if layout == "split" else (name,)
        for part in parts:
            specs[part] = TensorSpec((spec.shape[0] // len(parts), *spec.shape[1:]), kept)
    shards = plan_shards(specs, max_shard_bytes)

    modules = sorted(ROOT.glob("*_hrm_text.py"))
    config = {**source.config, "dtype": str(target).removeprefix("torch.")}
    if layout == "fused":
        present = {module.stem for module in modules}
        config["auto_map"] = {auto: name for auto, name in AUTO_CLASSES.items() if name.split(".")[0] in present}
    special = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    generation = {**special, **source.generation}
    files = {"config.json": _json(config), "generation_config.json": _json(generation)}
    if len(shards) > 1:
        files["model.safetensors.index.json"] = shard_index(shards, specs)
    if source.tokenizer is not None:
        files.update(tokenizer_files(source.tokenizer, config, ROOT))
    if layout == "fused":
        files.update({module.name: module.read_bytes() for module in modules})
    provenance = {**source.provenance, "layout": layout, "dtype": config["dtype"]}
    return Plan(source, config, specs, shards, files, provenance)


def write(plan: Plan, folder: Path, progress: bool = True) -> dict[str, str]:
    """Writes everything that a plan holds into an empty folder, one tensor in memory at a time.

    Returns:
        SHA-256 of each tensor's bytes as the source has them (in the output's dtype), by name.

    Raises:
        ConversionError: a source tensor is damaged or holds NaN or infinite values.
        OSError: the folder cannot be written.
    """
    digests, tensor_digests = {}, {}
    with tqdm(
        total=plan.nbytes, unit="B", unit_scale=True, unit_divisor=1024, desc="weights", disable=not progress
    ) as bar:
        tensors = _tensors(plan)
        for file, names in plan.shards.items():
            with ExitStack() as stack:
                writer = ShardWriter(folder / file, {name: plan.specs[name] for name in names})
                stack.callback(writer.abort)
                for name, tensor in islice(tensors, len(names)):
                    writer.add(name, tensor)
                    tensor_digests[name] = hashlib.sha256(tensor_bytes(tensor)).hexdigest()
                    bar.update(tensor.nbytes)
                digests[file] = writer.close()
    for name, content in plan.files.items():
        digests[name] = write_file(folder / name, content)
    parameters = sum(torch.Size(spec.shape).numel() for spec in plan.specs.values())
    card = model_card(plan.config, plan.provenance, parameters, digests, remote_code="auto_map" in plan.config)
    write_file(folder / "README.md", card.encode())
    return tensor_digests


def _tensors(plan: Plan) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of the output in the order of `plan.specs`, checked, rounded, and split where that is asked."""
    split = plan.provenance["layout"] == "split"
    for name in plan.source.specs:
        stored = plan.source.read(name)
        if not torch.isfinite(stored).all():
            raise ConversionError(
                f"{plan.source.path}: {name} holds NaN or infinite values: use another epoch or file"
            )
        parts = split_names(name) if split else (name,)
        tensor = stored.to(plan.specs[parts[0]].dtype)
        if not torch.isfinite(tensor).all():
            raise ConversionError(f"{plan.source.path}: {name} is too large for {tensor.dtype}: pass --dtype bfloat16")
        yield from zip(parts, tensor.chunk(len(parts)), strict=True)


def _json(value: dict) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()


def convert(
    source: str | Path,
    output: str | Path | None,
    *,
    epoch: int | None = None,
    weights: str = "ema",
    dtype: str | None = None,
    tokenizer: str | Path | None = None,
    layout: str = "fused",
    max_shard_size: str | int = "5GB",
    force: bool = False,
    dry_run: bool = False,
    verify: bool = True,
    progress: bool = True,
) -> Plan:
    """Converts a checkpoint to a complete model folder.

    Args:
        source: a training checkpoint, a Hugging Face folder in any dialect or layout, or a Hub id (`user/name`,
            `user/name@revision`).
        output: the folder to write; None only with `dry_run`.
        epoch: which epoch of a training checkpoint; None is the latest.
        weights: `ema` (the averages, which are the ones published) or `raw`, of a training checkpoint.
        dtype: `float32`, `bfloat16` or `float16`; None keeps the source's.
        tokenizer: a tokenizer folder or `tokenizer.json`, in place of the one beside the weights.
        layout: `fused`, the published one, or `split`, the one of transformers' own class.
        max_shard_size: largest weight file, in bytes or like "500MB".
        force: replace an output that an earlier conversion wrote. Until the new one is whole and verified, the old one
            stays.
        dry_run: write nothing.
        verify: reload the result in a new process, and compare its tensors and logits with the source's.
        progress: show a progress bar.

    Returns:
        What was written, or with `dry_run` would be.

    Raises:
        ConversionError: something is wrong with an argument, the source, the disk or the result. The message is one
            line that names it and the remedy; `output` is then as it was before.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ConversionError(f"--dtype {dtype!r} is unknown: choose one of {', '.join(DTYPES)}")
    if layout not in {"fused", "split"}:
        raise ConversionError(f"--format {layout!r} is unknown: choose fused or split")
    max_shard_bytes = parse_size(max_shard_size)
    folder = Path(source)
    if not dry_run:
        if output is None:
            raise ConversionError("--output is missing: name the folder to write")
        output = Path(output)
        check_output(output, folder, force)
    opened = open_source(folder, epoch, weights, Path(tokenizer) if tokenizer else None)
    for warning in opened.warnings:
        logger.warning(warning)
    plan = make_plan(opened, dtype, layout, max_shard_bytes)
    if dry_run:
        return plan
    needed = plan.nbytes + sum(len(content) for content in plan.files.values()) + 2**20
    with staged(output, needed) as (temporary, put_in_place):
        write(plan, temporary, progress)
        put_in_place()
    return plan


def parse_size(text: str | int) -> int:
    """Bytes in a size like "500MB", "5GB" (powers of 1000) or "2GiB" (of 1024), or a plain number."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", str(text).strip(), re.IGNORECASE)
    size = float(match[1]) * (1024 if match[3] else 1000) ** " KMGT".index(match[2].upper() or " ") if match else 0
    if size < 1:
        raise ConversionError(f"--max-shard-size {text!r} is no size: write it like 500MB or 5GB")
    return int(size)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit code: 0 done, 1 refused or failed, 2 wrong usage."""
    parser = argparse.ArgumentParser(
        prog="convert_weights.py",
        description=__doc__.splitlines()[0],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--epoch", type=int)
    parser.add_argument("--weights", choices=["ema", "raw"], default="ema")
    parser.add_argument("--dtype", choices=list(DTYPES))
    parser.add_argument("--tokenizer", type=Path)
    options = parser.parse_args(arguments)
    try:
        plan = convert(
            options.source,
            options.output,
            epoch=options.epoch,
            weights=options.weights,
            dtype=options.dtype,
            tokenizer=options.tokenizer,
        )
    except ConversionError as error:
        print(f"convert_weights.py: {error}", file=sys.stderr)
        return 1
    print(f"{options.output}: {len(plan.specs)} tensors, {plan.nbytes:,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
