"""Linear layers of a compressed-tensors folder, multiplied as they are stored by `optimize_for_inference`.

That library unpacks each weight at the first forward pass, and its layers are then larger and slower than before they
were quantized. Here a layer keeps its numbers and scales, in the layout of the operators of `quantized_hrm_text.py`.
Served are 8 bits with one scale a row, whose inputs are rounded for each token (W8A8) or not at all (W8A16), and 4
bits with a scale for each group (W4A16). All other schemes stay with the library.

A layer that was adopted gives its tensors back, bit for bit, before anything but a forward pass uses them.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from .quantized_hrm_text import QuantizedMatrix, ScaledGroups, can_store_codes, measure_products


logger = logging.get_logger(__name__)

# Of the library's layers: what says how they are quantized, and what it has put in place of their `forward`.
_MARKS = ("forward", "quantization_scheme", "quantization_status")
# The library rounds inputs so that the largest of a token is half of 255 steps.
_STEPS = 127.5
# Rows whose numbers are unpacked together, for which they take four bytes each.
_ROWS_AT_A_TIME = 256


class AdoptedLinear(nn.Linear):
    """A layer of the library, while its product is computed here; see `adopt`."""

    _adopted: tuple[QuantizedMatrix, str, int, dict[str, Any]]

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[..., in_features] -> [..., out_features]."""
        if torch.compiler.is_compiling():
            return _outside_of_graphs(self, input)
        return self._adopted[0].linear(input, self.bias)

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        give_back(self)
        self._save_to_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        give_back(self)
        self._load_from_state_dict(*args, **kwargs)

    def _apply(self, fn: Any, recurse: bool = True) -> nn.Module:
        give_back(self)
        return self._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        give_back(self)
        return self.__dict__

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__class__ = nn.Linear


@torch.compiler.disable
def _outside_of_graphs(layer: AdoptedLinear, input: torch.Tensor) -> torch.Tensor:
    return layer.forward(input)


def adopt(module: nn.Module, in_rows: bool = False) -> bool:
    """Takes over a layer of the library, if it is one that is served; its large tensor is freed."""
    found = _read(module, in_rows)
    if found is None:
        return False
    matrix, name, bits = found
    parameter = module._parameters[name]
    marks = {mark: module.__dict__.pop(mark) for mark in _MARKS if mark in module.__dict__}
    with torch.inference_mode(False), torch.no_grad():
        # One number stands for all, so that shape and dtype are told rightly and no memory is held.
        parameter.data = torch.zeros((1, 1), dtype=parameter.dtype).expand(parameter.shape)
    module._adopted = (matrix, name, bits, marks)
    module.__class__ = AdoptedLinear
    return True


def give_back(module: nn.Module) -> None:
    """Reverses `adopt`; other modules are left as they are."""
    if type(module) is not AdoptedLinear:
        return
    matrix, name, bits, marks = module._adopted
    parameter = module._parameters[name]
    with torch.inference_mode(False), torch.no_grad():
        if name == "weight_packed":
            parameter.data = _pack(matrix.values(), bits)
        elif parameter.dtype is torch.int8:
            parameter.data = matrix.values()
        else:
            parameter.data = matrix.dequantized()
    del module._adopted
    module.__class__ = nn.Linear
    module.__dict__.update(marks)


def adopt_model(model: nn.Module, in_rows: bool = False) -> int:
    """Adopts the layers of a model that are served; returns how many. `in_rows` is that of `QuantizedMatrix`."""
    adopted = [module for module in list(model.modules()) if adopt(module, in_rows)]
    measure_products(module._adopted[0] for module in adopted)
    return len(adopted)


def give_back_model(model: nn.Module) -> None:
    """Reverses `adopt_model`. Layers that the library would unpack at the first forward pass are unpacked now."""
    modules = [module for module in model.modules() if type(module) is AdoptedLinear]
    for module in modules:
        give_back(module)
    if modules and not any(hasattr(module, "ct_decompress_hook") for module in model.modules()):
        # Remote code may not name a package in an import that it can do without.
        unpack = importlib.import_module("compressed_tensors.compressors.base").decompress_module
        packed = importlib.import_module("compressed_tensors.quantization").QuantizationStatus.COMPRESSED
        for module in modules:
            if module.quantization_status == packed:
                unpack(module)


def is_adopted(model: nn.Module) -> bool:
    """Whether a layer of the model is adopted."""
    return any(type(module) is AdoptedLinear for module in model.modules())


@torch.no_grad()
def _read(module: nn.Module, in_rows: bool) -> tuple[QuantizedMatrix, str, int] | None:
    """The matrix of a layer, the name of the parameter that holds it, and its bits; None for what is not served."""
    scheme = getattr(module, "quantization_scheme", None)
    weights = getattr(scheme, "weights", None)
    scale = module._parameters.get("weight_scale") if type(module) is nn.Linear else None
    if weights is None or scale is None or scale.device.type != "cpu":
        return None
    inputs = scheme.input_activations
    if scheme.output_activations is not None or not _is_whole(weights) or weights.dynamic or weights.actorder:
        return None
    name = "weight_packed" if "weight_packed" in module._parameters else "weight"
    kind = (weights.num_bits, getattr(weights.strategy, "value", weights.strategy))
    if kind == (8, "channel") and (inputs is None or _is_per_token(inputs)):
        values = _values(module, name, 8)
        digits = (2,) if inputs is None else (1, _STEPS)
        matrix = QuantizedMatrix(values, scale.detach().float().flatten(), scale.dtype, *digits, in_rows=in_rows)
    elif kind == (4, "group") and inputs is None and can_store_codes(_shape(module), weights.group_size):
        matrix = ScaledGroups((_values(module, name, 4) + 8).to(torch.uint8), scale.detach())
    else:
        return None
    held = module._parameters[name]
    if held.dtype.is_floating_point and not torch.equal(matrix.dequantized(), held):
        return None  # changed since it was unpacked
    return matrix, name, weights.num_bits


def _is_whole(arguments: Any) -> bool:
    return getattr(arguments.type, "value", arguments.type) == "int" and arguments.symmetric


def _is_per_token(arguments: Any) -> bool:
    strategy = getattr(arguments.strategy, "value", arguments.strategy)
    return _is_whole(arguments) and arguments.num_bits == 8 and strategy == "token" and arguments.dynamic is True


def _shape(module: nn.Linear) -> torch.Size:
    return torch.Size((module.out_features, module.in_features))


def _values(module: nn.Linear, name: str, bits: int) -> torch.Tensor:
    """The whole numbers of a weight, int8 [out, in], from whichever form the library holds it in."""
    held = module._parameters[name].detach()
    if name == "weight_packed":
        shifts = torch.arange(0, 32, bits, dtype=torch.int32)
        values = torch.empty(len(held), module.in_features, dtype=torch.int8)
        for rows, part in zip(values.split(_ROWS_AT_A_TIME), held.split(_ROWS_AT_A_TIME)):
            numbers = ((part[..., None] >> shifts) & ((1 << bits) - 1)) - (1 << (bits - 1))
            rows.copy_(numbers.flatten(1)[:, : module.in_features])
        return values
    if held.dtype is torch.int8:
        return held
    scale = module.weight_scale.detach().float()
    return (held.float().view(*scale.shape, -1) / scale[..., None]).round_().to(torch.int8).view(held.shape)


def _pack(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Reverses `_values` for packed weights: int32 [out, in * bits / 32]."""
    fields = 32 // bits
    numbers = nn.functional.pad(values.int() + (1 << (bits - 1)), (0, -values.shape[1] % fields))
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    return (numbers.view(len(values), -1, fields) << shifts).sum(dim=-1, dtype=torch.int32)


__all__ = ["AdoptedLinear", "adopt_model", "give_back_model", "is_adopted"]
