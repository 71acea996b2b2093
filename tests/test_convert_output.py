"""The folder that a conversion writes: complete, safe to write, and the same every time."""

import hashlib
import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import convert_weights
from conversion import writer
from conversion.errors import ConversionError
from conversion.layout import Dimensions, TensorSpec, split_names
from convert_weights import convert, parse_size

from .checkpoints import REFERENCE, published_config, published_tensors, save_published


ROOT = Path(__file__).resolve().parent.parent


def run(source, output, **options):
    return convert(source, output, verification=False, progress=False, **options)


@pytest.fixture
def source(tmp_path):
    return save_published(tmp_path / "source")


def snapshot(folder):
    """Content of every file below a folder."""
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def small_tokenizer(folder, **settings):
    """A tokenizer folder whose ids fit the small checkpoints, with the published special tokens."""
    folder.mkdir()
    special = ["<|PAD|>", "<|direct|>", "<|cot|>", "<|noisy|>", "<|synth|>", "<|endoftext|>", "<|im_start|>"]
    special += ["<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>"]
    special += ["<|quad_start|>", "<|quad_end|>"]
    letters = [chr(97 + index) for index in range(26)]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    content = {
        "version": "1.0",
        "added_tokens": [{"id": index, "content": token, **flags} for index, token in enumerate(special)],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": True},
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": True},
        "model": {"type": "BPE", "vocab": {token: i for i, token in enumerate(special + letters)}, "merges": []},
    }
    (folder / "tokenizer.json").write_text(json.dumps(content))
    if settings:
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def test_the_folder_is_complete(tmp_path, source):
    tokenizer = small_tokenizer(tmp_path / "tokenizer", chat_template="someone's", extra_special_tokens=["<|im_end|>"])
    run(source, tmp_path / "out", tokenizer=tokenizer)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    modules = {path.name for path in ROOT.glob("*_hrm_text.py")}
    assert {"modeling_hrm_text.py", "configuration_hrm_text.py", "tokenization_hrm_text.py"} <= modules
    assert names == modules | {
        "README.md",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    for reference in config["auto_map"].values():
        module, name = reference.split(".")
        assert f"class {name}(" in (tmp_path / "out" / f"{module}.py").read_text()
    assert {"AutoConfig", "AutoModel", "AutoModelForCausalLM"} <= config["auto_map"].keys()
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    length = {"do_sample": False, "max_new_tokens": config["max_position_embeddings"] // 4}
    assert generation == {"bos_token_id": 6, "eos_token_id": 11, "pad_token_id": 5, **length}
    settings = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    own = json.loads((ROOT / "tokenizer_config.json").read_text())
    assert settings["auto_map"] == own["auto_map"]
    assert [settings[f"{kind}_token"] for kind in ("bos", "eos", "pad")] == [
        "<|im_start|>",
        "<|box_end|>",
        "<|endoftext|>",
    ]
    assert (tmp_path / "out" / "chat_template.jinja").read_bytes() == (ROOT / "chat_template.jinja").read_bytes()
    assert "chat_template" not in settings


def test_the_config_has_what_other_loaders_read(tmp_path, source):
    """The fields and names that vLLM's model and llama.cpp's converter take from a folder.

    vllm/model_executor/models/hrm_text.py and llama.cpp's conversion/hrm_text.py.
    """
    run(source, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    layers, H_cycles, L_cycles = (config[name] for name in ("num_layers_per_stack", "H_cycles", "L_cycles"))
    assert config["architectures"] == ["HrmTextForCausalLM"] and config["model_type"] == "hrm_text"
    assert config["num_hidden_layers"] == layers * H_cycles * (L_cycles + 1)
    assert config["head_dim"] * config["num_attention_heads"] == config["hidden_size"]
    assert isinstance(config["embedding_scale"], float) and config["prefix_lm"] is True
    assert config["rope_parameters"] == {"rope_theta": 5000.0, "rope_type": "default"}
    assert {"intermediate_size", "vocab_size", "max_position_embeddings", "rms_norm_eps"} <= config.keys()
    assert config["hidden_act"] == "silu" and config["tie_word_embeddings"] is False
    outer = {"model.embed_tokens.weight", "model.z_L_init", "lm_head.weight"}
    inner = {
        f"model.{stack}_module.layers.{index}.{name}.weight"
        for stack in "LH"
        for index in range(layers)
        for name in ("attn.gqkv_proj", "attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
    }
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == outer | inner


def test_the_tokenizer_loads_as_this_projects_class(tmp_path, source):
    from transformers import AutoTokenizer

    run(source, tmp_path / "out", tokenizer=small_tokenizer(tmp_path / "tokenizer"))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert type(tokenizer).__name__ == "HrmTextTokenizer"
    encoded = tokenizer("<|im_start|>ab<|im_end|>c")
    assert encoded["input_ids"] == [6, 14, 15, 7, 16]
    assert encoded["token_type_ids"] == [1, 1, 1, 1, 0]


def test_a_split_folder_carries_the_tokenizer_and_no_model_code(tmp_path, source):
    from transformers import AutoTokenizer

    run(source, tmp_path / "out", tokenizer=small_tokenizer(tmp_path / "tokenizer"), layout="split")
    modules = {path.name for path in (tmp_path / "out").glob("*.py")}
    assert "tokenization_hrm_text.py" in modules and "modeling_hrm_text.py" not in modules
    assert "auto_map" not in json.loads((tmp_path / "out" / "config.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert tokenizer("<|im_start|>ab<|im_end|>c")["token_type_ids"] == [1, 1, 1, 1, 0]


def test_a_fine_tunes_own_template_and_generation_settings_stay(tmp_path, source):
    first = small_tokenizer(tmp_path / "tokenizer")
    run(source, tmp_path / "one", tokenizer=first)
    (tmp_path / "one" / "chat_template.jinja").write_text("{{ 'their own' }}")
    (tmp_path / "one" / "generation_config.json").write_text('{"eos_token_id": [11, 5], "temperature": 0.3}')
    run(tmp_path / "one", tmp_path / "two")
    assert (tmp_path / "two" / "chat_template.jinja").read_text() == "{{ 'their own' }}"
    generation = json.loads((tmp_path / "two" / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 6, "eos_token_id": [11, 5], "pad_token_id": 5, "temperature": 0.3}


def test_the_tokenizer_of_another_model_is_refused(tmp_path, source):
    other = small_tokenizer(tmp_path / "tokenizer")
    content = json.loads((other / "tokenizer.json").read_text())
    content["model"]["vocab"]["zz"] = 500
    (other / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ConversionError, match="above the model's vocabulary of 65"):
        run(source, tmp_path / "out", tokenizer=other)


def test_the_ids_of_the_tokenizer_go_into_the_config(tmp_path):
    tokenizer = small_tokenizer(tmp_path / "tokenizer")
    content = json.loads((tokenizer / "tokenizer.json").read_text())
    for entry in content["added_tokens"]:
        entry["id"] += 100
    (tokenizer / "tokenizer.json").write_text(json.dumps(content))
    config = run(REFERENCE / "checkpoint", None, dry_run=True, tokenizer=tokenizer).plan.config
    assert [config[f"{name}_token_id"] for name in ("bos", "eos", "pad", "prefix_end")] == [106, 111, 105, 107]


def test_shards_hold_what_the_index_says(tmp_path, source):
    run(source, tmp_path / "out", max_shard_size="40KB")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 3
    found = {}
    for shard in shards:
        with safe_open(shard, "pt") as file:
            assert file.metadata() == {"format": "pt"}
            names = list(file.keys())
        assert shard.stat().st_size < 41_000 or len(names) == 1
        found.update(dict.fromkeys(names, shard.name))
    assert found == index["weight_map"]
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in published_tensors().values())


def test_the_card_has_provenance_and_the_digest_of_each_file(tmp_path):
    run(REFERENCE / "checkpoint", tmp_path / "out", weights="raw", dtype="bfloat16")
    card = (tmp_path / "out" / "README.md").read_text()
    for row in ("| source | checkpoint |", "| epoch | 1 |", "| weights | raw |", "| dtype | bfloat16 |"):
        assert row in card
    digests = dict(re.findall(r"^\| (\S+) \| `([0-9a-f]{64})` \|$", card, re.MULTILINE))
    expected = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in (tmp_path / "out").iterdir()
        if path.name != "README.md"
    }
    assert digests == expected
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert str(tmp_path) not in card and str(ROOT) not in card


def test_the_same_conversion_gives_the_same_bytes(tmp_path, source):
    run(source, tmp_path / "out")
    first = snapshot(tmp_path / "out")
    run(source, tmp_path / "out", force=True)
    assert snapshot(tmp_path / "out") == first


def test_dry_run_writes_nothing(tmp_path, source):
    before = sorted(tmp_path.rglob("*"))
    done = run(source, tmp_path / "out", dry_run=True, max_shard_size="40KB")
    assert sorted(tmp_path.rglob("*")) == before
    table = "\n".join(done.plan.table())
    for expected in ("model-00001-of-", "config.json", "README.md", "modeling_hrm_text.py", "model.z_L_init"):
        assert expected in table
    assert f"{sum(t.nbytes for t in published_tensors().values()):,} bytes" in table


def test_an_existing_output_needs_force(tmp_path, source):
    run(source, tmp_path / "out")
    before = snapshot(tmp_path / "out")
    with pytest.raises(ConversionError, match="pass --force"):
        run(source, tmp_path / "out", dtype="bfloat16")
    assert snapshot(tmp_path / "out") == before
    run(source, tmp_path / "out", dtype="bfloat16", force=True)
    assert load_file(tmp_path / "out" / "model.safetensors")["lm_head.weight"].dtype == torch.bfloat16
    assert not [path for path in tmp_path.iterdir() if "converting" in path.name]


def test_an_output_that_appears_meanwhile_is_kept(tmp_path, source, monkeypatch):
    """As when two runs without --force were started for the same output."""
    honest = convert_weights.write

    def slow(*arguments):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "config.json").write_text("another run's")
        return honest(*arguments)

    monkeypatch.setattr(convert_weights, "write", slow)
    with pytest.raises(ConversionError, match="pass --force"):
        run(source, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["config.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


def test_names_that_look_like_patterns(tmp_path, source):
    (tmp_path / ".o[ut]*.converting-dead").mkdir()
    (tmp_path / ".ou.converting-alien").mkdir()
    run(source, tmp_path / "o[ut]*")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".ou.converting-alien", "o[ut]*", "source"]


def test_an_empty_output_folder_is_filled(tmp_path, source):
    (tmp_path / "out").mkdir()
    run(source, tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.parametrize("intruder", ["notes.txt", "checkpoint-100/x", ".git/HEAD", "training_args.bin"])
def test_force_deletes_nothing_that_no_conversion_wrote(tmp_path, source, intruder):
    run(source, tmp_path / "out")
    path = tmp_path / "out" / intruder
    path.parent.mkdir(exist_ok=True)
    path.write_text("precious")
    with pytest.raises(ConversionError, match=intruder.split("/")[0]):
        run(source, tmp_path / "out", force=True)
    assert path.read_text() == "precious"


def test_force_does_not_replace_a_folder_of_modules(tmp_path, source):
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "mine.py").write_text("precious")
    with pytest.raises(ConversionError, match="not a model's folder"):
        run(source, tmp_path / "code", force=True)


def test_the_source_is_never_the_output(tmp_path, source):
    for output in (source, tmp_path, source / ".." / "source"):
        with pytest.raises(ConversionError, match="is or holds the source"):
            run(source, output, force=True)
    run(source, source / "converted")
    assert (source / "converted" / "model.safetensors").exists()


@pytest.mark.parametrize("exchange", [True, False])
@pytest.mark.parametrize("force", [True, False])
def test_a_failure_leaves_the_old_output(tmp_path, source, monkeypatch, force, exchange):
    """The weights are NaN in the last tensor that is read, so that almost all has been written by then."""
    if not exchange:
        monkeypatch.setattr(writer, "_exchange", lambda a, b: False)
    if force:
        run(source, tmp_path / "out")
    before = snapshot(tmp_path / "out") if force else None
    tensors = published_tensors(seed=1)
    tensors["lm_head.weight"][-1, -1] = float("nan")
    bad = save_published(tmp_path / "bad", tensors)
    with pytest.raises(ConversionError, match=r"lm_head\.weight holds NaN"):
        run(bad, tmp_path / "out", force=force)
    assert not [path for path in tmp_path.iterdir() if "converting" in path.name]
    if force:
        assert snapshot(tmp_path / "out") == before
        run(save_published(tmp_path / "good", published_tensors(seed=2)), tmp_path / "out", force=True)
        assert snapshot(tmp_path / "out") != before
    else:
        assert not (tmp_path / "out").exists()


def test_an_old_output_that_a_killed_run_had_put_aside_comes_back(tmp_path, source):
    """Only systems without an exchange in one step have this moment."""
    run(source, tmp_path / "out")
    before = snapshot(tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / ".out.converting-1234-old")
    with pytest.raises(ConversionError, match="pass --force"):
        run(source, tmp_path / "out")
    assert snapshot(tmp_path / "out") == before


def test_what_a_killed_run_left_is_removed_and_a_live_runs_folder_is_not(tmp_path, source):
    abandoned = tmp_path / ".out.converting-dead"
    abandoned.mkdir()
    (abandoned / "model.safetensors").write_bytes(b"half")
    with writer.staged(tmp_path / "out", 0) as (alive, _):
        run(source, tmp_path / "out")
        assert alive.exists() and not abandoned.exists()


MEASURED = """
import sys
from convert_weights import convert

def memory(field):
    return int(open("/proc/self/status").read().split(field + ":")[1].split()[0]) * 1024

convert(sys.argv[1], dry_run=True)  # everything is imported
before = memory("VmRSS")
convert(sys.argv[1], sys.argv[2], verification=False, progress=False)
print(memory("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["fused", "split"])
@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
def test_memory_is_that_of_one_tensor(tmp_path, layout):
    """A file of 490 MB whose largest tensor has 134 MB."""
    dimensions = Dimensions(layers=4, hidden=1024, intermediate=2816, attention=1024, vocabulary=65536)
    names = dimensions.shapes()
    if layout == "split":
        names = {
            part: (shape[0] // len(split_names(name)), *shape[1:])
            for name, shape in names.items()
            for part in split_names(name)
        }
    specs = {name: TensorSpec(shape, torch.bfloat16) for name, shape in names.items()}
    config = published_config(
        vocab_size=65536,
        hidden_size=1024,
        intermediate_size=2816,
        num_layers_per_stack=4,
        num_hidden_layers=32,
        num_attention_heads=8,
        head_dim=128,
    )
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(config))
    file = writer.ShardWriter(source / "model.safetensors", specs)
    for name, spec in specs.items():
        file.add(name, torch.full(spec.shape, 0.5, dtype=spec.dtype))
    file.close()
    command = [sys.executable, "-c", MEASURED, str(source), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True, timeout=300)
    largest = max(spec.nbytes for spec in specs.values())
    assert int(done.stdout) < 2 * largest + 64 * 2**20


def limited(code, **environment):
    """Runs code in a process that may write files of at most 30,000 bytes."""
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, **environment},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000)),
        timeout=300,
    )


def test_a_write_that_fails_half_way(tmp_path, source):
    """The system refuses the write in the middle of the weights, as a full disk does."""
    output = tmp_path / "out"
    done = limited(
        f"import convert_weights as c; raise SystemExit(c.main([{str(source)!r}, '--output', {str(output)!r}]))"
    )
    assert done.returncode == 1
    assert f"--output {output}: model.safetensors could not be written (File too large): make room" in done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_a_disk_without_room_is_seen_before_writing(tmp_path, source, monkeypatch):
    usage = writer.shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(writer.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ConversionError, match="the disk has 1,000 bytes free"):
        run(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_output_that_cannot_be_written(tmp_path, source):
    (tmp_path / "file").write_text("")
    for output in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ConversionError, match="--output"):
            run(source, output)


@pytest.mark.parametrize(
    ("text", "size"),
    [("5GB", 5 * 10**9), ("500MB", 5 * 10**8), ("1.5KB", 1500), ("2GiB", 2**31), ("7", 7), (1000, 1000), ("3k", 3000)],
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-5GB", "0", "5XB", "many"])
def test_no_sizes(text):
    with pytest.raises(ConversionError, match="--max-shard-size"):
        parse_size(text)
