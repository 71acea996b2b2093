"""Optimized models for tests: small layers gain nothing from packing, so the measurement would leave them plain."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch.fx.experimental.proxy_tensor import make_fx


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


class CalledStep:
    """In place of a CUDA graph: computes the step each time."""

    def __init__(self, compute: Callable[[], torch.Tensor], pool: Any):
        self.replay = compute

    def seconds(self) -> float:
        return 1.0


class ReplayedStep:
    """In place of a CUDA graph, and as blind: replays the operations of the first run, on the tensors of then."""

    def __init__(self, compute: Callable[[], torch.Tensor], pool: Any):
        held = (cell.cell_contents for cell in compute.func.__closure__)
        arena = next(item for item in held if hasattr(item, "input_ids"))
        self.inputs = (arena.input_ids, arena.position_ids, arena.index)
        graph = make_fx(lambda *inputs: compute())(*self.inputs)
        self.replay = lambda: graph(*self.inputs)

    def seconds(self) -> float:
        return 1.0


class Captures:
    """Makes steps of a kind, and remembers them."""

    def __init__(self, kind: Any = CalledStep):
        self.kind, self.steps = kind, []

    def __call__(self, compute: Callable[[], torch.Tensor], pool: Any) -> Any:
        self.steps.append(self.kind(compute, pool))
        return self.steps[-1]


def decode_statically(model: Any, kind: Any = CalledStep, options: dict[str, Any] | None = None) -> Any:
    """Gives the model captured decoding, with a stand-in for CUDA graphs whose uses `captured(model)` counts."""
    decoder = sibling(model, "inference_hrm_text").CapturedDecoder
    model._decoder = decoder(options, capture=Captures(kind))
    return model


def captured(model: Any) -> int:
    """How many steps have been captured."""
    return len(model._decoder.capture.steps)
