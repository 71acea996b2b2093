"""Small checkpoints of every form that the converter reads, made as the programs that write them do."""

import json
import math
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
import yaml
from safetensors.torch import save_file

from conversion.errors import ConversionError
from convert_weights import convert


REFERENCE = Path(__file__).parent / "fixtures" / "reference"
# An odd vocabulary, so that ranks hold unequal parts.
LAYERS, HIDDEN, HEADS, INTERMEDIATE, VOCABULARY = 2, 32, 2, 256, 65


def published_tensors(seed: int = 0, dtype: torch.dtype = torch.float32, layers: int = LAYERS) -> dict:
    """Random weights by their published names."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) / math.sqrt(HIDDEN)).to(dtype)

    tensors = {
        "model.embed_tokens.weight": random(VOCABULARY, HIDDEN),
        "model.z_L_init": random(HIDDEN) * 6,
        "lm_head.weight": random(VOCABULARY, HIDDEN),
    }
    for stack in "HL":
        for layer in range(layers):
            prefix = f"model.{stack}_module.layers.{layer}."
            tensors[prefix + "attn.gqkv_proj.weight"] = random(4 * HIDDEN, HIDDEN)
            tensors[prefix + "attn.o_proj.weight"] = random(HIDDEN, HIDDEN)
            tensors[prefix + "mlp.gate_up_proj.weight"] = random(2 * INTERMEDIATE, HIDDEN)
            tensors[prefix + "mlp.down_proj.weight"] = random(HIDDEN, INTERMEDIATE)
    return tensors


def published_config(**changes) -> dict:
    """A config in the published dialect; a field changed to None is left out."""
    config = {
        "model_type": "hrm_text",
        "architectures": ["HrmTextForCausalLM"],
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": LAYERS * 8,
        "num_layers_per_stack": LAYERS,
        "num_attention_heads": HEADS,
        "head_dim": HIDDEN // HEADS,
        "H_cycles": 2,
        "L_cycles": 3,
        "L_bp_cycles": [0, 3],
        "embedding_scale": math.sqrt(HIDDEN),
        "initializer_range": 1 / math.sqrt(HIDDEN),
        "prefix_lm": True,
        "rope_parameters": {"rope_theta": 5000.0, "rope_type": "default"},
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 128,
        "tie_word_embeddings": False,
        "bos_token_id": 6,
        "eos_token_id": 11,
        "pad_token_id": 5,
        "dtype": "float32",
        **changes,
    }
    return {key: value for key, value in config.items() if value is not None}


def older_config(**changes) -> dict:
    """The same model in the dialect of the training repository's exporter, which counts the layers of both stacks."""
    return published_config(
        num_layers_per_stack=None,
        num_hidden_layers=2 * LAYERS,
        L_bp_cycles=None,
        L_bp_steps=[0, 3],
        rope_parameters=None,
        rope_theta=5000.0,
        num_key_value_heads=HEADS,
        dtype=None,
        **changes,
    )


def split_tensors(tensors: dict) -> dict:
    """Published weights under the names of transformers' own class."""
    parts = {
        "attn.gqkv_proj": [f"self_attn.{name}_proj" for name in ("gate", "q", "k", "v")],
        "attn.o_proj": ["self_attn.o_proj"],
        "mlp.gate_up_proj": ["mlp.gate_proj", "mlp.up_proj"],
    }
    result = {}
    for name, tensor in tensors.items():
        fused = next((key for key in parts if key in name), None)
        targets = [name.replace(fused, part) for part in parts[fused]] if fused else [name]
        result.update(zip(targets, (part.clone() for part in tensor.chunk(len(targets))), strict=True))
    return result


def save_published(folder: Path, tensors: dict | None = None, config: dict | None = None, shards: int = 1) -> Path:
    """A Hugging Face folder, with an index where there are several shards."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = published_tensors() if tensors is None else tensors
    (folder / "config.json").write_text(json.dumps(published_config() if config is None else config))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    names, weight_map = list(tensors), {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        save_file({name: tensors[name] for name in names[shard::shards]}, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(names[shard::shards], file))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def training_names(name: str) -> str:
    """The training code's name of a published tensor."""
    names = {
        "model.embed_tokens.weight": "embed_tokens.embedding_weight",
        "model.z_L_init": "model.zL_init",
    }
    return names.get(name, name.replace("_module.layers", "_level.core.layers"))


def training_state(raw: dict, averages: dict) -> dict:
    """The state that the training code hands to torch.distributed.checkpoint."""
    model = {training_names(name): tensor for name, tensor in raw.items()}
    model["model.zL_init"] = model["model.zL_init"].to(torch.bfloat16)
    state = {
        training_names(name): {
            "step": torch.tensor(2.0),
            "exp_avg": torch.zeros_like(tensor),
            "param_ema": tensor,
        }
        for name, tensor in averages.items()
        if name != "model.z_L_init"
    }
    return {"model": model, "optim": {"state": state, "param_groups": [{"lr": 0.1, "betas": (0.9, 0.95)}]}}


def save_training(folder: Path, epochs: dict[int, tuple[dict, dict]], **arch) -> Path:
    """A training checkpoint of one rank: for each epoch, raw weights and averages by published names."""
    save_training_settings(folder, **arch)
    for epoch, (raw, averages) in epochs.items():
        dcp.save(training_state(raw, averages), checkpoint_id=folder / f"fsdp2_epoch_{epoch}", no_dist=True)
    return folder


def save_training_settings(folder: Path, **arch) -> None:
    """The two YAML files of a training checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = yaml.safe_load((REFERENCE / "checkpoint" / "all_config.yaml").read_text())
    settings["arch"].update({"hidden_size": HIDDEN, "num_heads": HEADS, "n_layers": 2 * LAYERS, **arch})
    metadata = yaml.safe_load((REFERENCE / "checkpoint" / "train_metadata.yaml").read_text())
    metadata["vocab_size"] = VOCABULARY
    (folder / "all_config.yaml").write_text(yaml.dump(settings))
    (folder / "train_metadata.yaml").write_text(yaml.dump(metadata))


def assert_refused(source: Path, match: str, **options) -> None:
    """A conversion fails with one line that matches, and leaves nothing behind."""
    before = sorted(source.parent.rglob("*"))
    with pytest.raises(ConversionError, match=match) as caught:
        convert(source, source.parent / "output", verification=False, progress=False, **options)
    assert "\n" not in str(caught.value)
    assert sorted(source.parent.rglob("*")) == before
