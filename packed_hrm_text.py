"""Linear layers whose weights lie in oneDNN's packed layout or are quantized, which the processor reads faster.

The Parameter of a packed weight stays the object that it was. Every use of its values from outside lays it out plainly
again, bit for bit. A weight in oneDNN's layout is the only copy of its values. One that was quantized keeps them
beside it, or, where the caller gave them up, is laid out with the rounded ones. With `kernels_hrm_text.py` switched
off, nothing takes oneDNN's layout. Weights are quantized all the same: the caller chooses that, and no measurement.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.utils._python_dispatch import _disable_current_modes
from transformers.utils import logging

from .kernels_hrm_text import has_own_call, is_eager, is_enabled, least_seconds, measure_rows, rows_to_multiply
from .quantized_hrm_text import QuantizedMatrix, measure_products, quantize


logger = logging.get_logger(__name__)

# A shape keeps the plain layout only where that is faster by more than this: timings of a shared machine scatter, and
# where packing does not pay it costs little.
_TOLERATED = 1.25
_TIMED_PACKED_RUNS = 21
_layout_lock = threading.RLock()


class PackedParameter(nn.Parameter):
    """The weight of a packed layer: the same Parameter object, whose values lie in oneDNN's layout or are quantized.

    Its shape, dtype, flags and gradient are as ever. Whatever else is done with it (an optimizer's step, a merge of
    adapters, a pruning, a read of its values) first lays it out plainly again, bit for bit, and then sees an ordinary
    `nn.Parameter` in an ordinary `nn.Linear`.
    """

    _packed: torch.Tensor | QuantizedMatrix
    _layer: weakref.ref

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in _FACTS:
            for weight in _packed_among((args, kwargs)):
                lay_out(weight)
                logger.warning_once(
                    "the values of a packed weight were used, so its layer is an ordinary one again; "
                    "`optimize_for_inference()` packs it anew."
                )
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Parameter:
        lay_out(self)
        return nn.Parameter.__deepcopy__(self, memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        lay_out(self)
        return nn.Parameter.__reduce_ex__(self, protocol)


# What can be asked of a packed parameter, or be set, without its values.
_KNOWN = ("shape", "dtype", "device", "layout", "ndim", "is_leaf", "is_meta", "is_cuda", "is_sparse", "is_quantized")
_KNOWN += ("grad_fn", "requires_grad", "grad", "is_nested", "_backward_hooks", "is_mkldnn")
_FACTS = {getattr(torch.Tensor, name).__get__ for name in _KNOWN}
_FACTS |= {getattr(torch.Tensor, name).__set__ for name in ("requires_grad", "grad")} | {torch.Tensor.grad.__delete__}
_FACTS |= {torch.Tensor.size, torch.Tensor.dim, torch.Tensor.numel, torch.Tensor.nelement, torch.Tensor.element_size}
_FACTS |= {torch.Tensor.is_floating_point, torch.Tensor.is_complex, torch.Tensor.requires_grad_, torch.Tensor.__len__}
_FACTS |= {torch.Tensor.is_inference, torch.is_floating_point, torch.is_complex, torch.numel}


def _packed_among(arguments: Any) -> Iterator[PackedParameter]:
    if type(arguments) is PackedParameter:
        yield arguments
    elif isinstance(arguments, (tuple, list)):
        for argument in arguments:
            yield from _packed_among(argument)
    elif isinstance(arguments, dict):
        yield from _packed_among(list(arguments.values()))


class PackedLinear(nn.Linear):
    """An `nn.Linear` whose weight is a `PackedParameter`.

    Moving or casting it, loading a state dict, copying and unpickling pack anew where that is still of use.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[..., in_features] -> [..., out_features]."""
        if torch.compiler.is_compiling():
            return _outside_of_graphs(self, input)
        weight = self._parameters["weight"]
        if not is_eager() or type(input) is not torch.Tensor:
            lay_out(weight)
        packed = getattr(weight, "_packed", None)
        if packed is None:  # laid out plainly, or another weight has been put in its place
            return F.linear(input, weight, self.bias)
        if torch.is_grad_enabled() and (input.requires_grad or weight.requires_grad):
            output = _PackedProduct.apply(input, weight, packed)
            return output if self.bias is None else output + self.bias
        return _multiply(input, packed, self.bias)

    def _plain_members(self) -> dict[str, Any]:
        """The attributes of the ordinary layer, with a copy of the weight."""
        weight = self._parameters["weight"]
        packed = getattr(weight, "_packed", None)
        if packed is not None:
            weight = nn.Parameter(packed.to_dense(), requires_grad=weight.requires_grad)
        return {**self.__dict__, "_parameters": {**self._parameters, "weight": weight}}

    def _matrix(self) -> QuantizedMatrix | None:
        packed = getattr(self._parameters["weight"], "_packed", None)
        return packed if isinstance(packed, QuantizedMatrix) else None

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        plain = nn.Linear.__new__(nn.Linear)
        plain.__dict__ = self._plain_members()
        if keep_vars:  # the caller wants the parameters themselves
            lay_out(self._parameters["weight"])
            plain = self
        nn.Linear._save_to_state_dict(plain, destination, prefix, keep_vars)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._repack_after(nn.Linear._load_from_state_dict, *args, **kwargs)

    def _apply(self, fn: Any, recurse: bool = True) -> nn.Module:
        self._repack_after(nn.Linear._apply, fn, recurse)
        return self

    def _repack_after(self, change: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        matrix = self._matrix()
        lay_out(self._parameters["weight"])
        change(self, *args, **kwargs)
        if matrix is None:
            if can_pack(self):
                pack_linear(self)
        elif can_quantize(self):
            weight = self._parameters["weight"].detach()
            same = weight.dtype is matrix.dtype and torch.equal(weight, matrix.to_dense())
            pack_linear(self, matrix.keeping(weight) if same else matrix.anew(weight))

    def __getstate__(self) -> dict[str, Any]:
        return {**self._plain_members(), "_hrm_text_matrix": self._matrix()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        matrix = state.pop("_hrm_text_matrix", None)
        super().__setstate__(state)
        self.__class__ = nn.Linear
        if matrix is not None:
            pack_linear(self, matrix.keeping(self.weight.detach()))
        elif can_pack(self):
            pack_linear(self)


@torch.compiler.disable
def _outside_of_graphs(layer: PackedLinear, input: torch.Tensor) -> torch.Tensor:
    return nn.Linear.forward(layer, input) if type(layer) is not PackedLinear else layer.forward(input)


def _multiply(input: torch.Tensor, packed: torch.Tensor | QuantizedMatrix, bias: torch.Tensor | None) -> torch.Tensor:
    if isinstance(packed, QuantizedMatrix):
        return packed.linear(input, bias)
    fits = input.dtype is packed.dtype and input.numel() > 0 and not torch.is_autocast_enabled("cpu")
    if not fits or not is_enabled():
        return F.linear(input, packed.to_dense(), bias)
    rows = input.numel() // input.shape[-1]
    count = rows_to_multiply(rows, packed.shape, input.dtype)
    if count == rows:
        return _packed_product(input, packed, bias)
    more = input.new_zeros(count, input.shape[-1])
    more[:rows] = input.reshape(rows, -1)
    return _packed_product(more, packed, bias)[:rows].view(*input.shape[:-1], -1)


def _packed_product(input: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise.default(input, packed, bias, "none", [], "")


def packed_product(module: nn.Module, input: torch.Tensor) -> torch.Tensor | None:
    """What a call of a packed layer returns; None where the module is another, or a call of it does more than that.

    For callers that know the input to be a plain tensor, run eagerly and without gradient.
    """
    if type(module) is not PackedLinear or has_own_call(module):
        return None
    packed = getattr(module._parameters["weight"], "_packed", None)
    return None if packed is None else _multiply(input, packed, module.bias)


class _PackedProduct(torch.autograd.Function):
    """Keeps no plain weight for backward: laying it out anew costs time and no memory."""

    @staticmethod
    def forward(ctx: Any, input: torch.Tensor, weight: torch.Tensor, packed: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(input, weight)
        ctx.packed = packed
        return _multiply(input, packed, None)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        input, weight = ctx.saved_tensors
        if torch.is_grad_enabled():  # for derivatives of derivatives
            lay_out(weight)
            plain = weight
        else:
            plain = ctx.packed.dequantized() if isinstance(ctx.packed, QuantizedMatrix) else ctx.packed.to_dense()
        of_input = (grad @ plain.to(grad.dtype)).to(input.dtype) if ctx.needs_input_grad[0] else None
        of_weight = None
        if ctx.needs_input_grad[1]:
            of_weight = (grad.flatten(0, -2).mT @ input.to(grad.dtype).flatten(0, -2)).to(plain.dtype)
        return of_input, of_weight, None


def _packed_form(weight: torch.Tensor) -> torch.Tensor:
    # No batch size is given: the layout then suits one row as well as a whole prompt.
    return torch.ops.mkldnn._reorder_linear_weight(weight, None)


def _is_ordinary(module: nn.Module) -> bool:
    """Whether the module is a plain linear layer on the CPU, whose weight is an ordinary parameter."""
    # Layers of quantizers, adapters and parametrizations have other types, of the layer or of its weight.
    if type(module) not in (nn.Linear, PackedLinear) or "forward" in vars(module):
        return False
    weight = module._parameters.get("weight")
    if hasattr(module, "quantization_scheme"):
        return False
    if type(weight) is not nn.Parameter or weight.device.type != "cpu" or weight.layout is not torch.strided:
        return False
    return weight.numel() > 0 and not weight.is_inference()


def can_pack(module: nn.Module) -> bool:
    """Whether the module is a plain linear layer on the CPU of a dtype that this torch and processor pack."""
    if not _is_ordinary(module) or not torch.backends.mkldnn.is_available() or not torch.backends.mkldnn.enabled:
        return False
    if module.weight.dtype is torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return module.weight.dtype is torch.float32


def can_quantize(module: nn.Module) -> bool:
    """Whether the module is a plain linear layer on the CPU, of one of the dtypes that models come in."""
    return _is_ordinary(module) and module.weight.dtype in (torch.bfloat16, torch.float16, torch.float32)


def pack_linear(module: nn.Linear, packed: QuantizedMatrix | None = None) -> None:
    """Packs the weight, or puts a quantized matrix in its place; the Parameter object stays the same.

    Nothing but a quantized matrix that keeps them holds the plain values afterwards.
    """
    weight = module.weight
    with _layout_lock, torch.inference_mode(False), torch.no_grad():
        packed = _packed_form(weight.detach()) if packed is None else packed
        # One number stands for all, so that shape and dtype are told rightly and no memory is held.
        weight.data = torch.full((1, 1), float("nan"), dtype=weight.dtype).expand(weight.shape)
        weight._packed, weight._layer = packed, weakref.ref(module)
        weight.__class__, module.__class__ = PackedParameter, PackedLinear


def lay_out(weight: torch.Tensor) -> None:
    """Reverses `pack_linear`, whatever mode or transform of torch is active; other tensors are left as they are."""
    with _layout_lock:
        if type(weight) is not PackedParameter:
            return
        with (
            temporarily_clear_interpreter_stack(),
            _disable_current_modes(),
            torch._C.DisableTorchFunctionSubclass(),
            torch.inference_mode(False),
            torch.no_grad(),
        ):
            weight.data = weight._packed.to_dense()
        layer = weight._layer()
        weight.__class__ = nn.Parameter
        del weight._packed, weight._layer
        if type(layer) is PackedLinear:
            layer.__class__ = nn.Linear


@torch.no_grad()
def packing_pays(weight: torch.Tensor) -> bool:
    """Whether one row times this weight is right and not slower in the packed layout, measured in milliseconds."""
    row = torch.linspace(-1, 1, weight.shape[1], dtype=torch.float32).to(weight.dtype)[None]
    try:
        packed = _packed_form(weight)
        if not torch.equal(packed.to_dense(), weight):
            return False
        runs = (lambda: F.linear(row, weight), lambda: _multiply(row, packed, None))
        plain, ours = (run().float() for run in runs)
    except (AttributeError, RuntimeError):
        return False
    if not torch.allclose(plain, ours, rtol=2e-2, atol=2e-2 * float(plain.abs().max())):
        return False
    plain_seconds, packed_seconds = least_seconds(runs, times=_TIMED_PACKED_RUNS)
    return packed_seconds <= plain_seconds * _TOLERATED


def packable(model: nn.Module, can: Callable[[nn.Module], bool] = can_pack) -> Iterator[nn.Linear]:
    """Linear layers of the model that can be packed; a weight whose memory another parameter shares stays plain."""

    def place(weight: nn.Parameter) -> int:
        return (weight.data_ptr() if type(weight) is nn.Parameter else 0) or id(weight)

    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners[place(parameter)] = owners.get(place(parameter), 0) + 1
    for module in model.modules():
        if can(module) and owners[place(module.weight)] == 1:
            yield module


def pack_model(model: nn.Module) -> int:
    """Packs the linear layers for which it pays, one at a time; returns how many are packed now."""
    pays: dict[tuple[Any, ...], bool] = {}
    for module in packable(model) if is_enabled() else ():
        key = (module.weight.shape, module.weight.dtype)
        if key not in pays:
            pays[key] = packing_pays(module.weight.detach())
        if pays[key]:
            pack_linear(module)
    held = [parameter for parameter in model.parameters() if type(parameter) is PackedParameter]
    for dtype in (torch.bfloat16, torch.float32):
        packed = [weight._packed for weight in held if type(weight._packed) is torch.Tensor and weight.dtype is dtype]
        measure_rows(
            [(lambda x, matrix=matrix: _packed_product(x, matrix, None), matrix.shape) for matrix in packed], dtype
        )
    return len(held)


# Which matrices take part, and their bits with `weights="int4"`. Inputs that are products of gates have elements far
# above the others, and `down_proj` costs the most quality in 4 bits for its size: both measured on trained weights.
_QUANTIZED = {"gqkv_proj": 4, "o_proj": 4, "gate_up_proj": 4, "down_proj": 8, "lm_head": 8}
_TWO_DIGITS = ("o_proj", "down_proj", "lm_head")


def quantize_model(model: nn.Module, weights: str, keep: bool, in_rows: bool = False) -> int:
    """Quantizes the projections and the output head, one at a time; returns how many are quantized now.

    Args:
        weights: "int8" or "int4".
        keep: whether the plain values are kept, for `unpack_model` to give back.
        in_rows: as of `QuantizedMatrix`.
    """
    # An adapter keeps the layer that it adapts under this name.
    named = ((name.removesuffix(".base_layer"), module) for name, module in model.named_modules())
    names = {module: name.rpartition(".")[2] for name, module in named}
    for module in [module for module in packable(model, can_quantize) if names[module] in _QUANTIZED]:
        name = names[module]
        bits = 8 if weights == "int8" else _QUANTIZED[name]
        pack_linear(module, quantize(module.weight, bits, 2 if name in _TWO_DIGITS else 1, keep, in_rows))
    packed = (getattr(parameter, "_packed", None) for parameter in model.parameters())
    matrices = [matrix for matrix in packed if isinstance(matrix, QuantizedMatrix)]
    measure_products(matrices)
    return len(matrices)


def unpack_model(model: nn.Module) -> None:
    """Reverses `pack_model` and `quantize_model`."""
    for parameter in model.parameters():
        lay_out(parameter)


def is_packed(model: nn.Module) -> bool:
    """Whether a layer of the model is packed."""
    return any(type(parameter) is PackedParameter for parameter in model.parameters())


__all__ = [
    "PackedLinear",
    "is_packed",
    "lay_out",
    "pack_linear",
    "pack_model",
    "packable",
    "packed_product",
    "quantize_model",
    "unpack_model",
]
