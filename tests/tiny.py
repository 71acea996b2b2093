"""Small models for tests, through the classes that a user's `trust_remote_code=True` loads."""

from __future__ import annotations

import importlib
import importlib.util
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers.dynamic_module_utils import get_class_from_dynamic_module


ROOT = Path(__file__).resolve().parent.parent


@cache
def load_class(reference: str) -> Any:
    """The class `module.Class` of the repository, as remote code.

    The library gives each entry module a copy of its own of what it imports, so everything that the model imports is
    taken from the model's copy: a cache made by a test is then of the class that the model makes.
    """
    module, name = reference.split(".")
    model = get_class_from_dynamic_module("modeling_hrm_text.HrmTextForCausalLM", str(ROOT))
    package = model.__module__.rpartition(".")[0]
    if importlib.util.find_spec(f"{package}.{module}") is not None:
        return getattr(importlib.import_module(f"{package}.{module}"), name)
    return get_class_from_dynamic_module(reference, str(ROOT))


def tiny_config(**overrides: Any) -> Any:
    """A config of a few thousand parameters, at an initializer_range where masks matter."""
    fields = {
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_layers_per_stack": 2,
        "num_attention_heads": 4,
        "initializer_range": 0.15,
        "max_position_embeddings": 256,
        "pad_token_id": 5,
        "bos_token_id": 6,
        "eos_token_id": 11,
    }
    return load_class("configuration_hrm_text.HrmTextConfig")(**{**fields, **overrides})


def tiny_model(seed: int = 0, cls: str = "modeling_hrm_text.HrmTextForCausalLM", **overrides: Any) -> Any:
    """A random float32 model in eval mode; `attn_implementation` may be among the overrides."""
    implementation = overrides.pop("attn_implementation", "sdpa")
    torch.manual_seed(seed)
    model = load_class(cls)(tiny_config(**overrides))
    model.set_attn_implementation(implementation)
    return model.eval()
