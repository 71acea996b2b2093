"""`torch.onnx.export` of every form of a call, run by onnxruntime beside the model."""

from __future__ import annotations

import pytest
import torch

from .facts import END
from .one_answer_models import shallow_model


pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")

IDS = torch.tensor([[6, 30, 31, END, 40, 41, 11], [5, 5, 6, 32, END, 42, 43]])
MASK = torch.tensor([[1] * 7, [0, 0, 1, 1, 1, 1, 1]])
TYPES = torch.tensor([[1, 1, 1, 1, 0, 0, 0], [0, 0, 1, 1, 1, 0, 0]])
POSITIONS = torch.tensor([[0, 1, 2, 3, 4, 5, 6], [0, 0, 0, 1, 2, 3, 4]])
FORMS = {
    "ids": {"input_ids": IDS},
    "ids and mask": {"input_ids": IDS, "attention_mask": MASK},
    "ids, mask and types": {"input_ids": IDS, "attention_mask": MASK, "token_type_ids": TYPES},
    "ids, mask, types and positions": {
        "input_ids": IDS,
        "attention_mask": MASK,
        "token_type_ids": TYPES,
        "position_ids": POSITIONS,
    },
}


class Logits(torch.nn.Module):
    def __init__(self, model: torch.nn.Module, names: list[str]):
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
        return self.model(**dict(zip(self.names, tensors)), use_cache=False).logits


def other_inputs(form: str) -> dict[str, torch.Tensor]:
    """Another layout of the same shape, so that nothing of the traced one can have been baked in."""
    return {name: tensor.flip(0).contiguous() for name, tensor in FORMS[form].items()}


@pytest.mark.slow
@pytest.mark.parametrize("infers", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_export(form, infers, tmp_path):
    model = shallow_model(prefix_end_token_id=END if infers else None)
    inputs = FORMS[form]
    path = tmp_path / "model.onnx"
    torch.onnx.export(Logits(model, list(inputs)), tuple(inputs.values()), str(path), dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for example in (inputs, other_inputs(form)):
        with torch.no_grad():
            wanted = model(**example, use_cache=False).logits
        names = [entry.name for entry in session.get_inputs()]
        assert len(names) == len(example)
        got = torch.from_numpy(session.run(None, dict(zip(names, (t.numpy() for t in example.values()))))[0])
        real = example.get("attention_mask", torch.ones_like(IDS)) != 0
        torch.testing.assert_close(got[real], wanted[real], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_what_onnx_cannot_say_is_not_in_the_graph(form):
    """The operators without an ONNX form, found without the exporter's minute of work."""
    model = shallow_model(prefix_end_token_id=END)
    inputs = FORMS[form]
    program = torch.export.export(Logits(model, list(inputs)), tuple(inputs.values()), strict=False)
    used = {str(node.target).split(".")[1] for node in program.graph.nodes if str(node.target).startswith("aten.")}
    assert not used & {"cummax", "cummin"}
    with torch.no_grad():
        for example in (inputs, other_inputs(form)):
            real = example.get("attention_mask", torch.ones_like(IDS)) != 0
            got, wanted = program.module()(*example.values()), model(**example, use_cache=False).logits
            torch.testing.assert_close(got[real], wanted[real], atol=1e-4, rtol=1e-4)
