"""Graphs that transformers exports give the model's own logits: prefix blocks, padding, other shapes than traced."""

from __future__ import annotations

import importlib

import pytest
import torch

from .tiny import tiny_model


dynamo = pytest.importorskip("transformers.exporters.exporter_dynamo", reason="this transformers has no exporters")


def inputs(rows: int, tokens: int, block: int, padding: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(12, 96, (rows, tokens))
    mask, types = torch.ones_like(ids), torch.zeros_like(ids)
    mask[0, :padding] = 0
    types[:, :block] = 1
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": types, "use_cache": False}


def check(exporter, config, dynamic: bool, tolerance: float) -> None:
    model = tiny_model(num_layers_per_stack=1, H_cycles=1, L_cycles=2)
    traced, other = inputs(2, 9, 5, 2), inputs(3, 13, 4, 3)
    exported = exporter().export(model, traced, config=config(dynamic=dynamic))
    again = inputs(2, 9, 7, 1)
    for example in [traced, again] + ([other] if dynamic else []):
        with torch.no_grad():
            expected = model(**example).logits
        seen = {name: value for name, value in example.items() if name != "use_cache"}
        got = torch.as_tensor(exported(**seen).logits)
        real = example["attention_mask"].bool()
        torch.testing.assert_close(got[real], expected[real], atol=tolerance, rtol=0)


@pytest.mark.parametrize("dynamic", [False, True])
def test_torch_export(dynamic):
    check(dynamo.DynamoExporter, dynamo.DynamoConfig, dynamic, tolerance=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, True])
def test_onnx(dynamic):
    for package in ("onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    onnx = importlib.import_module("transformers.exporters.exporter_onnx")
    check(onnx.OnnxExporter, onnx.OnnxConfig, dynamic, tolerance=1e-4)
