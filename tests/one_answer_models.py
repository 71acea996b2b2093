"""The models of the one-answer tests."""

from __future__ import annotations

from typing import Any

from .tiny import tiny_model


def one_answer_model(seed: int = 0, **overrides: Any) -> Any:
    """A tiny model of four attention calls that never stops early, so that the answers of all modes compare."""
    model = tiny_model(seed, **{"num_layers_per_stack": 1, "L_cycles": 1, **overrides})
    model.generation_config.eos_token_id = None
    return model


def shallow_model(**overrides: Any) -> Any:
    """One with two attention calls, for what is slow in each: compiling, exporting, flex attention on a processor."""
    return one_answer_model(**{"H_cycles": 1, **overrides})
