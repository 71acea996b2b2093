"""Every form of checkpoint arrives in the published layout, bit-equal."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file

from conversion.errors import ConversionError
from convert_weights import convert

from .checkpoints import (
    HIDDEN,
    LAYERS,
    REFERENCE,
    older_config,
    published_config,
    published_tensors,
    save_published,
    save_training,
    split_tensors,
    training_state,
)
from .distributed_save import save_sharded


def run(source, output, **options):
    """Converts without the reload, which has tests of its own."""
    return convert(source, output, verification=False, progress=False, **options)


def weights_of(folder):
    """All tensors of a converted folder."""
    tensors = {}
    for file in folder.glob("*.safetensors"):
        tensors.update(load_file(file))
    return tensors


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


@pytest.fixture
def tensors():
    return published_tensors()


def test_training_checkpoint_gives_averages_or_raw_weights_of_any_epoch(tmp_path):
    epochs = {n: (published_tensors(seed=n), published_tensors(seed=100 + n)) for n in (2, 10)}
    source = save_training(tmp_path / "run", epochs)
    for options, expected in (
        ({}, epochs[10][1]),
        ({"epoch": 2}, epochs[2][1]),
        ({"epoch": 2, "weights": "raw"}, epochs[2][0]),
        ({"weights": "raw"}, epochs[10][0]),
    ):
        output = tmp_path / "-".join(map(str, ["out", *options.values()]))
        run(source, output, **options)
        epoch = options.get("epoch", 10)
        # The state that never trains is stored in bfloat16 and has no average.
        expected = {**expected, "model.z_L_init": epochs[epoch][0]["model.z_L_init"].bfloat16().float()}
        assert_same(weights_of(output), expected)


def test_training_checkpoint_of_many_ranks(tmp_path):
    raw, averages = published_tensors(seed=1), published_tensors(seed=2)
    source = save_training(tmp_path / "run", {1: (raw, averages)})
    save_sharded(training_state(raw, averages), source / "fsdp2_epoch_4", ranks=2)
    assert len(list((source / "fsdp2_epoch_4").glob("*.distcp"))) == 2
    for weights, expected in (("ema", averages), ("raw", raw)):
        run(source, tmp_path / weights, weights=weights)
        expected = {**expected, "model.z_L_init": raw["model.z_L_init"].bfloat16().float()}
        assert_same(weights_of(tmp_path / weights), expected)


def test_training_config_follows_the_run(tmp_path):
    source = save_training(tmp_path / "run", {1: (published_tensors(), published_tensors())}, bp_max_steps=2)
    run(source, tmp_path / "out")
    config = config_of(tmp_path / "out")
    assert config["initializer_range"] == 1 / math.sqrt(HIDDEN)
    assert config["embedding_scale"] == pytest.approx(math.sqrt(HIDDEN), rel=1e-15)
    assert config["num_layers_per_stack"] == LAYERS and config["num_hidden_layers"] == LAYERS * 8
    assert config["rope_parameters"] == {"rope_theta": 10000.0, "rope_type": "default"}
    assert [config[f"{name}_token_id"] for name in ("bos", "eos", "pad", "prefix_end")] == [6, 11, 5, 7]
    assert config["max_position_embeddings"] == 64 and config["dtype"] == "float32"
    # One of two H calls carried gradient, which L_bp_cycles cannot say.
    assert config["L_bp_cycles"] == [0, 1] and config["bp_steps"] == 2


@pytest.mark.parametrize(
    ("bp_max_steps", "L_bp_cycles", "bp_steps"),
    [(3, [0, 1], None), (4, [0, 2], None), (5, [0, 3], None), (6, [1, 3], None), (99, [3, 3], None), (2, [0, 1], 2)],
)
def test_gradient_steps(tmp_path, bp_max_steps, L_bp_cycles, bp_steps):
    source = save_training(tmp_path / "run", {1: (published_tensors(),) * 2}, bp_max_steps=bp_max_steps)
    config = run(source, dry_run=True, output=None).plan.config
    assert config["L_bp_cycles"] == L_bp_cycles and config.get("bp_steps") == bp_steps


@pytest.mark.parametrize(
    ("arch", "expected"),
    [
        ({"init_type": "fixed_normal"}, 0.02),
        ({"init_type": "fixed_normal", "init_std": 0.1}, 0.1),
        ({"init_type": "megatron"}, 1 / math.sqrt(HIDDEN)),
        ({"init_type": "lecun_normal"}, 1 / math.sqrt(HIDDEN)),
    ],
)
def test_embedding_scale_follows_the_initialisation(tmp_path, arch, expected):
    source = save_training(tmp_path / "run", {1: (published_tensors(),) * 2}, **arch)
    config = run(source, None, dry_run=True).plan.config
    assert config["initializer_range"] == expected and config["embedding_scale"] == 1 / expected


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dialect", [published_config, older_config])
@pytest.mark.parametrize("layout", ["fused", "split"])
@pytest.mark.filterwarnings("ignore:.*counts both stacks")
def test_model_folder_in_every_dialect_and_layout(tmp_path, tensors, dialect, layout, shards):
    stored = split_tensors(tensors) if layout == "split" else tensors
    source = save_published(tmp_path / "source", stored, dialect(), shards)
    run(source, tmp_path / "out")
    assert_same(weights_of(tmp_path / "out"), tensors)
    written = config_of(tmp_path / "out")
    for field, value in published_config().items():
        assert written[field] == value, field
    assert written["prefix_end_token_id"] == 7
    assert not {"L_bp_steps", "rope_theta"} & written.keys()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dtype_survives(tmp_path, dtype):
    tensors = published_tensors(dtype=dtype)
    # A config that states another dtype does not round the weights.
    source = save_published(tmp_path / "source", tensors, published_config(dtype="float16", torch_dtype="float64"))
    run(source, tmp_path / "out")
    assert_same(weights_of(tmp_path / "out"), tensors)
    assert config_of(tmp_path / "out")["dtype"] == str(dtype).removeprefix("torch.")


def test_a_wider_tensor_among_narrow_ones_keeps_its_bits(tmp_path):
    tensors = published_tensors(dtype=torch.bfloat16)
    tensors["model.z_L_init"] = tensors["model.z_L_init"].float() + 1e-6
    source = save_published(tmp_path / "source", tensors)
    run(source, tmp_path / "out")
    assert_same(weights_of(tmp_path / "out"), tensors)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_another_dtype_is_exactly_rounded(tmp_path, tensors, dtype):
    run(save_published(tmp_path / "source", tensors), tmp_path / "out", dtype=dtype)
    assert_same(weights_of(tmp_path / "out"), {name: t.to(getattr(torch, dtype)) for name, t in tensors.items()})


@pytest.mark.parametrize("shard_size", ["1GB", "20KB"])
def test_fused_to_split_and_back(tmp_path, tensors, shard_size):
    source = save_published(tmp_path / "source", tensors)
    run(source, tmp_path / "split", layout="split", max_shard_size=shard_size)
    assert_same(weights_of(tmp_path / "split"), split_tensors(tensors))
    run(tmp_path / "split", tmp_path / "back", max_shard_size=shard_size)
    assert_same(weights_of(tmp_path / "back"), tensors)


def test_the_tensors_win_over_a_config_that_miscounts_layers(tmp_path, tensors):
    source = save_published(tmp_path / "source", tensors, older_config())
    with pytest.warns(UserWarning, match="num_hidden_layers is 4, which counts both stacks"):
        run(source, tmp_path / "out")
    assert config_of(tmp_path / "out")["num_layers_per_stack"] == LAYERS
    source = save_published(tmp_path / "other", tensors, published_config(num_layers_per_stack=7))
    with pytest.warns(UserWarning, match="num_layers_per_stack is 7"):
        run(source, tmp_path / "out-other")
    assert config_of(tmp_path / "out-other")["num_hidden_layers"] == LAYERS * 8


def test_a_consistent_folder_gives_no_warning(tmp_path, tensors, recwarn):
    run(save_published(tmp_path / "source", tensors), tmp_path / "out")
    assert not list(recwarn)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_size", 64),
        ("num_attention_heads", 4),
        ("head_dim", 8),
        ("vocab_size", 66),
        ("intermediate_size", 128),
        ("num_key_value_heads", 1),
        ("tie_word_embeddings", True),
        ("attention_bias", True),
        ("hidden_act", "gelu"),
        ("model_type", "llama"),
        ("rope_parameters", {"rope_theta": -1}),
        ("quantization_config", {"quant_method": "hqq"}),
        ("eos_token_id", 65),
        ("H_cycles", 0),
    ],
)
def test_a_config_that_contradicts_the_tensors_is_refused(tmp_path, tensors, field, value):
    source = save_published(tmp_path / "source", tensors, published_config(**{field: value}))
    named = {"rope_parameters": "rope_theta", "quantization_config": "quantized"}.get(field, field)
    with pytest.raises(ConversionError, match=named):
        run(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_prefix_end_switched_off_stays_off(tmp_path, tensors):
    source = save_published(tmp_path / "source", tensors)
    (source / "config.json").write_text(json.dumps({**published_config(), "prefix_end_token_id": None}))
    with pytest.warns(UserWarning, match="read causally"):
        run(source, tmp_path / "out")
    assert config_of(tmp_path / "out")["prefix_end_token_id"] is None


def test_fields_that_could_name_code_are_left_out(tmp_path, tensors):
    hostile = {"auto_map": {"AutoConfig": "evil/repo--config.Config"}, "custom_pipelines": {"x": {"impl": "evil.X"}}}
    run(save_published(tmp_path / "source", tensors, published_config(**hostile)), tmp_path / "out")
    written = config_of(tmp_path / "out")
    assert "evil" not in json.dumps(written)
    assert written["auto_map"]["AutoModelForCausalLM"] == "modeling_hrm_text.HrmTextForCausalLM"


def test_a_converted_folder_converts_to_itself(tmp_path, tensors):
    run(save_published(tmp_path / "source", tensors, shards=2), tmp_path / "one")
    run(tmp_path / "one", tmp_path / "two")
    names = {path.name for path in (tmp_path / "one").iterdir()}
    assert names == {path.name for path in (tmp_path / "two").iterdir()}
    for name in names - {"README.md"}:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name


def test_a_hub_id_without_a_network_gives_a_remedy(tmp_path):
    with pytest.raises(ConversionError, match="hf download sapientinc/nothing-like-this"):
        run("sapientinc/nothing-like-this", tmp_path / "out")


def test_a_snapshot_of_the_hub_cache_is_a_source(tmp_path, tensors):
    """Its files are links into a folder beside it."""
    blobs = tmp_path / "models--me--it" / "blobs"
    save_published(blobs, tensors)
    snapshot = tmp_path / "models--me--it" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    run(snapshot, tmp_path / "out")
    assert_same(weights_of(tmp_path / "out"), tensors)


def test_only_the_needed_tensors_of_a_training_checkpoint_are_read(tmp_path):
    """Damage in the optimizer's moments goes unseen, as they are none of our business."""
    raw, averages = published_tensors(seed=1), published_tensors(seed=2)
    source = save_training(tmp_path / "run", {1: (raw, averages)})
    import torch.distributed.checkpoint as dcp

    folder = source / "fsdp2_epoch_1"
    metadata = dcp.FileSystemReader(folder).read_metadata()
    content = bytearray((folder / "__0_0.distcp").read_bytes())
    touched = 0
    for key, info in metadata.storage_data.items():
        if key.fqn.endswith("exp_avg"):
            content[info.offset : info.offset + info.length] = b"\xff" * info.length
            touched += 1
    assert touched == len(averages) - 1
    (folder / "__0_0.distcp").write_bytes(content)
    run(source, tmp_path / "out")
    run(source, tmp_path / "out-raw", weights="raw")
    assert torch.equal(weights_of(tmp_path / "out")["lm_head.weight"], averages["lm_head.weight"])


def test_the_reference_checkpoint_has_the_averages_of_the_stock_reader(tmp_path):
    """The restricted reader and torch's own see the same tensors."""
    import torch.distributed.checkpoint as dcp

    folder = REFERENCE / "checkpoint" / "fsdp2_epoch_1"
    metadata = dcp.FileSystemReader(folder).read_metadata()
    run(REFERENCE / "checkpoint", tmp_path / "out")
    run(REFERENCE / "checkpoint", tmp_path / "raw", weights="raw")
    found, raw = weights_of(tmp_path / "out"), weights_of(tmp_path / "raw")
    compared = 0
    for key, entry in metadata.state_dict_metadata.items():
        average = key.startswith("optim.state.") and key.endswith(".param_ema")
        if not average and not key.startswith("model."):
            continue
        stock = {key: torch.empty(entry.size, dtype=entry.properties.dtype)}
        dcp.load(stock, checkpoint_id=folder, no_dist=True)
        name = key.removeprefix("optim.state.").removesuffix(".param_ema") if average else key.removeprefix("model.")
        name = name.replace("embed_tokens.embedding_weight", "model.embed_tokens.weight")
        name = name.replace("zL_init", "z_L_init").replace("_level.core", "_module")
        assert torch.equal((found if average else raw)[name], stock[key].float()), name
        compared += 1
    assert compared == 2 * len(found) - 1


def test_float64_is_kept(tmp_path):
    tensors = published_tensors(dtype=torch.float64)
    run(save_published(tmp_path / "source", tensors), tmp_path / "out")
    assert_same(weights_of(tmp_path / "out"), tensors)
