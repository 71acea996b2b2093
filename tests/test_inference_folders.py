"""Folders in the compressed-tensors format after `optimize_for_inference`: the folder's own answer, and undoing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from .tiny import ROOT


pytest.importorskip("compressed_tensors")

IDS = torch.tensor([[6, 20, 31, 42, 7, 33, 50], [6, 9, 55, 60, 7, 71, 80]])
TYPES = torch.tensor([[1, 1, 1, 1, 1, 0, 0]] * 2)
TOKEN = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
# Rounded inputs near the middle between two steps may fall to either side.
SCHEMES = {"w8a8": (8, None, 0.05), "w8a16": (8, None, 1e-3), "w4a16": (4, 32, 1e-5)}


def write_folder(folder: Path, scheme: str) -> Path:
    """Nano with its projections rounded to nearest, as int-quantized or pack-quantized tensors."""
    bits, group, _ = SCHEMES[scheme]
    shutil.copytree(ROOT, folder, ignore=lambda at, names: [n for n in names if "." not in n or n.startswith(".")])
    tensors = load_file(ROOT / "model.safetensors")
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        weight = tensors.pop(name).float()
        parts = weight.view(len(weight), -1, group or weight.shape[1])
        top = 2 ** (bits - 1) - 1
        scale = parts.abs().amax(dim=-1) / (top + 0.5)
        values = (parts / scale[..., None]).round().clamp(-top - 1, top).int().view(weight.shape)
        stem = name.removesuffix("weight")
        tensors[stem + "weight_scale"] = scale
        if scheme == "w8a8":
            tensors[stem + "weight"] = values.to(torch.int8)
            continue
        fields = (values + top + 1).view(len(values), -1, 32 // bits)
        tensors[stem + "weight_packed"] = sum(fields[..., i] << (bits * i) for i in range(32 // bits)).int()
        tensors[stem + "weight_shape"] = torch.tensor(weight.shape)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    strategy = "group" if group else "channel"
    weights = {"num_bits": bits, "type": "int", "symmetric": True, "strategy": strategy, "group_size": group}
    form = "int-quantized" if scheme == "w8a8" else "pack-quantized"
    targets = {"targets": ["re:.*_proj$"], "weights": weights, "format": form}
    targets["input_activations"] = TOKEN if scheme == "w8a8" else None
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": form,
        "config_groups": {"group_0": targets},
        "ignore": ["lm_head"],
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module", params=SCHEMES)
def folder(request, tmp_path_factory):
    return request.param, write_folder(tmp_path_factory.mktemp("folders") / request.param, request.param)


def load(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(IDS, token_type_ids=TYPES).logits


def adopted(model) -> list:
    return [module for module in model.modules() if type(module).__name__ == "AdoptedLinear"]


@pytest.mark.parametrize("used", [False, True])
def test_the_answer_is_that_of_the_folder(folder, used):
    """Before and after the library has unpacked its weights."""
    scheme, path = folder
    wanted = logits(load(path))
    model = load(path)
    if used:
        logits(model)
    model.optimize_for_inference()
    assert len(adopted(model)) == 16 and model.is_optimized_for_inference
    got = logits(model)
    assert ((got - wanted).norm() / wanted.norm()) < SCHEMES[scheme][2]
    with model.use_fast_kernels(False):
        assert ((logits(model) - wanted).norm() / wanted.norm()) < SCHEMES[scheme][2]
    model.undo_inference_optimization()
    assert not adopted(model)
    assert torch.equal(logits(model), wanted)


def test_undoing_gives_back_the_tensors_of_the_folder(folder):
    _, path = folder
    stored = load_file(path / "model.safetensors")
    model = load(path).optimize_for_inference()
    kept = dict(model.named_parameters())
    state = model.state_dict()
    assert not adopted(model)
    for name, value in state.items():
        assert name not in kept or kept[name] is dict(model.named_parameters())[name]
        if name.endswith(("weight_packed", "_proj.weight", "weight_scale")):
            assert torch.equal(value, stored[name]), name


def test_large_tensors_are_freed(folder):
    model = load(folder[1]).optimize_for_inference()
    for module in adopted(model):
        name = module._adopted[1]
        assert module._parameters[name].untyped_storage().nbytes() <= 8


def test_rows_answer_alone_as_together(folder):
    model = load(folder[1]).optimize_for_inference()
    with torch.no_grad():
        alone = torch.cat([model(IDS[i : i + 1], token_type_ids=TYPES[i : i + 1]).logits for i in range(2)])
    assert ((alone - logits(model)).norm() / alone.norm()) < SCHEMES[folder[0]][2]


def test_decoding_with_compiled_layers(folder):
    scheme, path = folder
    model = load(path).to(torch.bfloat16)
    with torch.no_grad():
        wanted = model(IDS[:1], token_type_ids=TYPES[:1]).logits[:, 5:]
        model.optimize_for_inference(compile_layers=True)
        assert len(adopted(model)) == 16 and model.compiles_decoding
        cache = model(IDS[:1, :5], token_type_ids=TYPES[:1, :5], use_cache=True).past_key_values
        steps = [
            model(IDS[:1, i : i + 1], past_key_values=cache, use_cache=True).logits for i in range(5, IDS.shape[1])
        ]
    assert (torch.cat(steps, dim=1) - wanted).norm() / wanted.norm() < max(SCHEMES[scheme][2], 3e-2)
    model.undo_inference_optimization()
    assert not adopted(model) and not model.compiles_decoding
