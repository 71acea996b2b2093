"""Good checkpoints with one thing changed, thousands of times: a right result, or one line that names the file."""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import shutil
import signal
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file

from conversion.adapters import AdapterConversion
from conversion.errors import ConversionError
from conversion.layout import SPLIT_PARTS
from conversion.sources import open_source
from conversion.verify import verify
from conversion.writer import same_bits
from convert_weights import convert

from .checkpoints import REFERENCE, published_tensors, save_published, split_tensors
from .test_convert_output import small_tokenizer


ODD_VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 7, 63, 64, 65, 1000, 2**31, 2**63, 10**4000, 0.5, -0.0, 1e-300, 1e300),
    *(float("inf"), float("nan"), "", "x", "\0", "../x", "/etc/hostname", "a" * 5000, "<|im_end|>", "hrm_text"),
    *([], {}, [[]], [0], [1, 2, 3], ["x"], {"x": 1}, {"": {}}, [None] * 100, {"content": "<|im_end|>"}, [["x"] * 50]),
]  # fmt: skip
SECONDS = 10
GIGABYTE = 2**30


def bomb(levels: int) -> str:
    """YAML that is small as written and large with its aliases written out."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    return "\n".join(lines + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, levels)]) + "\n"


def sources(folder: Path) -> list[Path]:
    """A training checkpoint, and model folders with a tokenizer: in one file, and split in shards."""
    shutil.copytree(REFERENCE / "checkpoint", folder / "training")
    small_tokenizer(folder / "tokenizer", bos_token="<|im_start|>", extra_special_tokens=["<|im_end|>"])
    for name, tensors, shards in (("one", published_tensors(), 1), ("split", split_tensors(published_tensors()), 2)):
        save_published(folder / name, tensors, shards=shards)
        shutil.copytree(folder / "tokenizer", folder / name, dirs_exist_ok=True)
        (folder / name / "generation_config.json").write_text('{"max_new_tokens": 9, "do_sample": false}')
    return [folder / name for name in ("training", "one", "split")]


def adapters(folder: Path) -> list[Path]:
    """A LoRA adapter of each layout."""
    for name, projections in (("split", ("self_attn.q_proj", "mlp.up_proj")), ("fused", ("attn.gqkv_proj",))):
        generator, tensors = torch.Generator().manual_seed(0), {}
        for projection in projections:
            rows = 64 if projection in SPLIT_PARTS else 16
            for side, shape in (("A", (2, 16)), ("B", (rows, 2))):
                key = f"base_model.model.model.H_module.layers.0.{projection}.lora_{side}.weight"
                tensors[key] = torch.randn(shape, generator=generator)
        (folder / name).mkdir(parents=True)
        save_file(tensors, folder / name / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "rank_pattern": {}, "alpha_pattern": {"q_proj": 5}}
        config |= {"target_modules": [name.split(".")[1] for name in projections], "bias": "none"}
        (folder / name / "adapter_config.json").write_text(json.dumps(config))
    return [folder / name for name in ("split", "fused")]


def places(node: Any, path: tuple = ()) -> list[tuple]:
    """The path of every value in lists and tables."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return [path, *(place for key, value in items for place in places(value, (*path, key)))]


def mutate_nodes(value: Any, draw: random.Random) -> Any:
    """The data with one value changed, taken away, moved or wrapped."""
    place = draw.choice(places(value))
    if not place:
        return draw.choice(ODD_VALUES)
    parent = value
    for key in place[:-1]:
        parent = parent[key]
    key, kind = place[-1], draw.randrange(6)
    if kind == 0:
        del parent[key]
    elif kind == 1:
        parent[key] = [parent[key]]
    elif kind == 2:
        for _ in range(draw.choice([2, 70, 400])):
            parent[key] = {"x": parent[key]}
    elif kind == 3 and isinstance(parent, dict):
        parent[draw.choice(["x", "", "a" * 300, "auto_map", "H_cycles", "\0"])] = parent.pop(key)
    else:
        parent[key] = draw.choice(ODD_VALUES)
    return value


def mutate_bytes(content: bytes, draw: random.Random) -> bytes:
    """The content with bytes changed, taken away, put in or repeated."""
    data, at = bytearray(content), draw.randrange(len(content) + 1)
    # Headers and settings are at the beginning.
    at = draw.choice([at, min(at, draw.randrange(200))])
    kind, size = draw.randrange(6), draw.choice([1, 2, 8, 100, 5000])
    if kind == 0:
        return bytes(data[:at])
    if kind == 1:
        del data[at : at + size]
    elif kind == 2:
        data[at:at] = draw.randbytes(size)
    elif kind == 3:
        data[at : at + size] = draw.randbytes(len(data[at : at + size]))
    elif kind == 4:
        data[at:at] = data[at : at + size]
    elif data:
        place = min(at, len(data) - 1)
        data[place] ^= 1 << draw.randrange(8)
    return bytes(data)


def change_kind(path: Path, draw: random.Random, outside: Path) -> None:
    """Another kind of file in the place of one."""
    content = path.read_bytes()
    path.unlink()
    kind = draw.randrange(8)
    if kind == 0:
        path.mkdir()
    elif kind == 1:
        os.mkfifo(path)
    elif kind in (2, 3):
        path.symlink_to("/dev/zero" if kind == 2 else outside)
    elif kind == 4:
        path.symlink_to(path)
    elif kind == 5:
        with open(path, "wb") as file:
            file.write(content)
            file.truncate(50 * GIGABYTE)
    elif kind == 6:
        path.write_bytes(b"\0" * len(content))


def mutate(source: Path, draw: random.Random, outside: Path) -> str:
    """Changes one file of a checkpoint, and says how."""
    path = draw.choice(sorted(item for item in source.rglob("*") if item.is_file()))
    kind = draw.randrange(10)
    if kind == 0:
        change_kind(path, draw, outside)
    elif kind < 7 and path.suffix in (".json", ".yaml"):
        content = path.read_text()
        value = yaml.safe_load(content) if path.suffix == ".yaml" else json.loads(content)
        value = mutate_nodes(value, draw)
        if path.suffix == ".json":
            with contextlib.suppress(
                ValueError, RecursionError
            ):  # an integer of thousands of digits has no decimal form
                content = json.dumps(value)
        elif draw.random() < 0.2:
            lines = content.splitlines()
            at = draw.randrange(len(lines))
            lines[at] = lines[at].split(":")[0] + ": *a" + str(draw.randrange(5))
            content = bomb(draw.choice([5, 9, 30])) + "\n".join(lines)
        else:
            with contextlib.suppress(ValueError, RecursionError):
                content = yaml.safe_dump(value)
        path.write_text(content)
    else:
        path.write_bytes(mutate_bytes(path.read_bytes(), draw))
    return f"{path.name}, kind {kind}"


def check(source: Path, output: Path, what: str, fully: bool) -> bool:
    """Converts a changed checkpoint: whether it could be, after a look at the result."""
    before = sorted(item.relative_to(source.parent) for item in source.parent.rglob("*"))
    started = time.process_time()
    try:
        # An adapter of the published layout can only be split.
        layout = "split" if source.name == "fused" else "fused"
        done = convert(source, output, verification=False, progress=False, layout=layout)
    except ConversionError as error:
        assert "\n" not in str(error) and len(str(error)) < 3000, what
        assert str(source) in str(error), (what, error)
        assert sorted(item.relative_to(source.parent) for item in source.parent.rglob("*")) == before, what
        return False
    finally:
        assert time.process_time() - started < SECONDS, what
    if isinstance(done, AdapterConversion):  # it has multiplied the matrices out
        shutil.rmtree(output)
        return True
    written, read = open_source(output), done.plan.source
    assert written.specs.keys() == read.specs.keys()
    assert all(same_bits(written.read(name), read.read(name).to(written.specs[name].dtype)) for name in read.specs), (
        what
    )
    if fully:
        opening = {"path": str(source), "epoch": None, "weights": "ema", "tokenizer": None}
        try:
            found = verify(output, {"source": opening, "config": done.plan.config, "remote_code": True})
        except ConversionError as error:
            assert "\n" not in str(error) and str(source) in str(error), (what, error)
        else:
            # Changed bytes may be a NaN, and then the source is no better.
            assert not found.differences or found.damage, (what, found.differences)
    shutil.rmtree(output)
    return True


def run(
    folder: Path, count: int, seed: int, verified: int, make: Callable[[Path], list[Path]] = sources
) -> tuple[int, int]:
    """So many changes of each source in turn; how many were converted, and how many refused."""

    def too_long(*_: Any) -> None:
        raise TimeoutError("the converter waits or runs without an end")

    originals = make(folder / "original")
    outside = folder / "outside.json"
    outside.write_text("{}")
    draw = random.Random(seed)
    signal.signal(signal.SIGALRM, too_long)
    counts, full = [0, 0], 0
    for number in range(count):
        original = originals[number % len(originals)]
        work = folder / "work"
        work.mkdir()
        source = work / original.name
        shutil.copytree(original, source)
        what = f"{original.name} {number}: {mutate(source, draw, outside)}"
        fully = full < verified and number >= full * count // max(verified, 1)
        signal.alarm(900)  # of waiting; a busy machine may stand still for minutes
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            converted = check(source, work / "output", what, fully)
        signal.alarm(0)
        full += converted and fully
        counts[not converted] += 1
        shutil.rmtree(work)
        if number % 250 == 249:
            print(f"{number + 1} of {count}", flush=True)
    return counts[0], counts[1]


@pytest.mark.parametrize(("count", "verified"), [(120, 0), pytest.param(5000, 12, marks=pytest.mark.slow)])
def test_no_change_of_a_good_checkpoint_hurts(tmp_path, count, verified):
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    converted, refused = run(tmp_path, count, seed=count, verified=verified)
    print(f"{converted} converted, {refused} refused")
    assert converted > count // 20 and refused > count // 4
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) * 1024 < GIGABYTE


@pytest.mark.parametrize("count", [80, pytest.param(1500, marks=pytest.mark.slow)])
def test_no_change_of_a_good_adapter_hurts(tmp_path, count):
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    converted, refused = run(tmp_path, count, seed=count, verified=0, make=adapters)
    assert converted > count // 20 and refused > count // 4
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) * 1024 < GIGABYTE
