"""Broken sources: one line that names the file and the remedy, nothing written; and kills at any moment."""

import ctypes
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import MetadataIndex

from conversion.errors import ConversionError
from conversion.sources import open_source
from convert_weights import convert

from .checkpoints import REFERENCE, assert_refused, published_config, published_tensors, save_published, split_tensors
from .test_convert_output import small_tokenizer, snapshot


ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def training(tmp_path):
    shutil.copytree(REFERENCE / "checkpoint", tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


@pytest.fixture
def epoch(training):
    return training / "fsdp2_epoch_1"


def test_truncated_rank(training, epoch):
    shard = epoch / "__0_0.distcp"
    shard.write_bytes(shard.read_bytes()[:100_000])
    assert_refused(training, r"__0_0\.distcp is truncated .*copy it again")


def test_missing_rank(training, epoch):
    (epoch / "__0_0.distcp").unlink()
    assert_refused(training, r"__0_0\.distcp is missing: copy the files of every rank")


def test_an_index_that_lacks_a_rank(training, epoch):
    metadata = dcp.FileSystemReader(epoch).read_metadata()
    entry = metadata.state_dict_metadata["optim.state.lm_head.weight.param_ema"]
    entry.chunks[0].sizes = torch.Size([128, 32])
    (epoch / ".metadata").write_bytes(pickle.dumps(metadata))
    assert_refused(training, "the pieces of optim.state.lm_head.weight.param_ema do not cover it: a rank is missing")


def test_pieces_that_overlap(training, epoch):
    metadata = dcp.FileSystemReader(epoch).read_metadata()
    entry = metadata.state_dict_metadata["optim.state.lm_head.weight.param_ema"]
    entry.chunks.append(entry.chunks[0])
    (epoch / ".metadata").write_bytes(pickle.dumps(metadata))
    assert_refused(training, "overlap")


@pytest.mark.parametrize("content", [b"", b"not a pickle", b"\x80\x04N."])
def test_damaged_index(training, epoch, content):
    (epoch / ".metadata").write_bytes(content)
    assert_refused(training, r"\.metadata .*copy the checkpoint again")


def test_damaged_bytes_in_a_tensor(training, epoch):
    metadata = dcp.FileSystemReader(epoch).read_metadata()
    info = metadata.storage_data[MetadataIndex("optim.state.lm_head.weight.param_ema", [0, 0])]
    content = bytearray((epoch / "__0_0.distcp").read_bytes())
    content[info.offset : info.offset + info.length] = b"\0" * info.length
    (epoch / "__0_0.distcp").write_bytes(content)
    assert_refused(training, r"__0_0\.distcp is damaged at optim\.state\.lm_head\.weight\.param_ema")


def drop(name):
    return lambda metadata: metadata.state_dict_metadata.pop(name)


def copy(old, new):
    def change(metadata):
        metadata.state_dict_metadata[new] = metadata.state_dict_metadata[old]
        metadata.storage_data[MetadataIndex(new, [0, 0])] = metadata.storage_data[MetadataIndex(old, [0, 0])]

    return change


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (drop("model.model.zL_init"), "lacks the tensor model.z_L_init"),
        (
            drop("model.model.H_level.core.layers.0.mlp.down_proj.weight"),
            "lacks the tensor model.H_module.layers.0.mlp",
        ),
        (drop("optim.state.lm_head.weight.param_ema"), "no average of lm_head.weight: pass --weights raw"),
        (copy("model.lm_head.weight", "model.lm_head.bias"), "lm_head.bias, which HRM-Text does not have"),
    ],
)
def test_missing_and_extra_tensors_of_a_training_checkpoint(training, epoch, change, match):
    metadata = dcp.FileSystemReader(epoch).read_metadata()
    change(metadata)
    (epoch / ".metadata").write_bytes(pickle.dumps(metadata))
    assert_refused(training, match)


@pytest.mark.parametrize("name", ["all_config.yaml", "train_metadata.yaml"])
@pytest.mark.parametrize("content", [None, "", "[1, 2]", "a: b: c", b"\xff\xfe\xff"])
def test_broken_settings(training, name, content):
    (training / name).unlink()
    if content is not None:
        (training / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert_refused(training, name)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_size: 32", "hidden_size: 48"),
        ("num_heads: 2", "num_heads: 3"),
        ("expansion: 4", "expansion: 24"),
        ("H_cycles: 2", "H_cycles: two"),
        ("bp_max_steps: 5", "bp_max_steps: 1"),
        ("norm_type: pre", "norm_type: post"),
        ("pos_emb_type: rope", "pos_emb_type: none"),
        ("H_override: {}", "H_override: {expansion: 2}"),
        ("init_type: lecun_normal", "init_type: other"),
        ("rope_theta: 10000.0", "rope_theta: .nan"),
        ("  name: baselines.hrm_nocarry_bp_warmup@HierarchicalReasoningModel", "  name: baselines.ut_nocarry@UT"),
    ],
)
def test_settings_that_do_not_fit(training, field, value):
    text = (training / "all_config.yaml").read_text()
    assert field in text
    (training / "all_config.yaml").write_text(text.replace(field, value))
    assert_refused(training, r"all_config\.yaml")


def test_epochs(training, epoch):
    assert_refused(training, r"no epoch 7: --epoch may be one of \[1\]", epoch=7)
    assert_refused(epoch, "is one epoch: pass the folder above it")
    assert_refused(training, "--weights 'swa' is unknown", weights="swa")
    shutil.rmtree(epoch)
    assert_refused(training, "no fsdp2_epoch_N folder")


def test_unknown_special_tokens_need_the_tokenizer(training):
    text = (training / "train_metadata.yaml").read_text().replace("<|box_end|>", "<|my_end|>")
    (training / "train_metadata.yaml").write_text(text)
    assert_refused(training, "pass --tokenizer")


@pytest.mark.parametrize("position", [0, 4, 100, 2000, -1])
def test_truncated_safetensors(tmp_path, position):
    source = save_published(tmp_path / "source")
    file = source / "model.safetensors"
    file.write_bytes(file.read_bytes()[:position])
    assert_refused(source, r"model\.safetensors is damaged .*download it again")


def changed(**changes):
    tensors = published_tensors()
    for name, tensor in changes.items():
        tensors.pop(name, None)
        if tensor is not None:
            tensors[name] = tensor
    return tensors


DOWN = "model.L_module.layers.1.mlp.down_proj.weight"


@pytest.mark.parametrize(
    ("tensors", "match"),
    [
        (changed(**{"lm_head.weight": None}), "lacks the tensor lm_head.weight"),
        (changed(**{"model.z_L_init": None}), "lacks the tensor model.z_L_init"),
        (changed(**{DOWN: None}), f"lacks the tensor {DOWN}"),
        (changed(**{DOWN: torch.ones(32, 255)}), r"has the shape \(32, 255\), and \(32, 256\) fits the others"),
        (changed(**{DOWN: torch.ones(32)}), r"has the shape \(32,\)"),
        (changed(**{DOWN: torch.ones(32, 256, dtype=torch.int8)}), "before it was quantized"),
        (changed(**{DOWN: torch.ones(32, 256, dtype=torch.float8_e4m3fn)}), "before it was quantized"),
        (
            changed(**{"model.norm.weight": torch.ones(32)}),
            "model.norm.weight, which HRM-Text does not have: remove it",
        ),
        (changed(**{DOWN: torch.full((32, 256), float("inf"))}), f"{DOWN} holds NaN or infinite"),
        (changed(**{"model.z_L_init": torch.full((32,), float("nan"))}), "model.z_L_init holds NaN"),
        ({}, "lacks the tensor"),
    ],
)
def test_tensors_that_do_not_fit(tmp_path, tensors, match):
    assert_refused(save_published(tmp_path / "source", tensors), match)


def test_values_that_another_dtype_cannot_hold(tmp_path):
    source = save_published(tmp_path / "source", changed(**{DOWN: torch.full((32, 256), 1e6)}))
    assert_refused(source, "too large for torch.float16: pass --dtype bfloat16", dtype="float16")


def test_a_split_folder_that_lacks_a_part(tmp_path):
    tensors = split_tensors(published_tensors())
    del tensors["model.H_module.layers.0.self_attn.k_proj.weight"]
    assert_refused(
        save_published(tmp_path / "source", tensors), "lacks the tensor model.H_module.layers.0.self_attn.k_proj"
    )


def test_a_folder_that_holds_both_layouts(tmp_path):
    both = {**split_tensors(published_tensors()), **published_tensors()}
    assert_refused(save_published(tmp_path / "source", both), "both fused and split")


def test_an_index_that_misplaces_a_tensor(tmp_path):
    source = save_published(tmp_path / "source", shards=2)
    path = source / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    shards = sorted(set(index["weight_map"].values()))
    index["weight_map"]["lm_head.weight"] = next(s for s in shards if s != index["weight_map"]["lm_head.weight"])
    path.write_text(json.dumps(index))
    assert_refused(source, "lm_head.weight, which the index does not place there")
    del index["weight_map"]["lm_head.weight"]
    path.write_text(json.dumps(index))
    assert_refused(source, "lm_head.weight, which the index does not place there")


@pytest.mark.parametrize(
    ("prepare", "match"),
    [
        (lambda folder: None, "does not exist: pass a checkpoint folder or a Hub id"),
        (lambda folder: folder.mkdir(), "is empty"),
        (lambda folder: folder.write_text("x"), "is a file"),
        (lambda folder: (folder.mkdir(), (folder / "x.txt").touch()), "is not a checkpoint"),
        (lambda folder: (folder.mkdir(), (folder / "config.json").write_text("{}")), "has no model.safetensors"),
        (lambda folder: (folder / "all_config.yaml").mkdir(parents=True), "all_config.yaml is not a regular file"),
        (lambda folder: (save_published(folder), (folder / "config.json").write_text("{")), "not valid JSON"),
        (lambda folder: (save_published(folder), (folder / "config.json").write_text("3")), "not a JSON object"),
    ],
)
def test_folders_that_are_no_checkpoint(tmp_path, prepare, match):
    prepare(tmp_path / "source")
    assert_refused(tmp_path / "source", match)


def test_a_pipe_does_not_hang(tmp_path, training, epoch):
    (epoch / ".metadata").unlink()
    os.mkfifo(epoch / ".metadata")
    assert_refused(training, "not a regular file")
    source = save_published(tmp_path / "source")
    (source / "model.safetensors").unlink()
    os.mkfifo(source / "model.safetensors")
    assert_refused(source, "no model.safetensors")


@pytest.mark.parametrize("form", ["training", "model"])
def test_files_that_fail_while_they_are_read(tmp_path, training, form):
    """They were whole when the checkpoint was opened."""
    source = training if form == "training" else save_published(tmp_path / "model")
    file = source / ("fsdp2_epoch_1/__0_0.distcp" if form == "training" else "model.safetensors")
    opened = open_source(source)
    content = file.read_bytes()
    file.write_bytes(content[:4000])
    with pytest.raises(ConversionError, match=f"{file.name} (is damaged|became shorter)"):
        opened.read("lm_head.weight")
    file.unlink()
    with pytest.raises(ConversionError, match=f"{file.name} cannot be read .No such file"):
        opened.read("lm_head.weight")
    file.mkdir()
    with pytest.raises(ConversionError, match=f"{file.name} cannot be read .Is a directory"):
        opened.read("lm_head.weight")


LOCKED = """
import sys
from pathlib import Path
sys.path.insert(0, {root!r})
from convert_weights import main

for line in sys.stdin:
    locked, *arguments = line.split()
    path = Path(locked)
    mode = path.stat().st_mode
    path.chmod(0o555 if path.name == "full" else 0)
    try:
        print(main([*arguments, "--no-verify"]), flush=True)
    finally:
        path.chmod(mode)
"""


def without_the_superusers_rights():
    """Permissions do not bind the superuser, who runs tests in containers; without two capabilities they do."""
    libc = ctypes.CDLL(None)
    for capability in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
        libc.prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP


@pytest.mark.skipif(sys.platform != "linux", reason="capabilities are Linux's")
def test_files_that_may_not_be_read_or_written(tmp_path, training):
    """One line for each, which names the file; and nothing is left behind."""
    save_published(tmp_path / "model", shards=2)
    save_published(tmp_path / "closed" / "model")
    small_tokenizer(tmp_path / "tokenizer")
    (tmp_path / "full").mkdir()
    train = ["checkpoint"]
    cases = [
        ("checkpoint", train),
        ("checkpoint/all_config.yaml", train),
        ("checkpoint/train_metadata.yaml", train),
        ("checkpoint/fsdp2_epoch_1", train),
        ("checkpoint/fsdp2_epoch_1/.metadata", train),
        ("checkpoint/fsdp2_epoch_1/__0_0.distcp", train),
        ("tokenizer", [*train, "--tokenizer", "tokenizer"]),
        ("tokenizer/tokenizer.json", [*train, "--tokenizer", "tokenizer"]),
        ("model", ["model"]),
        ("model/config.json", ["model"]),
        ("model/model.safetensors.index.json", ["model"]),
        ("model/model-00002-of-00002.safetensors", ["model"]),
        ("closed", ["closed/model"]),
        ("full", ["model", "--output", "full/out"]),
        ("full", ["model", "--output", "full/further/out"]),
    ]
    lines = []
    for locked, arguments in cases:
        output = [] if "--output" in arguments else ["--output", str(tmp_path / "out")]
        paths = [str(tmp_path / word) if not word.startswith("-") else word for word in arguments]
        lines.append(" ".join([str(tmp_path / locked), *paths, *output]))
    before = sorted(tmp_path.rglob("*"))
    done = subprocess.run(
        [sys.executable, "-c", LOCKED.format(root=str(ROOT))],
        input="\n".join(lines),
        capture_output=True,
        text=True,
        preexec_fn=without_the_superusers_rights,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["1"] * len(cases)
    said = [line for line in done.stderr.splitlines() if line.startswith("convert_weights.py:")]
    for (locked, _), line in zip(cases, said, strict=True):
        assert str(tmp_path / locked) in line and "(Permission denied): c" in line
    assert "Traceback" not in done.stderr
    assert sorted(tmp_path.rglob("*")) == before


def test_options_of_a_training_checkpoint_do_not_apply_to_others(tmp_path):
    source = save_published(tmp_path / "source")
    assert_refused(source, "--epoch and --weights do not apply", epoch=1)
    assert_refused(source, "--epoch and --weights do not apply", weights="raw")
    assert_refused(source, "--dtype 'int4' is unknown", dtype="int4")
    assert_refused(source, "--format 'gguf' is unknown", layout="gguf")
    assert_refused(source, "holds no tokenizer.json", tokenizer=tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        "train/fsdp2_epoch_1/.metadata",
        "train/all_config.yaml",
        "train/train_metadata.yaml",
        "model/config.json",
        "model/model.safetensors.index.json",
        "model/model-00001-of-00002.safetensors",
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_random_damage_is_refused_or_harmless(tmp_path, name):
    """Whatever the bytes, nothing but a ConversionError comes out."""
    shutil.copytree(REFERENCE / "checkpoint", tmp_path / "train")
    save_published(tmp_path / "model", shards=2)
    path = tmp_path / name
    good = path.read_bytes()
    reach = min(len(good), 3000) if name.endswith("safetensors") else len(good)
    chance = random.Random(name)
    refused = 0
    for _ in range(25):
        damaged = bytearray(good)
        for _ in range(chance.choice([1, 1, 2, 5])):
            at = chance.randrange(reach)
            cut, size = chance.choice([(1, 1), (0, 5), (12, 0), (8, 8)])
            damaged[at : at + cut] = chance.randbytes(size)
        path.write_bytes(damaged)
        try:
            convert(tmp_path / name.split("/")[0], dry_run=True)
        except ConversionError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > 5


KILLER = """
import os, random, shutil, signal, sys, time
sys.path.insert(0, {root!r})
from convert_weights import convert

def start(source):
    child = os.fork()
    if child == 0:
        convert(source, {output!r}, force=True, verification=False, progress=False, max_shard_size="1MB")
        os._exit(0)
    return child

durations = []
for _ in range(3):  # the first finds cold files, and a kill after the end would try nothing
    began = time.monotonic()
    assert os.waitpid(start({first!r}), 0)[1] == 0
    durations.append(time.monotonic() - began)
duration = min(durations)
chance = random.Random(0)
killed = 0
for number in range(50):
    if number == 25:  # the other half begins without an output
        shutil.rmtree({output!r})
    child = start([{first!r}, {second!r}][number % 2])
    time.sleep(chance.uniform(0, duration))
    os.kill(child, signal.SIGKILL)
    killed += os.WIFSIGNALED(os.waitpid(child, 0)[1])
    print("state", number, flush=True)
    sys.stdin.readline()
print("killed", killed)
"""


def test_fifty_kills_at_random_times(tmp_path):
    """The output is what one of two sources gives, whole, or absent; never a part or a mixture."""
    sources, allowed = [], []
    for seed in (1, 2):
        tensors, config = published_tensors(seed, layers=24), published_config(num_layers_per_stack=24)
        sources.append(save_published(tmp_path / f"source-{seed}", tensors, config))
        expected = tmp_path / f"expected-{seed}"
        convert(sources[-1], expected, verification=False, progress=False, max_shard_size="1MB")
        allowed.append(snapshot(expected))
    output = tmp_path / "out"
    code = KILLER.format(root=str(ROOT), first=str(sources[0]), second=str(sources[1]), output=str(output))
    states = []
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        for line in process.stdout:
            if line.startswith("killed"):
                killed = int(line.split()[1])
                break
            found = snapshot(output) if output.exists() else None
            assert found is None or found in allowed
            states.append(None if found is None else allowed.index(found))
            process.stdin.write("\n")
            process.stdin.flush()
    assert process.returncode == 0
    assert len(states) == 50 and killed >= 25
    assert None not in states[:25] and None in states[25:]
    convert(sources[1], output, force=True, verification=False, progress=False, max_shard_size="1MB")
    assert not [path for path in tmp_path.iterdir() if "converting" in path.name]


@pytest.mark.slow
def test_fifty_kills_of_the_program(tmp_path):
    """As above, of the whole program with its reload in a new process."""
    source = save_published(tmp_path / "source")
    convert(source, tmp_path / "expected", verification=False, progress=False)
    expected = snapshot(tmp_path / "expected")
    command = [
        sys.executable,
        str(ROOT / "convert_weights.py"),
        str(source),
        "--output",
        str(tmp_path / "out"),
        "--force",
    ]
    began = time.monotonic()
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    duration = time.monotonic() - began
    chance = random.Random(0)
    killed = 0
    for number in range(50):
        if number == 25:
            shutil.rmtree(tmp_path / "out")
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(chance.uniform(0, duration))
        process.send_signal(signal.SIGKILL)
        killed += process.wait(timeout=60) != 0
        assert (
            snapshot(tmp_path / "out") == expected
            if number < 25
            else (not (tmp_path / "out").exists() or snapshot(tmp_path / "out") == expected)
        )
    assert killed >= 25
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["expected", "out", "source"]
