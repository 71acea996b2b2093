"""Optimized models for tests: small layers gain nothing from packing, so the measurement would leave them plain."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any


def sibling(model: Any, name: str) -> ModuleType:
    """A module of the repository, in the copy that the model's class came from."""
    return importlib.import_module(f"{type(model).__module__.rpartition('.')[0]}.{name}")


def pack_all(model: Any) -> Any:
    """Packs every linear layer that can be packed, and returns the model."""
    packed = sibling(model, "packed_hrm_text")
    for module in list(packed.packable(model)):
        packed.pack_linear(module)
    return model


def packed_layers(model: Any) -> list[Any]:
    """The packed linear layers of a model."""
    return [module for module in model.modules() if type(module).__name__ == "PackedLinear"]


def decode_statically(model: Any) -> Any:
    """Gives the model the decoder of captured steps, which computes them one by one where there is no CUDA."""
    model._decoder = sibling(model, "decoding_hrm_text").StaticDecoder()
    return model
