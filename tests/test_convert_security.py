"""Hostile checkpoints: a clear error, the payload not run, nothing written."""

import io
import json
import pickle
import random
import shutil
import struct
import time
import zipfile
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

from convert_weights import convert

from .checkpoints import REFERENCE, assert_refused, published_config, published_tensors, save_published
from .test_convert_output import small_tokenizer


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, witness: Path):
        self.witness = witness

    def __reduce__(self):
        return Path.touch, (self.witness,)


@pytest.fixture
def witness(tmp_path):
    return tmp_path / "the-payload-ran"


@pytest.fixture
def training(tmp_path):
    folder = tmp_path / "checkpoint"
    shutil.copytree(REFERENCE / "checkpoint", folder)
    return folder


@pytest.fixture
def model(tmp_path):
    return save_published(tmp_path / "model", shards=2)


def index_of(training):
    return training / "fsdp2_epoch_1" / ".metadata"


def metadata_of(training):
    return dcp.FileSystemReader(training / "fsdp2_epoch_1").read_metadata()


def rewrite(training, metadata):
    index_of(training).write_bytes(pickle.dumps(metadata))


def test_the_payload_of_these_tests_is_live(witness):
    pickle.loads(pickle.dumps(Payload(witness)))
    assert witness.exists()


@pytest.mark.parametrize(
    "place", ["whole", "planner_data", "storage_data", "state_dict_metadata", "storage_meta", "chunk"]
)
def test_a_payload_in_the_index(training, witness, place):
    metadata = metadata_of(training)
    payload = Payload(witness)
    if place == "whole":
        metadata = payload
    elif place == "planner_data":
        metadata.planner_data = payload
    elif place == "storage_data":
        metadata.storage_data[MetadataIndex("evil")] = payload
    elif place == "state_dict_metadata":
        metadata.state_dict_metadata["evil"] = payload
    elif place == "storage_meta":
        metadata.storage_meta = payload
    else:
        metadata.state_dict_metadata["model.lm_head.weight"].chunks.append(payload)
    rewrite(training, metadata)
    assert_refused(training, r"\.metadata is not a safe index .*pathlib")
    assert not witness.exists()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_payloads_of_every_pickle_protocol(training, witness, protocol):
    index_of(training).write_bytes(pickle.dumps({"x": Payload(witness)}, protocol=protocol))
    assert_refused(training, "not a safe index")
    assert not witness.exists()


@pytest.mark.parametrize(
    "call",
    [
        (b"os", b"system"),
        (b"builtins", b"eval"),
        (b"builtins", b"__import__"),
        (b"torch", b"load"),
        (b"torch.serialization", b"load"),
        (b"torch.distributed.checkpoint.filesystem", b"os.system"),
        (b"torch.distributed.checkpoint.metadata", b"os.system"),
        (b"pathlib", b"os.system"),
    ],
)
def test_no_name_outside_the_list_is_looked_up(training, call):
    module, name = call
    assembled = b"\x80\x04\x8c" + bytes([len(module)]) + module + b"\x8c" + bytes([len(name)]) + name + b"\x93."
    index_of(training).write_bytes(assembled)
    assert_refused(training, "which the format does not need")


def test_getattr_in_an_index_reaches_nothing(training, witness):
    """Enum members may be pickled with it; here it is asked for a way out of a class of the format."""

    class Escape:
        def __reduce__(self):
            return getattr, (BytesStorageMetadata, "__subclasses__")

        def __call__(self):
            raise AssertionError("pickling does not call")

    class Call:
        def __reduce__(self):
            return Escape(), ()

    index_of(training).write_bytes(pickle.dumps(Call()))
    assert_refused(training, "not a safe index .'NoneType' object is not callable")


def test_a_pickle_cannot_alter_the_reader(training, tmp_path):
    """State set on a class of one index is not seen by the next."""
    name = b"torch.distributed.checkpoint.metadata"
    poison = b"\x80\x04\x8c" + bytes([len(name)]) + name + b"\x8c\x08Metadata\x93N}\x8c\x0c__setstate__K\x01s\x86b."
    index_of(training).write_bytes(poison)
    assert_refused(training, "metadata")
    convert(REFERENCE / "checkpoint", tmp_path / "good", verification=False, progress=False)


@pytest.mark.parametrize("file", ["../outside.distcp", "/etc/hostname", "a/b.distcp", "..", "C:\\x.distcp", "x\0y"])
def test_the_index_cannot_point_outside(training, file):
    (training / "outside.distcp").write_bytes((training / "fsdp2_epoch_1" / "__0_0.distcp").read_bytes())
    metadata = metadata_of(training)
    for info in metadata.storage_data.values():
        info.relative_path = file
    rewrite(training, metadata)
    assert_refused(training, "not a plain file name")


def test_a_link_out_of_the_checkpoint(training, tmp_path):
    shard = training / "fsdp2_epoch_1" / "__0_0.distcp"
    elsewhere = tmp_path / "elsewhere.distcp"
    shutil.move(shard, elsewhere)
    shard.symlink_to(elsewhere)
    assert_refused(training, "link out of the checkpoint")


def test_a_payload_in_the_place_of_a_tensor(training, witness):
    metadata = metadata_of(training)
    info = metadata.storage_data[MetadataIndex("model.lm_head.weight", [0, 0])]
    archive = io.BytesIO()
    torch.save({"tensor": torch.ones(256, 32), "x": Payload(witness)}, archive)
    append(training, info, archive.getvalue())
    rewrite(training, metadata)
    assert_refused(training, "damaged at model.lm_head.weight", weights="raw")
    assert not witness.exists()


def test_a_bare_pickle_in_the_place_of_a_tensor(training, witness):
    metadata = metadata_of(training)
    append(
        training, metadata.storage_data[MetadataIndex("model.lm_head.weight", [0, 0])], pickle.dumps(Payload(witness))
    )
    rewrite(training, metadata)
    assert_refused(training, "model.lm_head.weight", weights="raw")
    assert not witness.exists()


def test_an_archive_that_inflates(training):
    """A small file that becomes a large one when it is read."""
    metadata = metadata_of(training)
    info = metadata.storage_data[MetadataIndex("model.lm_head.weight", [0, 0])]
    archive = io.BytesIO()
    torch.save(torch.zeros(256, 32), archive)
    packed = io.BytesIO()
    with zipfile.ZipFile(archive) as source, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as target:
        for entry in source.infolist():
            bomb = b"\0" * 10**7 if "data/" in entry.filename else b""
            target.writestr(entry.filename, source.read(entry) + bomb)
        target.writestr("archive/padding", random.Random(0).randbytes(256 * 32 * 4))
    append(training, info, packed.getvalue())
    rewrite(training, metadata)
    assert_refused(training, "model.lm_head.weight .its archive inflates", weights="raw")


def append(training, info, content):
    """Puts `content` at the end of the rank's file and lets `info` point to it."""
    shard = training / "fsdp2_epoch_1" / "__0_0.distcp"
    info.offset, info.length = shard.stat().st_size, len(content)
    with open(shard, "ab") as file:
        file.write(content)


@pytest.mark.parametrize(
    "change",
    [
        lambda info: setattr(info, "offset", -1),
        lambda info: setattr(info, "length", 2**70),
        lambda info: setattr(info, "length", 10.5),
        lambda info: setattr(info, "relative_path", 7),
        lambda info: setattr(info, "transform_descriptors", ["zstd"]),
    ],
)
def test_impossible_numbers_in_the_index(training, change):
    metadata = metadata_of(training)
    change(metadata.storage_data[MetadataIndex("model.lm_head.weight", [0, 0])])
    rewrite(training, metadata)
    assert_refused(training, "is damaged")


def test_an_index_that_promises_more_than_the_file_has(training):
    metadata = metadata_of(training)
    metadata.storage_data[MetadataIndex("model.lm_head.weight", [0, 0])].length = 2**40
    rewrite(training, metadata)
    assert_refused(training, "truncated", weights="raw")


@pytest.mark.parametrize("name", ["all_config.yaml", "train_metadata.yaml"])
def test_a_yaml_tag(training, witness, name):
    with open(training / name, "a") as file:
        file.write(
            f"\nextra: !!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path ['{witness}']]\n"
        )
    assert_refused(training, f"{name} is not plain YAML")
    assert not witness.exists()


def test_yaml_aliases_do_not_multiply(training):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
    text = (training / "all_config.yaml").read_text().replace("hidden_size: 32", "hidden_size: *a11")
    (training / "all_config.yaml").write_text("\n".join(lines) + "\n" + text)
    assert_refused(training, "all_config.yaml has more than 100,000 values with its aliases")


def test_the_tokenizer_path_of_the_training_machine_is_not_followed(training, tmp_path):
    outside = tmp_path / "secrets"
    outside.mkdir()
    (outside / "tokenizer.json").write_text("{}")
    metadata = (training / "train_metadata.yaml").read_text()
    for path in (str(outside), "../secrets"):
        (training / "train_metadata.yaml").write_text(
            metadata.replace("tokenizer_path: data", f"tokenizer_path: {path}")
        )
        done = convert(training, None, dry_run=True)
        assert done.plan.source.tokenizer is None


@pytest.mark.parametrize(
    "file", ["../outside.safetensors", "/etc/hostname", "sub/x.safetensors", "..", "a\nb", "\x1b[31m"]
)
def test_a_shard_index_cannot_point_outside(model, file):
    save_published(model.parent / "other")
    shutil.move(model.parent / "other" / "model.safetensors", model.parent / "outside.safetensors")
    index = json.loads((model / "model.safetensors.index.json").read_text())
    index["weight_map"] = dict.fromkeys(index["weight_map"], file)
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_refused(model, "not a plain file name")


def test_a_shard_index_of_a_million_names(model):
    index = json.loads((model / "model.safetensors.index.json").read_text())
    index["weight_map"] |= {f"x{number}": "model-00001-of-00002.safetensors" for number in range(10**6)}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    started = time.process_time()
    assert_refused(model, "lacks the tensor x0 that the index names")
    assert time.process_time() - started < 10


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "model.safetensors.index.json"])
@pytest.mark.parametrize("addition", ['"x": "\\ud800"', '"\\udfff": 1', '"x": [["\\udc00\\ud800"]]'])
def test_half_of_a_surrogate_pair(model, name, addition):
    for file in small_tokenizer(model.parent / "tokenizer", bos_token="<|im_start|>").iterdir():
        shutil.copy(file, model)
    text = (model / name).read_text().rstrip()
    (model / name).write_text(f"{text[:-1]}, {addition}}}")
    assert_refused(model, f"{name} holds half a surrogate pair")


def test_half_of_a_surrogate_pair_in_yaml(training):
    text = (training / "train_metadata.yaml").read_text()
    (training / "train_metadata.yaml").write_text(text + '\nx: "\\ud800"\n')
    assert_refused(training, r"train_metadata\.yaml holds half a surrogate pair")


def test_a_whole_surrogate_pair_is_text(model):
    config = (model / "config.json").read_text().rstrip()
    (model / "config.json").write_text(config[:-1] + ', "x": "\\ud83d\\ude00"}')
    convert(model, model.parent / "out", verification=False, progress=False)


def test_a_shard_index_that_names_an_absent_file(model):
    (model / "model-00002-of-00002.safetensors").unlink()
    assert_refused(model, "model-00002-of-00002.safetensors is missing")


def test_a_shard_that_is_a_link_out(model, tmp_path):
    shard = model / "model-00002-of-00002.safetensors"
    shutil.move(shard, tmp_path / "elsewhere")
    shard.symlink_to(tmp_path / "elsewhere")
    assert_refused(model, "link out of the checkpoint")


def test_a_tokenizer_that_is_a_link_out(model, tmp_path):
    (tmp_path / "secret.json").write_text('{"model": {"vocab": {}}, "password": "x"}')
    (model / "tokenizer.json").symlink_to(tmp_path / "secret.json")
    assert_refused(model, "link out of the checkpoint")


@pytest.mark.parametrize("content", ["[]", "{", '{"weight_map": []}', '{"weight_map": {"a": 3}}', "[" * 100_000])
def test_a_shard_index_that_is_none(model, content):
    (model / "model.safetensors.index.json").write_text(content)
    assert_refused(model, r"index\.json")


@pytest.mark.parametrize(
    "header",
    [
        struct.pack("<Q", 2**63 - 1) + b"{}",
        struct.pack("<Q", 2**40) + b"{}",
        struct.pack("<Q", 99_000_000) + b"{}",
        struct.pack("<Q", 0),
        b"\1\2",
        b"",
        struct.pack("<Q", 9) + b"not json!",
    ],
)
def test_absurd_lengths_in_a_safetensors_header(tmp_path, header):
    source = save_published(tmp_path / "model")
    (source / "model.safetensors").write_bytes(header)
    assert_refused(source, "damaged or not a safetensors")


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [2**31, 2**31], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 2**64 - 1]},
        {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [4], "data_offsets": [16, 0]},
        {"dtype": "EVIL", "shape": [4], "data_offsets": [0, 16]},
    ],
)
def test_absurd_tensors_in_a_safetensors_header(tmp_path, entry):
    source = save_published(tmp_path / "model")
    header = json.dumps({"lm_head.weight": entry}).encode()
    (source / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 16)
    assert_refused(source, "damaged or not a safetensors")


def test_pickled_weights_are_not_read(tmp_path, witness):
    source = save_published(tmp_path / "model")
    (source / "model.safetensors").unlink()
    torch.save(Payload(witness), source / "pytorch_model.bin")
    assert_refused(source, "pickled weights only")
    assert not witness.exists()


def test_modules_of_the_source_are_neither_run_nor_copied(tmp_path, witness):
    config = published_config(auto_map={"AutoModelForCausalLM": "modeling_hrm_text.Evil", "AutoConfig": "evil.Evil"})
    source = save_published(tmp_path / "model", config=config)
    for name in ("evil.py", "modeling_hrm_text.py"):
        (source / name).write_text(f"import pathlib; pathlib.Path({str(witness)!r}).touch()\n")
    convert(source, tmp_path / "out", progress=False)
    assert not witness.exists()
    assert not (tmp_path / "out" / "evil.py").exists()
    assert "touch" not in (tmp_path / "out" / "modeling_hrm_text.py").read_text()


def test_names_in_the_card_cannot_become_markup(tmp_path):
    source = save_published(tmp_path / "x](javascript:alert) <img src=x> `|")
    convert(source, tmp_path / "out", verification=False, progress=False)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "<img" not in card and "](javascript" not in card


def test_a_tensor_of_a_hostile_name(tmp_path):
    tensors = {
        **published_tensors(),
        "model.H_module.layers.99999999999999999999.mlp.down_proj.weight": torch.ones(2, 2),
    }
    assert_refused(save_published(tmp_path / "model", tensors), "does not have")
    tensors = {**published_tensors(), "model.H_module.layers.999999.mlp.down_proj.weight": torch.ones(32, 256)}
    assert_refused(save_published(tmp_path / "model2", tensors), "lacks")
