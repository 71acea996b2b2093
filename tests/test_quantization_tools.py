"""What quantizers do to a model: they keep what a layer is called with, call it again, and trace what lies between.

`llmcompressor` itself is tried where it is installed; it asks for releases of transformers of its own.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch

from .harness import CAUSAL, CONVERSATION, MIXED, ONE_BLOCK, PREFIX_AND_RESPONSE, padded
from .tiny import ROOT, load_class, tiny_model


LAYOUTS = {
    "block": ONE_BLOCK,
    "conversation": CONVERSATION,
    "prefix and response": PREFIX_AND_RESPONSE,
    "causal": CAUSAL,
    "mixed": MIXED,
}


def listen(layer: Any, calls: list[dict[str, Any]]) -> None:
    """Puts a function in the place of `forward` that keeps what AutoRound keeps: tensors, tuples, lists and None."""
    stock = layer.forward

    def kept(hidden_states: torch.Tensor, **arguments: Any) -> torch.Tensor:
        plain = {k: v for k, v in arguments.items() if isinstance(v, (torch.Tensor, tuple, list, type(None)))}
        calls.append({"hidden_states": hidden_states.clone(), **plain})
        output = stock(hidden_states, **arguments)
        calls[-1]["output"] = output.clone()
        return output

    layer.forward = kept


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layer_answers_what_was_kept(layout, implementation):
    """Called again with it the output is the same; and the listening changes no logit."""
    model = tiny_model(attn_implementation=implementation)
    batch = padded(LAYOUTS[layout], "right")
    calls: list[dict[str, Any]] = []
    layer = model.model.L_module.layers[1]
    with torch.no_grad():
        wanted = model(**batch).logits
        listen(layer, calls)
        model(**batch)  # with a cache
        assert not any(call.get("attention_mask") is not None for call in calls)
        calls.clear()
        logits = model(**batch, use_cache=False).logits
        del layer.forward
        assert len(calls) == model.config.H_cycles * model.config.L_cycles
        for call in calls:
            output = call.pop("output")
            torch.testing.assert_close(layer(**call), output, atol=1e-6, rtol=0)
    torch.testing.assert_close(logits, wanted, atol=1e-5, rtol=0)
    assert calls[0]["attention_mask"].shape == (len(LAYOUTS[layout]), 1, *batch["input_ids"].shape[1:] * 2)


def test_gradients_reach_the_layers_that_are_listened_to():
    model = tiny_model()
    batch = padded(MIXED, "right")
    grads = []
    for tool in (False, True):
        model.zero_grad()
        if tool:
            listen(model.model.H_module.layers[0], [])
        model(**batch, use_cache=False).logits.square().mean().backward()
        grads.append(model.model.H_module.layers[0].mlp.down_proj.weight.grad.clone())
    torch.testing.assert_close(*grads, atol=1e-6, rtol=1e-4)


class Tracer(torch.fx.Tracer):
    """Looks into no layer."""

    def is_leaf_module(self, module: torch.nn.Module, name: str) -> bool:
        return not type(module).__name__.endswith(("ForCausalLM", "HrmTextModel", "HrmTextStack"))


def traced(model: Any, **inputs: Any) -> torch.fx.Graph:
    """The graph of the forward pass, traced as llm-compressor traces: the flag says that a model is being compiled."""
    forward = inspect.unwrap(type(model).forward)
    given = {name: parameter.default for name, parameter in inspect.signature(forward).parameters.items()}
    given = {name: value for name, value in given.items() if name not in ("self", "kwargs", *inputs)}
    with patch.object(torch.compiler, "_is_compiling_flag", True), patch.object(type(model), "forward", forward):
        return Tracer().trace(model, concrete_args={**given, "kwargs": {}})


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_traced_pass_answers_the_same(layout):
    """Also for other tokens, blocks and lengths than it was traced with: nothing was read while tracing."""
    model = tiny_model(attn_implementation="eager")
    names = ("input_ids", "attention_mask", "token_type_ids")
    graph = traced(model, **dict.fromkeys(names))
    calls = [str(node.target) for node in graph.nodes if node.op == "call_module"]
    assert len(calls) == model.config.num_hidden_layers + 1
    assert calls[:2] == ["model.L_module.layers.0", "model.L_module.layers.1"]
    run: Callable[..., Any] = torch.fx.GraphModule(model, graph)
    batch = padded(LAYOUTS[layout], "right")
    with torch.no_grad():
        wanted = model(**batch, use_cache=False).logits
        torch.testing.assert_close(run(**batch)["logits"], wanted, atol=1e-5, rtol=0)


def test_flash_and_flex_have_no_mask_to_hand_out():
    plan = load_class("attention_hrm_text.AttentionPlan")("flash", flash=object())
    with pytest.raises(ValueError, match="set_attn_implementation"):
        plan.whole_mask(1, 4, torch.device("cpu"))


@pytest.mark.slow
def test_gptq_of_llm_compressor(tmp_path):
    reason = "it needs an environment of its own: `pip install llmcompressor`, whose transformers is an older one"
    llmcompressor = pytest.importorskip("llmcompressor", reason=reason)
    from datasets import Dataset
    from llmcompressor.modifiers.gptq import GPTQModifier
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from training.data import encode_rows, read_rows

    tokenizer = AutoTokenizer.from_pretrained(ROOT, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(ROOT, trust_remote_code=True)
    examples, _ = encode_rows(read_rows(ROOT / "tests" / "fixtures" / "rows.jsonl"), tokenizer, 256)
    columns = ("input_ids", "token_type_ids")
    rows = [{**{name: example[name] for name in columns}} for example in examples]
    data = Dataset.from_list([{**row, "attention_mask": [1] * len(row["input_ids"])} for row in rows])
    recipe = [GPTQModifier(targets=["re:.*_proj$"], scheme="W4A16", ignore=["lm_head"])]
    llmcompressor.oneshot(
        model=model,
        dataset=data,
        processor=tokenizer,
        recipe=recipe,
        max_seq_length=256,
        num_calibration_samples=16,
        output_dir=str(tmp_path / "out"),
    )
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True).eval()
    plain = AutoModelForCausalLM.from_pretrained(ROOT, trust_remote_code=True).eval()
    row = {name: torch.tensor([rows[0][name]]) for name in columns}
    with torch.no_grad():
        p, q = (each(**row).logits.log_softmax(-1) for each in (plain, reloaded))
    assert 0 < (p.exp() * (p - q)).sum(-1).mean() < 1.0
