"""Folders whose matrices are in 8 or 4 bits, as compressed-tensors and as the converter write them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from convert_weights import convert
from serving.measure.engine import ROOT
from serving.measure.material import Reference, generate, worst_difference


FORMAT = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False},
            "input_activations": {
                "num_bits": 8,
                "type": "int",
                "symmetric": True,
                "strategy": "token",
                "dynamic": True,
            },
        }
    },
}


def quantize(folder: Path) -> None:
    """Writes Nano to a folder, its layers' matrices in 8 bits with a scale for each row."""
    for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(ROOT / name, folder / name)
    config = json.loads((ROOT / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": FORMAT}))
    tensors = {}
    for name, weight in load_file(ROOT / "model.safetensors").items():
        if "_proj." in name:
            scale = weight.abs().amax(1, keepdim=True) / 127
            tensors[name] = (weight / scale).round().to(torch.int8)
            tensors[name + "_scale"] = scale
        else:
            tensors[name] = weight
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_eight_bits(reference: Reference, chats: list[list[int]], serve: Any, tmp_path: Path) -> None:
    """It loads, and answers nearly as in float32: the activations are in 8 bits too."""
    quantize(tmp_path)
    with serve(tmp_path) as llm:
        results = generate(llm, chats[:20])
    expected = reference.answers([list(result.prompt_token_ids) for result in results], 48)
    same = [list(result.outputs[0].token_ids) == answer for result, answer in zip(results, expected)]
    assert sum(same) >= 15
    assert 1e-4 < worst_difference(reference, results) < 1.5


@pytest.mark.parametrize(("scheme", "dtype"), [("w8a8", "float32"), ("w4a16", "bfloat16")])
def test_folders_of_the_converter(chats: list[list[int]], serve: Any, tmp_path: Path, scheme: str, dtype: str) -> None:
    """They load, their embeddings and head quantized too, and answer nearly as the port answers from them."""
    convert(ROOT, tmp_path / "out", quantize=scheme, verification=False, progress=False)
    port = Reference(tmp_path / "out")
    with serve(tmp_path / "out", dtype=dtype) as llm:
        results = generate(llm, chats[:20])
    expected = port.answers([list(result.prompt_token_ids) for result in results], 48)
    same = [list(result.outputs[0].token_ids) == answer for result, answer in zip(results, expected)]
    assert sum(same) >= 17
    assert 1e-4 < worst_difference(port, results) < 0.8
