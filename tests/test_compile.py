"""`torch.compile` of one layer serves every layer call and every step."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import CompileConfig, StaticCache

from .one_answer_models import one_answer_model
from .tiny import load_class, tiny_model


IDS = torch.tensor([[6, 20, 31, 42, 7], [6, 9, 55, 60, 7]])
TYPES = torch.ones_like(IDS)
GREEDY = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True, "max_new_tokens": 6}


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Graphs:
    """A backend that collects the graphs it is given, and runs them as they are."""

    def __init__(self):
        self.graphs = []

    def __call__(self, graph, inputs):
        self.graphs.append(graph)
        return graph.forward

    def __deepcopy__(self, memo):
        # `CompileConfig.to_dict` copies its values.
        return self


def compiled_generate(model, **more):
    config = CompileConfig(fullgraph=True, dynamic=False, mode="reduce-overhead")
    for name, value in more.items():
        setattr(config, name, value)
    config._compile_all_devices = True
    return model.generate(
        IDS, token_type_ids=TYPES, cache_implementation="static", compile_config=config, eos_token_id=None, **GREEDY
    )


def test_one_graph_serves_all_layers_slots_and_steps():
    model = tiny_model()
    wanted = model.generate(IDS, token_type_ids=TYPES, eos_token_id=None, **GREEDY)
    backend = Graphs()
    got = compiled_generate(model, backend=backend)
    # 2 layers, 2 stacks, 32 attention calls, 5 steps.
    assert len(backend.graphs) == 1
    assert torch.equal(got.sequences, wanted.sequences)
    for left, right in zip(got.logits, wanted.logits):
        assert torch.allclose(left, right, atol=1e-4)


def test_compilation_ends_with_the_call():
    model = one_answer_model()
    compiled_generate(model, backend="eager")
    # By this, transformers' own tests tell that `generate` has compiled.
    assert callable(model._compiled_call)
    assert not load_class("inference_hrm_text.compiles_layers")()
    torch._dynamo.reset()
    counters.clear()
    cache = StaticCache(config=model.config, max_cache_len=16)
    with torch.no_grad():
        model(IDS, token_type_ids=TYPES, past_key_values=cache)
        model(IDS[:, :1], past_key_values=cache)
    assert counters["stats"]["unique_graphs"] == 0


def test_the_prefill_is_not_compiled():
    model = one_answer_model()
    backend = Graphs()
    compiled_generate(model, backend=backend)
    inputs = [node for graph in backend.graphs for node in graph.graph.nodes if node.op == "placeholder"]
    shapes = [tuple(node.meta["example_value"].shape) for node in inputs if "example_value" in node.meta]
    assert (2, 1, model.config.hidden_size) in shapes
    assert (2, 5, model.config.hidden_size) not in shapes


def test_options_of_a_backend_choose_one_compiled_layer():
    model = one_answer_model()
    compiling_layers = load_class("inference_hrm_text.compiling_layers")
    compiled_layer = load_class("inference_hrm_text.compiled_layer")
    cache, layer = StaticCache(config=model.config, max_cache_len=16), model.model.L_module.layers[0]
    assert compiled_layer(layer, cache) is None
    made = []
    for size in (1, 2, 1):
        with compiling_layers({"dynamic": False, "options": {"max_autotune": False, "aggressive_fusion": size > 1}}):
            made.append(compiled_layer(layer, cache))
    assert callable(made[0]) and made[0] is made[2] and made[0] is not made[1]


@pytest.mark.slow
def test_inductor_gives_the_same_tokens():
    model = one_answer_model()
    wanted = model.generate(IDS, token_type_ids=TYPES, eos_token_id=None, **GREEDY)
    got = compiled_generate(model)
    assert torch.equal(got.sequences, wanted.sequences)
    for left, right in zip(got.logits, wanted.logits):
        assert torch.allclose(left, right, atol=1e-4)
