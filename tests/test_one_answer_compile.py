"""Compiled and exported: the same answer, without a graph break, and one graph for all decoding steps."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import StaticCache
from transformers.generation.configuration_utils import CompileConfig

from .harness import (
    CAPACITY,
    CONVERSATION,
    MIXED,
    RAGGED,
    deviation,
    generated,
    is_greedy,
    padded,
    reference_logits,
    static,
    unpadded,
)
from .one_answer_models import shallow_model


ROW = CONVERSATION[0]
WHOLE = ROW.followed_by(range(30, 36))


@pytest.fixture(scope="module")
def model():
    return shallow_model()


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def tensors(row, begin: int, end: int) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.tensor([row.ids[begin:end]]), "token_type_ids": torch.tensor([row.types[begin:end]])}


def check_forward(model, backend: str) -> None:
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(model.forward, fullgraph=True, dynamic=False, backend=counter)
    batch = padded(MIXED)
    answers = unpadded(MIXED, compiled(**batch, use_cache=False).logits, batch["attention_mask"])
    assert deviation(model, answers) < 2e-3
    assert counter.frame_count == 1

    expected, live = reference_logits(model, WHOLE), static(model)
    prompt = len(ROW)
    logits = compiled(**tensors(WHOLE, 0, prompt), past_key_values=live, use_cache=True).logits[0]
    torch.testing.assert_close(logits, expected[:prompt], atol=2e-3, rtol=2e-3)
    assert counter.frame_count == 2
    for i in range(prompt, len(WHOLE)):
        logits = compiled(**tensors(WHOLE, i, i + 1), past_key_values=live, use_cache=True).logits[0]
        torch.testing.assert_close(logits, expected[i : i + 1], atol=2e-3, rtol=2e-3)
        assert counter.frame_count == 3, "one graph serves every decoding step"


@torch.no_grad()
def test_compiled_forward(model):
    check_forward(model, "eager")


@pytest.mark.slow
@torch.no_grad()
def test_compiled_forward_inductor(model):
    check_forward(model, "inductor")


@pytest.mark.parametrize("rows", [CONVERSATION, RAGGED], ids=["one row", "ragged batch"])
def test_compiled_generate(rows, monkeypatch):
    model, counter = shallow_model(), CompileCounterWithBackend("eager")
    compiled = torch.compile(model.__call__, fullgraph=True, dynamic=False, backend=counter)
    monkeypatch.setattr(model, "get_compiled_call", lambda config: compiled)
    config = CompileConfig()
    config._compile_all_devices = True
    options = {"cache_implementation": "static", "compile_config": config, "max_new_tokens": 6}
    answers = generated(model, rows, **options)
    assert deviation(model, answers) < 2e-3 and is_greedy(model, answers)
    assert counter.frame_count == 1, "one graph serves every decoding step"


@pytest.mark.slow
def test_compiled_generate_inductor():
    model = shallow_model()
    config = CompileConfig(fullgraph=True, mode="default")
    config._compile_all_devices = True
    answers = generated(model, RAGGED, cache_implementation="static", compile_config=config, max_new_tokens=6)
    assert deviation(model, answers) < 2e-3 and is_greedy(model, answers)


class OnStaticCache(torch.nn.Module):
    """A model with its static cache, whose tensors are buffers, as exporting asks for."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.cache = StaticCache(config=model.config, max_cache_len=CAPACITY)
        config = model.config
        self.cache.early_initialization(
            1, config.num_attention_heads, config.head_dim, torch.float32, torch.device("cpu")
        )
        for i, layer in enumerate(self.cache.layers):
            for name in ("keys", "values", "cumulative_length"):
                if isinstance(getattr(layer, name, None), torch.Tensor):
                    self.register_buffer(f"cache_{name}_{i}", getattr(layer, name), persistent=False)

    def forward(self, input_ids, token_type_ids, cache_position):
        return self.model(
            input_ids=input_ids,
            token_type_ids=token_type_ids,
            position_ids=cache_position[None],
            cache_position=cache_position,
            past_key_values=self.cache,
            use_cache=True,
        ).logits


@torch.no_grad()
def test_exported_prefill_and_decode(model):
    prompt, expected = len(ROW), reference_logits(model, WHOLE)

    def arguments(begin: int, end: int) -> tuple[torch.Tensor, ...]:
        return (*tensors(WHOLE, begin, end).values(), torch.arange(begin, end))

    prefill = torch.export.export(OnStaticCache(model), arguments(0, prompt), strict=False).module()
    decode = torch.export.export(OnStaticCache(model), arguments(prompt, prompt + 1), strict=False).module()
    for name, buffer in prefill.named_buffers():
        if name.startswith("cache_"):
            # Tracing has counted the tokens of its example.
            buffer.zero_()
    torch.testing.assert_close(prefill(*arguments(0, prompt))[0], expected[:prompt], atol=2e-3, rtol=2e-3)
    filled = dict(prefill.named_buffers())
    for name, buffer in decode.named_buffers():
        if name.startswith("cache_"):
            buffer.copy_(filled[name])
    for i in range(prompt, len(WHOLE)):
        logits = decode(*arguments(i, i + 1))[0]
        torch.testing.assert_close(logits, expected[i : i + 1], atol=2e-3, rtol=2e-3)
