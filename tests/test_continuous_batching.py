"""Continuous batching is refused by what it really passes, and nothing else is taken for it.

The calls are those of the scheduler of the library, recorded while it serves a small model of another architecture.
What it passes has changed from release to release; the version matrix runs this on each.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import threading
from typing import Any

import pytest
import torch
from transformers import DynamicCache, GenerationConfig, LlamaConfig, LlamaForCausalLM

from .one_answer_models import one_answer_model


PAGES = {"num_blocks": 16, "max_batch_tokens": 32}


@pytest.fixture
def memory_is_known(monkeypatch):
    """Before 5.9 the scheduler knows no memory on a CPU and divides None by a number; it is told of some."""
    package = importlib.import_module("transformers.generation.continuous_batching")
    for module in pkgutil.iter_modules(package.__path__):
        if module.name in ("cache", "continuous_api"):
            home = importlib.import_module(f"{package.__name__}.{module.name}")
            known = getattr(home, "get_device_and_memory_breakdown", None)
            if known is not None and known()[1] is None:
                monkeypatch.setattr(
                    home, "get_device_and_memory_breakdown", lambda: (torch.device("cpu"), 2**30, 0, 0)
                )


@pytest.fixture
def paged_call(memory_is_known) -> dict[str, Any]:
    """The arguments of the first forward call that the library's `generate_batch` makes of a small Llama."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=96, pad_token_id=0, bos_token_id=1, **sizes)).eval()
    calls: list[dict[str, Any]] = []
    forward = llama.forward

    def recorded(*arguments: Any, **named: Any) -> Any:
        names = list(inspect.signature(forward).parameters)
        calls.append({**dict(zip(names, arguments)), **named})
        return forward(*arguments, **named)

    llama.forward = recorded
    # Releases differ in where they are told the size of their pages; a warm-up only repeats the call.
    settings = GenerationConfig(max_new_tokens=3, do_sample=False, eos_token_id=-1, pad_token_id=0, **PAGES)
    options: dict[str, Any] = {"generation_config": settings, "progress_bar": False}
    taken = inspect.signature(llama.generate_batch).parameters
    if "warmup" in taken:
        options["warmup"] = False
    if "continuous_batching_config" in taken:
        from transformers import ContinuousBatchingConfig

        options["continuous_batching_config"] = ContinuousBatchingConfig(**PAGES)
    prompts = [[20, 21, 22], [23, 24]]
    serving = threading.Thread(target=llama.generate_batch, args=(prompts,), kwargs=options, daemon=True)
    serving.start()
    serving.join(timeout=240)
    assert calls, "the scheduler made no call"
    return calls[0]


def test_a_paged_call_is_refused_whole_and_in_part(paged_call):
    assert type(paged_call["cache"]).__name__ == "PagedAttentionCache"
    ours = one_answer_model()
    ids = {"input_ids": paged_call["input_ids"]}
    indices = {name: value for name, value in paged_call.items() if name in ("read_index", "write_index")}
    parts = {
        "whole": paged_call,
        "the cache alone": {**ids, "cache": paged_call["cache"]},
        "the cache under its other name": {**ids, "past_key_values": paged_call["cache"]},
        "the indices alone": {**ids, **indices},
    }
    for name, arguments in parts.items():
        for network in (ours, ours.model):
            with pytest.raises(ValueError, match="no continuous batching"):
                network(**arguments)
                pytest.fail(f"{name} was served")
    with pytest.raises(ValueError, match="no continuous batching"):
        ours.generate(ids["input_ids"], past_key_values=paged_call["cache"], max_new_tokens=2)


def test_what_is_no_paged_call_is_served():
    """A plain cache under either name, also of a class that is called as the paged one."""
    ours, ids = one_answer_model(), torch.tensor([[20, 21, 22]])
    lookalike = type("PagedAttentionCache", (DynamicCache,), {})
    with torch.no_grad():
        expected = ours(ids, use_cache=False).logits
        for name in ("cache", "past_key_values"):
            for cache in (DynamicCache, lookalike):
                torch.testing.assert_close(ours(ids, **{name: cache()}).logits, expected)
