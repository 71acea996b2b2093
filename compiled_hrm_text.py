"""One new token of one row through a layer on the CPU, in one function that `torch.compile` makes.

Called one by one, the operations between a layer's products take a fifth to a third of a step: their code has left
the processor's caches whenever it is needed again. `torch.compile` makes a single function of the layer, products
included. A product with one row is a loop that reads the weight once, in the order in which it lies in memory; so
weights of 32, 16 and 8 bits alike keep the plain layout, and are read at the speed of the memory. Codes of 4 bits are
multiplied by the operator of `quantized_hrm_text.py`.

A function serves every layer of the same shapes and kinds of weights, and every length of the cache. It computes in
float32 and rounds what leaves a stack. At its first use it is checked against the same formulas called one by one.
"""

from __future__ import annotations

import functools
import os
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.utils import logging

from .cache_hrm_text import HrmTextCache
from .folder_hrm_text import AdoptedLinear
from .kernels_hrm_text import has_own_call, linear, rotate_differentiably, serves
from .packed_hrm_text import PackedLinear
from .quantized_hrm_text import GROUP, QuantizedMatrix, join_digits, split_rows


logger = logging.get_logger(__name__)

# Which formula multiplies a row, and its constants.
Kind = tuple[Any, ...]
Operands = tuple[torch.Tensor, ...]

# `torch.compile` takes 0 and 1 for constants.
_LEAST_KEYS = 2
# Keys and capacity of the cache that a function is compiled and checked with: two numbers that nothing else has.
_SAMPLE_KEYS, _SAMPLE_CAPACITY = 37, 83
_TOLERANCE = 1e-3
# Where one of them is 1, torch compiles nothing and says nothing.
_SWITCHES = ("TORCH_COMPILE_DISABLE", "TORCHDYNAMO_DISABLE")


# ---- formulas -------------------------------------------------------------------------------------------------------


def _written(x: torch.Tensor) -> torch.Tensor:
    """x, to be read from memory: the loop over a weight would compute it anew for each output otherwise."""
    return torch.as_strided(x, x.shape, x.stride())


def _by_weight(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return (weight.float() * x).sum(-1)


def _by_bytes(x: torch.Tensor, values: torch.Tensor, scale: torch.Tensor, digits: int, steps: float) -> torch.Tensor:
    found, unit = split_rows(x, digits, steps)
    return (values.float() * _written(join_digits(found))).sum(-1) * (scale * unit)


def _by_codes(
    x: torch.Tensor, codes: torch.Tensor, groups: torch.Tensor, scale: torch.Tensor, digits: int
) -> torch.Tensor:
    found, unit = split_rows(x, digits)
    rows = torch.stack(found).to(torch.bfloat16)
    sums = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, codes, GROUP, groups).float()
    return join_digits(sums.unbind()) * (scale * unit)


def _by_scaled_codes(x: torch.Tensor, codes: torch.Tensor, groups: torch.Tensor, width: int) -> torch.Tensor:
    return torch.ops.aten._weight_int4pack_mm_for_cpu(x.to(torch.bfloat16)[None], codes, width, groups)[0].float()


_FORMULAS = {"weight": _by_weight, "bytes": _by_bytes, "codes": _by_codes, "scaled codes": _by_scaled_codes}


def _product(kind: Kind, x: torch.Tensor, operands: Operands) -> torch.Tensor:
    """float32 [in] -> float32 [out]."""
    return _written(_FORMULAS[kind[0]](_written(x), *operands, *kind[1:]))


def _norm(x: torch.Tensor, eps: float) -> torch.Tensor:
    return x * torch.rsqrt(x.square().mean() + eps)


def _layer_formulas(kinds: tuple[Kind, ...], head_dim: int, eps: float, scaling: float) -> Callable[..., torch.Tensor]:
    """A layer for one token of one row; `kinds` are those of gqkv_proj, o_proj, gate_up_proj and down_proj."""

    def one_token(
        x: torch.Tensor,
        seen: torch.Tensor,
        index: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        of_gqkv: Operands,
        of_o: Operands,
        of_gate_up: Operands,
        of_down: Operands,
    ) -> torch.Tensor:
        """
        Args:
            x: float32 [hidden].
            seen: as long as the cache with the token; its values are not read.
            index: int64 [1], where the token lies in the cache.
            cos, sin: cos twice, and -sin and sin, each float32 [head_dim].
            keys, values: [1, heads, capacity, head_dim] of the cache slot, written at the index.
            The others are operands of the products.

        Returns:
            float32 [hidden].
        """
        gqkv = _product(kinds[0], _norm(x, eps), of_gqkv).view(4, -1, head_dim)
        gate, (query, key), value = gqkv[0], rotate_differentiably(gqkv[1:3], (cos, sin)), gqkv[3]
        keys.index_copy_(2, index, key.to(keys.dtype)[None, :, None])
        values.index_copy_(2, index, value.to(values.dtype)[None, :, None])
        keys, values = (room[0, :, : seen.shape[0]].float() for room in (keys, values))
        weights = (keys * _written(query * scaling)[:, None]).sum(-1).softmax(-1)
        output = (values * _written(weights)[:, :, None]).sum(1) * gate.sigmoid()
        x = x + _product(kinds[1], output.view(-1), of_o)
        opening, up = _product(kinds[2], _norm(x, eps), of_gate_up).chunk(2)
        return _written(x + _product(kinds[3], F.silu(opening) * up, of_down))

    return one_token


def _product_formulas(kind: Kind) -> Callable[..., torch.Tensor]:
    def of_row(x: torch.Tensor, operands: Operands) -> torch.Tensor:
        return _product(kind, x, operands)

    return of_row


# ---- functions ------------------------------------------------------------------------------------------------------


class CompiledFunction:
    """Formulas that are compiled and checked at the first call.

    Attributes:
        has_failed: the compiler failed once, and is not to be asked again.
    """

    def __init__(self, formulas: Callable[..., Any]):
        # Torch compiles a code object a limited number of times, for whichever models: so each function has its own.
        code, facts = formulas.__code__.replace(), (formulas.__globals__, formulas.__name__, formulas.__defaults__)
        self._formulas = types.FunctionType(code, *facts, formulas.__closure__)
        self._compiled = torch.compile(self._formulas, fullgraph=True)
        self._is_checked = self.has_failed = False

    def __call__(self, *arguments: Any, sample: Callable[[], tuple[Any, ...]]) -> Any:
        """Calls it, outside of inference mode and without gradient: torch would compile anew for either.

        Args:
            arguments: of the formulas.
            sample: makes others, to compile and check it with.

        Raises:
            Exception: whatever the compiler raises; a RuntimeError where it computes something else. `has_failed` is
                set then.
        """
        try:
            if not self._is_checked:
                self.check(sample)
            return self._compiled(*arguments)
        except Exception:
            self.has_failed = True
            raise

    def check(self, sample: Callable[[], tuple[Any, ...]]) -> None:
        """Compares it with its formulas, called one by one, unless that has been done."""
        if self.has_failed:
            raise RuntimeError("it failed in this process before")
        if self._is_checked:
            return
        arguments = sample()
        fast, plain = self._compiled(*arguments), self._formulas(*arguments)
        if not (fast - plain).norm() <= _TOLERANCE * plain.norm():
            raise RuntimeError("what it compiled computes something else")
        self._is_checked = True


@functools.cache
def _function(make: Callable[..., Any], arguments: tuple[Any, ...], kinds: tuple[Any, ...]) -> CompiledFunction:
    """The one of what `make` makes of the arguments, for tensors of these kinds; see `_kinds_of`."""
    return CompiledFunction(make(*arguments))


def _kinds_of(tensors: Sequence[torch.Tensor]) -> tuple[Any, ...]:
    """Shapes and dtypes."""
    return tuple((tensor.shape, tensor.dtype) for tensor in tensors)


def _of_any_size(tensor: torch.Tensor, *dimensions: int) -> torch.Tensor:
    """The tensor, so marked that what is compiled for it serves every size from 2 of these dimensions."""
    for dimension in dimensions:
        torch._dynamo.mark_dynamic(tensor, dimension)
    return tensor


def _why(error: Exception) -> str:
    """The first line of what a compiler says."""
    return str(error).strip().partition("\n")[0]


def _matrix_of(module: nn.Module) -> QuantizedMatrix | None:
    if type(module) is PackedLinear:
        held = getattr(module._parameters["weight"], "_packed", None)
    else:
        held = module._adopted[0] if type(module) is AdoptedLinear else None
    return held if isinstance(held, QuantizedMatrix) else None


def _operands(module: nn.Module, dtype: torch.dtype) -> tuple[Kind, Operands] | None:
    """How one row is multiplied by a linear layer, or None where a call of it does more or its layout is another."""
    if has_own_call(module) or getattr(module, "bias", None) is not None:
        return None
    if type(module) is not nn.Linear:
        matrix = _matrix_of(module)
        return None if matrix is None else matrix.row_operands(dtype)
    weight = module._parameters.get("weight")
    if type(weight) is not nn.Parameter or weight.device.type != "cpu" or not weight.is_contiguous():
        return None
    return (("weight",), (weight,)) if weight.dtype is dtype else None


def _step_of(layer: nn.Module, dtype: torch.dtype) -> tuple[CompiledFunction, list[Operands]] | None:
    """The function of a layer, and its operands."""
    attn, mlp = layer.attn, layer.mlp
    found = [_operands(module, dtype) for module in (attn.gqkv_proj, attn.o_proj, mlp.gate_up_proj, mlp.down_proj)]
    if None in found:
        return None
    kinds, operands = zip(*found)
    arguments = (kinds, attn.head_dim, layer.eps, attn.scaling)
    return _function(_layer_formulas, arguments, _kinds_of(sum(operands, ()))), list(operands)


def _product_of(module: nn.Module, dtype: torch.dtype) -> tuple[CompiledFunction, Operands] | None:
    """The function of a linear layer, and its operands."""
    found = _operands(module, dtype)
    if found is None:
        return None
    kind, operands = found
    return _function(_product_formulas, (kind,), _kinds_of(operands)), operands


def _layer_sample(layer: nn.Module, operands: list[Operands], dtype: torch.dtype) -> tuple[Any, ...]:
    attn = layer.attn
    generator = torch.Generator().manual_seed(0)
    shape = (2, 1, attn.o_proj.in_features // attn.head_dim, _SAMPLE_CAPACITY, attn.head_dim)
    keys, values = (room.clone() for room in torch.randn(shape, generator=generator).to(dtype))
    seen, index = _of_any_size(torch.zeros(_SAMPLE_KEYS), 0), torch.tensor([_SAMPLE_KEYS - 1])
    cos, sin = (table.clone() for table in torch.rand(2, attn.head_dim, generator=generator))
    x = torch.randn(attn.o_proj.out_features, generator=generator)
    return x, seen, index, cos, sin, _of_any_size(keys, 2), _of_any_size(values, 2), *operands


def _product_sample(module: nn.Module, operands: Operands) -> tuple[Any, ...]:
    return torch.linspace(-1, 1, module.in_features), operands


# ---- what others ask for --------------------------------------------------------------------------------------------


def compile_model(model: nn.Module, stacks: Sequence[nn.Module], head: nn.Module | None) -> str | None:
    """Compiles what one token through the stacks and the head asks for, and checks it; seconds the first time.

    Returns:
        Why it is not served, if it is not. Quantized weights have the layout of their operators then.
    """
    reason = None
    with torch.inference_mode(False), torch.no_grad():
        try:
            if "1" in map(os.environ.get, _SWITCHES):
                raise RuntimeError("the environment switches `torch.compile` off")
            for layer in [layer for stack in stacks for layer in stack.layers]:
                found = _step_of(layer, model.dtype)
                if found is None:
                    reason = (
                        "a layer has an adapter, a hook, a bias, or weights that only their own operator multiplies"
                    )
                    break
                found[0].check(functools.partial(_layer_sample, layer, found[1], model.dtype))
            found = None if head is None or reason else _product_of(head, model.dtype)
            if found is not None:
                found[0].check(functools.partial(_product_sample, head, found[1]))
        except Exception as error:  # of the compiler, whatever it is
            reason = f"{_why(error)} (`torch.compile` needs a C++ compiler, such as g++ or clang)"
    if reason is not None:
        for matrix in filter(None, map(_matrix_of, model.modules())):
            matrix.store_for_operator()
    return reason


def compiled_token_through(
    layers: nn.ModuleList, x: torch.Tensor, tables: Sequence[torch.Tensor], cache: HrmTextCache, cycle_offset: int
) -> torch.Tensor | None:
    """What the layers make of one token, or None where they are not all served.

    Args:
        layers: of a stack; calls of them do nothing but the formulas.
        x: [1, 1, hidden].
        tables: cos twice, and -sin and sin, each float32 [head_dim].
        cache: holds the token afterwards.
        cycle_offset: the cache slot of the first layer.

    Returns:
        [1, 1, hidden], before the norm at the exit.
    """
    slots = cache.layers[cycle_offset : cycle_offset + len(layers)]
    length = slots[0].get_seq_length()
    if length < _LEAST_KEYS or any(slot.get_seq_length() != length for slot in slots):
        return None
    steps = [_step_of(layer, x.dtype) for layer in layers]
    if torch.is_autocast_enabled("cpu") or None in steps or any(step.has_failed for step, _ in steps):
        return None
    attn = layers[0].attn
    # Torch would compile anew for tensors that were made in inference mode.
    with torch.inference_mode(False), torch.no_grad():
        row = x.view(-1).to(torch.float32, copy=True)
        cos, sin = (table.clone() for table in tables)
        seen, index = torch.empty(length + 1), torch.tensor([length])
        # Room for one more than the token: torch would compile anew for a cache that is full.
        new = torch.empty((1, attn.o_proj.in_features // attn.head_dim, 2, attn.head_dim), dtype=x.dtype)
        cache.make_room(cycle_offset, new, new)
        for layer, slot, (step, operands) in zip(layers, slots, steps):
            slot.make_room(new, new)
            sample = functools.partial(_layer_sample, layer, operands, x.dtype)
            rooms = (slot._key_storage, slot._value_storage)
            try:
                row = step(row, seen, index, cos, sin, *rooms, *operands, sample=sample)
            except Exception as error:  # of the compiler: nothing that the cache holds has changed
                logger.warning_once(f"decoding runs uncompiled: {_why(error)}")
                return None
        for slot in slots:
            slot.hold(length + 1)
        return row.to(x.dtype).view(x.shape)


def _compiled_product(module: nn.Module, x: torch.Tensor) -> torch.Tensor | None:
    """[..., in] of one row -> [..., out] by a linear layer, or None where it is not served."""
    found = None if torch.is_autocast_enabled("cpu") else _product_of(module, x.dtype)
    if found is None or found[0].has_failed:
        return None
    function, operands = found
    with torch.inference_mode(False), torch.no_grad():
        row = x.reshape(-1).to(torch.float32, copy=True)
        sample = functools.partial(_product_sample, module, operands)
        try:
            output = function(row, operands, sample=sample)
        except Exception as error:
            logger.warning_once(f"decoding runs uncompiled: {_why(error)}")
            return None
        return output.to(x.dtype).view(*x.shape[:-1], -1)


def head_of(head: nn.Module, x: torch.Tensor, compiled: bool) -> torch.Tensor:
    """`head(x)`, [..., hidden] -> [..., vocabulary]; for one row, compiled if that is asked for and served."""
    if compiled and x.numel() == x.shape[-1] and serves(x) and not torch.is_grad_enabled():
        output = _compiled_product(head, x)
        if output is not None:
            return output
    return linear(head, x)


__all__ = ["compile_model", "compiled_token_through", "head_of"]
