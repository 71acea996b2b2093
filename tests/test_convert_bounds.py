"""Small files that would cost much: refused soon and in little memory, in one line."""

from __future__ import annotations

import io
import json
import pickle
import resource
import shutil
import subprocess
import sys
import time
import zipfile

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex

from conversion import pickles, reading
from conversion.errors import ConversionError
from convert_weights import convert

from .checkpoints import REFERENCE, assert_refused, published_tensors, save_published
from .test_convert_tokenizers import GEMMA, PLAIN, make_checkpoint, train_tokenizer
from .tiny import ROOT


SECONDS = 10
GIGABYTE = 2**30
EMBEDDING = "optim.state.embed_tokens.embedding_weight.param_ema"


@pytest.fixture(autouse=True)
def bounded():
    """Every test here ends soon, in little memory beyond what the process had."""
    peak, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    yield
    assert time.process_time() - started < SECONDS
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) * 1024 < GIGABYTE


@pytest.fixture
def training(tmp_path):
    shutil.copytree(REFERENCE / "checkpoint", tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def shared_tuples(levels: int = 9, width: int = 1000) -> bytes:
    """A tuple of tuples of tuples, each of which is one object many times over; it is remembered at `levels`."""
    return b"K\1q\0" + b"".join(
        b"(" + (b"h" + bytes([level])) * width + b"tq" + bytes([level + 1]) for level in range(levels)
    )


@pytest.mark.parametrize(
    "content",
    [
        shared_tuples() + b".",
        shared_tuples() + b"}h\x09K\1s.",
        shared_tuples() + b"}(h\x09K\1u.",
        shared_tuples() + b"(h\x09K\1d.",
        shared_tuples() + b"\x8f(h\x09\x90.",
        shared_tuples() + b"(h\x09\x91.",
        shared_tuples() + b"ccollections\nOrderedDict\n](h\x09h\x09\x86ae\x85R.",
        b"}(" + b"".join(b"\x8a\x08" + (n * (2**61 - 1)).to_bytes(8, "little") + b"K\1" for n in range(4)) + b"u.",
    ],
)  # fmt: skip
def test_an_index_that_would_be_hashed_without_an_end(training, content):
    (training / "fsdp2_epoch_1" / ".metadata").write_bytes(b"\x80\4" + content)
    assert_refused(training, r"\.metadata is (not a safe index|damaged)")


def test_an_index_of_too_many_steps(training, monkeypatch):
    monkeypatch.setattr(pickles._Counted, "left", 10_000)
    (training / "fsdp2_epoch_1" / ".metadata").write_bytes(b"\x80\4" + b"]" * 20_000 + b".")
    assert_refused(training, "takes more than 6,000,000 steps")


def metadata_of(training):
    return dcp.FileSystemReader(training / "fsdp2_epoch_1").read_metadata()


def rewrite(training, metadata):
    (training / "fsdp2_epoch_1" / ".metadata").write_bytes(pickle.dumps(metadata))


@pytest.mark.parametrize("count", [3000, 5000])
def test_pieces_that_must_all_be_compared(training, count):
    metadata, name = metadata_of(training), "model.lm_head.weight"
    entry, info = metadata.state_dict_metadata[name], metadata.storage_data[MetadataIndex(name, [0, 0])]
    entry.size = torch.Size([1, count])
    entry.chunks = [ChunkStorageMetadata(torch.Size([0, at]), torch.Size([1, 1])) for at in range(count)]
    metadata.storage_data |= {MetadataIndex(name, chunk.offsets): info for chunk in entry.chunks}
    rewrite(training, metadata)
    assert_refused(training, "is in too many pieces")


def test_a_shape_of_a_million_sizes(training):
    metadata = metadata_of(training)
    metadata.state_dict_metadata["model.lm_head.weight"].size = [1] * 10**6
    rewrite(training, metadata)
    assert_refused(training, "are not sizes")


def test_a_piece_that_claims_gigabytes(training):
    metadata = metadata_of(training)
    info = metadata.storage_data[MetadataIndex(EMBEDDING, [0, 0])]
    with open(training / "fsdp2_epoch_1" / info.relative_path, "r+b") as file:
        file.truncate(8 * GIGABYTE)
    info.length = 7 * GIGABYTE
    rewrite(training, metadata)
    assert_refused(training, "would take 7,516,192,768 bytes for 32,768 of numbers")


@pytest.mark.parametrize(
    ("tensor", "change", "message"),
    [
        (torch.zeros(256, 32), shared_tuples() + b"}h\x09K\1s.", "a key is a tuple"),
        (torch.zeros(1).expand(256, 32), None, "less data than its shape"),
        (torch.zeros(256, 32).to_sparse(), None, "which the format does not need"),
        (torch.zeros(256, 32, dtype=torch.complex64), None, "which the format does not need"),
        ({"tensor": torch.zeros(256, 32)}, None, "not a plain tensor"),
        (torch.zeros(32, 256), None, "but its index says"),
        (torch.zeros(256, 32, dtype=torch.float64), None, "but its index says"),
    ],
)
def test_archives_that_hold_no_such_tensor(training, tensor, change, message):
    """The file of the rank ends in an archive to which the index points."""
    archive, packed = io.BytesIO(), io.BytesIO()
    torch.save(tensor, archive)
    with zipfile.ZipFile(archive) as source, zipfile.ZipFile(packed, "w") as target:
        for entry in source.infolist():
            content = source.read(entry)
            target.writestr(entry, change if change and entry.filename.endswith("data.pkl") else content)
        target.writestr("archive/padding", b"\0" * max(0, 33_000 - packed.tell()))
    metadata = metadata_of(training)
    info = metadata.storage_data[MetadataIndex(EMBEDDING, [0, 0])]
    shard = training / "fsdp2_epoch_1" / info.relative_path
    info.offset, info.length = shard.stat().st_size, packed.tell()
    with open(shard, "ab") as file:
        file.write(packed.getvalue())
    rewrite(training, metadata)
    assert_refused(training, message)


def test_a_view_of_other_strides_is_read_as_it_is(training, tmp_path):
    """The archive of a transposed tensor has its numbers in the order of the memory."""
    convert(training, tmp_path / "plain", verification=False, progress=False)
    metadata = metadata_of(training)
    info = metadata.storage_data[MetadataIndex(EMBEDDING, [0, 0])]
    shard = training / "fsdp2_epoch_1" / info.relative_path
    archive = io.BytesIO(shard.read_bytes()[info.offset : info.offset + info.length])
    transposed = io.BytesIO()
    torch.save(torch.load(archive, weights_only=True).t().contiguous().t(), transposed)
    info.offset, info.length = shard.stat().st_size, transposed.tell()
    with open(shard, "ab") as file:
        file.write(transposed.getvalue())
    rewrite(training, metadata)
    convert(training, tmp_path / "again", verification=False, progress=False)
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("plain", "again")]
    assert files[0] == files[1]


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e999", "-1e999"])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_numbers_that_json_does_not_have(tmp_path, name, value):
    """They would be written into the folder, where other readers than Python's fail."""
    model = save_published(tmp_path / "model")
    content = (model / name).read_text().rstrip() if (model / name).exists() else '{"x": 1}'
    (model / name).write_text(f'{content[:-1]}, "rope_parameters": {{"factor": {value}}}}}')
    assert_refused(model, f"{name} is not valid JSON")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", '{"x": "' + "a" * 9_000_000 + '"}', "larger than 8,388,608 bytes"),
        ("tokenizer.json", '{"x": [' + "[]," * 1_600_000 + "1]}", "more than 3,000,000 values"),
        ("tokenizer.json", '{"x": "\U0001f600' + "a" * 50_000_000 + '\\ud83d"}', "half a surrogate pair"),
    ],
    ids=["settings", "values", "wide"],
)
def test_json_that_fills_the_memory(tmp_path, name, content, message):
    model = save_published(tmp_path / "model")
    (model / name).write_text(content)
    assert_refused(model, f"{name} .*{message}")


def test_the_largest_vocabulary_known_is_read(tmp_path):
    content = {"model": {"vocab": {f"token {i}": i for i in range(262_144)}, "merges": [["a", "b"]] * 514_906}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert reading.read_json(tmp_path, "tokenizer.json") == content


def test_an_index_of_many_files_without_tensors(tmp_path):
    """The first is enough to know."""
    model = save_published(tmp_path / "model", shards=2)
    save_file({}, model / "empty.safetensors", metadata={str(i): "x" * 100 for i in range(50_000)})
    index = {"weight_map": {f"x{i}": f"{i}.safetensors" for i in range(300)}}
    for i in range(300):
        (model / f"{i}.safetensors").symlink_to("empty.safetensors")
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_refused(model, r"/0\.safetensors lacks the tensor x0 that the index names")


@pytest.mark.parametrize("length", [300, 6000, 10**6])
def test_a_message_has_a_bounded_length(tmp_path, length):
    model = save_published(tmp_path / "model", {**published_tensors(), "x" * length: torch.ones(2)})
    with pytest.raises(ConversionError, match="which HRM-Text does not have: remove it") as caught:
        convert(model, tmp_path / "out")
    assert len(str(caught.value)) < 3000 and str(model) in str(caught.value)


PROBE = """
import json, resource, sys
from pathlib import Path
from conversion.probe import probe
found = probe({path.name: path.read_bytes() for path in Path(sys.argv[1]).iterdir()})
print(json.dumps([found, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux bounds the memory of a process in this way")
def test_a_template_that_fills_the_memory_is_left(tmp_path):
    """Looked at from a small process: a child counts the memory of the one that it comes from, too."""
    folder = train_tokenizer(tmp_path / "tokenizer", template="{{ 'x' * 3000000000 }}")
    done = subprocess.run([sys.executable, "-c", PROBE, folder], cwd=ROOT, capture_output=True, text=True, timeout=900)
    found, peak = json.loads(done.stdout)
    assert found is None and peak < GIGABYTE


def test_a_vocabulary_of_lines_that_the_model_does_not_have(tmp_path):
    source = make_checkpoint(tmp_path / "source")
    (source / "vocab.txt").write_text("".join(f"w{i}\n" for i in range(513)))
    assert_refused(source, "ids above the model's vocabulary of 512")
    (source / "vocab.txt").unlink()
    (source / "vocab.json").write_text(json.dumps({"a": 0, "b": 512}))
    assert_refused(source, "ids above the model's vocabulary of 512")


@pytest.mark.parametrize("form", ["list", "table", "folder"])
def test_named_templates_stay(tmp_path, form):
    """As a list or a table in the settings, and as transformers saves them, in a folder of their own."""
    source = make_checkpoint(tmp_path / "source")
    named = {"default": GEMMA, "tool_use": PLAIN}
    settings = [{"name": name, "template": text} for name, text in named.items()] if form == "list" else named
    train_tokenizer(source, template=None if form == "folder" else settings)
    if form == "folder":
        (source / "chat_template.jinja").write_text(GEMMA)
        (source / "additional_chat_templates").mkdir()
        (source / "additional_chat_templates" / "tool_use.jinja").write_text(PLAIN)
    for force in (False, True):
        done = convert(source, tmp_path / "out", verification=False, progress=False, force=force)
        assert done.plan.prompts.startswith("read in both directions from <start_of_turn>")
    if form == "folder":
        assert (tmp_path / "out" / "additional_chat_templates" / "tool_use.jinja").read_text() == PLAIN
    else:
        written = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
        assert written["chat_template"] == settings
    (source / "additional_chat_templates").mkdir(exist_ok=True)
    (source / "additional_chat_templates" / "x.jinja").symlink_to("/etc/hostname")
    assert_refused(source, "x.jinja is a link out of the checkpoint")


@pytest.mark.parametrize(
    ("a", "b", "settings", "message"),
    [
        (torch.ones(1, 400_000), torch.ones(400_000, 1), {}, "400,000 rows and 400,000 columns"),
        (torch.ones(1, 3_000_000), torch.ones(30, 1), {}, "more than any projection"),
        (torch.full((1, 8), float("nan")), torch.ones(8, 1), {}, "NaN or infinite"),
        (torch.ones(1, 8), torch.ones(8, 1), {"lora_alpha": 10**400}, "lora_alpha is 1000"),
        (torch.ones(1, 8), torch.ones(8, 1), {"alpha_pattern": {"q_proj": 10**400}}, "alpha_pattern has"),
    ],
)
def test_adapters_that_are_small_and_would_be_large(tmp_path, a, b, settings, message):
    (tmp_path / "adapter").mkdir()
    name = "base_model.model.model.H_module.layers.0.self_attn.q_proj.lora_"
    save_file({f"{name}A.weight": a, f"{name}B.weight": b}, tmp_path / "adapter" / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 2, "target_modules": ["q_proj"], **settings}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    assert_refused(tmp_path / "adapter", message)
