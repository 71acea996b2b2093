"""Speed alone: fused elementwise operations, products with one row, attention of one query, and what chooses them.

Every function here has a plain equivalent in `modeling_hrm_text.py` or `attention_hrm_text.py` and rounds as it does:
statistics, angles and products are float32, and the result is rounded once. A caller asks first, and takes the plain
formula where the answer is no:

    def norm(x, eps):
        return fused_norm(x, eps) if serves(x) else F.rms_norm(x, x.shape[-1:], eps=eps)

The room is switched off as a whole by the environment variable `HRM_TEXT_KERNELS=0`, by `use_kernels(False)`, and by
`torch.use_deterministic_algorithms(True)`. Some choices are measured: two ways that round differently are timed once
in a process, so that two processes may choose differently. These are all of them, and they are off with the room:

    vector_is_faster       one row times a matrix by `torch.mv`
    fastest_attention      attention of one query by two batched products, in float32 or in the cache's dtype
    packing_pays           which linear layers `optimize_for_inference` packs, see `packed_hrm_text.py`
    measure_rows           how many rows of zeros few rows are multiplied with, by a packed or 8-bit matrix
    Arena._captured        attention of a captured step, see `inference_hrm_text.py`

This room imports no other.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import os
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks


# ---- the switch -----------------------------------------------------------------------------------------------------

_enabled = os.environ.get("HRM_TEXT_KERNELS", "1") != "0"


def use_kernels(enabled: bool) -> contextlib.ExitStack:
    """Switches this room on or off, for all threads of the process.

    `use_kernels(False)` does so for good, `with use_kernels(False): ...` until the end of the block. Layers that are
    packed stay so, and multiply by the plain matrix meanwhile.
    """
    until_exit = contextlib.ExitStack()
    until_exit.callback(_switch, _enabled)
    _switch(enabled)
    return until_exit


def _switch(enabled: bool) -> None:
    global _enabled
    _enabled = bool(enabled)


def is_enabled() -> bool:
    """Whether this room is switched on, and torch not in deterministic mode."""
    return _enabled and not torch.are_deterministic_algorithms_enabled()


def is_eager() -> bool:
    """Whether operations run as they are called: nothing compiles, traces, exports or transforms them."""
    return not (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch._C._len_torch_dispatch_stack()
    )


def serves(x: torch.Tensor) -> bool:
    """Whether the fused operations are to be taken for x: a plain CPU tensor that float32 is wide for, run eagerly."""
    return _is_plain(x) and x.device.type == "cpu" and is_enabled() and is_eager()


def saves_memory(x: torch.Tensor) -> bool:
    """Whether `fused_split_and_rotate` and `fused_swiglu` are to be taken for x, on any device, for what they keep.

    For backward they keep a third less than autograd does for the plain steps.
    """
    return _is_plain(x) and _records(x) and is_enabled() and is_eager()


def _is_plain(x: torch.Tensor) -> bool:
    return type(x) is torch.Tensor and x.dtype is not torch.float64


def _records(*tensors: torch.Tensor) -> bool:
    """Whether autograd records what is done with them."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def _may_write(grad: torch.Tensor) -> bool:
    """Whether a backward pass may write into memory of its own: it is not differentiated or batched itself."""
    return not torch.is_grad_enabled() and is_eager() and not torch._C._functorch.is_legacy_batchedtensor(grad)


# ---- measurements ---------------------------------------------------------------------------------------------------


def least_seconds(runs: Sequence[Callable[[], Any]], times: int) -> list[float]:
    """Runs each in turn, `times` times; the least seconds of each, which is what a busy machine distorts least."""
    least = [float("inf")] * len(runs)
    for _ in range(times):
        for i, run in enumerate(runs):
            start = time.perf_counter()
            run()
            least[i] = min(least[i], time.perf_counter() - start)
    return least


# ---- norm -----------------------------------------------------------------------------------------------------------


def fused_norm(x: torch.Tensor, eps: float) -> torch.Tensor:
    """`F.rms_norm` over the last dimension, without a weight; [..., width] -> the same shape."""
    if _records(x):
        return _Norm.apply(x, eps)
    width = x.shape[-1]
    if x.numel() == width and eps > 0:
        length = torch.linalg.vector_norm(x, dtype=torch.float32).item()
        return x * (length * length / width + eps) ** -0.5
    return _norm_and_scale(x, eps)[0]


def _norm_and_scale(x: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The norm, and the factor of each row in float32 [..., 1]."""
    wide = x.float()
    scale = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return torch.mul(wide, scale, out=wide if wide is not x else None).to(x.dtype), scale


class _Norm(torch.autograd.Function):
    """Backward in half the passes over memory that autograd takes for the steps of `F.rms_norm` on the CPU."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, eps: float) -> torch.Tensor:
        output, scale = _norm_and_scale(x, eps)
        ctx.save_for_backward(x, scale)
        ctx.eps = eps
        return output

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        x, scale = ctx.saved_tensors
        wide, wide_grad = x.float(), grad.float()
        if torch.is_grad_enabled():  # for derivatives of derivatives
            scale = (wide.square().mean(dim=-1, keepdim=True) + ctx.eps).rsqrt()
        along = (wide_grad * wide).sum(dim=-1, keepdim=True) * scale**3 / -x.shape[-1]
        gradient = wide_grad * scale
        out = gradient if _may_write(grad) else None
        return torch.addcmul(gradient, wide, along, out=out).to(x.dtype), None


# ---- rotary embedding -----------------------------------------------------------------------------------------------

# cos twice, and -sin and sin, each float32 [batch or 1, tokens, 1, 1, head_dim].
RotaryTables = tuple[torch.Tensor, torch.Tensor]


def fused_split_and_rotate(
    gqkv: torch.Tensor, tables: RotaryTables
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """What attention takes, from the output of its one projection; the rotation is float32, cast back.

    Args:
        gqkv: [batch, tokens, 4, heads, head_dim]: gate, query, key, value; halves are paired as (i, i + head_dim / 2).
        tables: cos twice, and -sin and sin, each float32 [batch or 1, tokens, 1, 1, head_dim].

    Returns:
        gate [batch, tokens, heads, head_dim]; rotated query, rotated key, and value [batch, heads, tokens, head_dim].
    """
    if _records(gqkv):
        return _SplitAndRotate.apply(gqkv, *tables)
    gate, query_key, value = gqkv.split((1, 2, 1), dim=2)
    query, key = _rotate(query_key, tables).permute(2, 0, 3, 1, 4)
    return gate.squeeze(2), query, key, value.squeeze(2).transpose(1, 2)


def _rotate(x: torch.Tensor, tables: RotaryTables) -> torch.Tensor:
    """[batch, tokens, kinds, heads, head_dim] -> the same shape."""
    if x.shape[1] == 1 or x.device.type != "cpu":
        return rotate_differentiably(x, tables)
    rotated = torch.empty_like(x, memory_format=torch.contiguous_format)
    _rotate_into(rotated, x, tables)
    return rotated


def rotate_differentiably(x: torch.Tensor, tables: RotaryTables) -> torch.Tensor:
    """x [..., head_dim] by tables that broadcast to it: cos twice, and -sin and sin, each float32."""
    wide = x.float()
    return torch.addcmul(wide * tables[0], wide.roll(x.shape[-1] // 2, dims=-1), tables[1]).to(x.dtype)


def _rotate_into(rotated: torch.Tensor, x: torch.Tensor, tables: RotaryTables) -> None:
    half = x.shape[-1] // 2
    cos, sin = tables[0][..., half:], tables[1][..., half:]
    first, second = x[..., :half].float(), x[..., half:].float()
    rotated[..., :half] = (first * cos).addcmul_(second, sin, value=-1)
    rotated[..., half:] = (second * cos).addcmul_(first, sin)


class _SplitAndRotate(torch.autograd.Function):
    """Keeps nothing of its input, whose four parts views would keep whole, and writes its gradient in one piece."""

    @staticmethod
    def forward(
        ctx: Any, gqkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(cos, sin)
        query, key = (
            _rotate(part, (cos, sin)).squeeze(2).transpose(1, 2) for part in (gqkv[:, :, 1:2], gqkv[:, :, 2:3])
        )
        return gqkv[:, :, 0].clone(), query, key, gqkv[:, :, 3].transpose(1, 2).contiguous()

    @staticmethod
    def backward(
        ctx: Any, gate: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        back = (cos, -sin)
        parts = (gate, query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))
        gate, query, key, value = (part[:, :, None] for part in parts)
        if gate.device.type != "cpu" or not all(_may_write(part) for part in parts):
            rotated = (rotate_differentiably(part, back) for part in (query, key))
            return torch.cat((gate, *rotated, value), dim=2), None, None
        batch, tokens, _, heads, width = gate.shape
        gradient = gate.new_empty((batch, tokens, 4, heads, width))
        gradient[:, :, 0:1], gradient[:, :, 3:4] = gate, value
        _rotate_into(gradient[:, :, 1:2], query, back)
        _rotate_into(gradient[:, :, 2:3], key, back)
        return gradient, None, None


# ---- gates ----------------------------------------------------------------------------------------------------------


def fused_swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, [..., width], of [..., 2 * width] that holds gate and then up."""
    if _records(gate_up):
        return _SwiGLU.apply(gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


class _SwiGLU(torch.autograd.Function):
    """Keeps its input alone for backward, which makes silu(gate) anew: a third less memory than the parts take."""

    @staticmethod
    def forward(ctx: Any, gate_up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        gate_up = ctx.saved_tensors[0]
        gate, up = gate_up.chunk(2, dim=-1)
        if not _may_write(grad):
            open_part = gate.sigmoid()
            slope = open_part * (1 + gate * (1 - open_part))
            return torch.cat((grad * up * slope, grad * F.silu(gate)), dim=-1)
        gradient = torch.empty_like(gate_up, memory_format=torch.contiguous_format)
        of_gate, of_up = gradient.chunk(2, dim=-1)
        torch.mul(F.silu(gate), grad, out=of_up)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=of_gate)
        return gradient


def fused_gate(output: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """output * sigmoid(gate), of one shape."""
    return output * gate.sigmoid() if _records(output, gate) else gate.sigmoid().mul_(output)


# ---- one row times a matrix -----------------------------------------------------------------------------------------

# Smaller weights stay in the processor's caches, and the call costs more than the product.
_LEAST_ELEMENTS = 1 << 20
# Two ways that are about as fast should not take turns from one process to the next.
_VECTOR_MARGIN = 1.1
_TIMED_OUTPUTS, _TIMED_ROWS_RUNS = 4096, 9


def linear(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """`module(x)`, read row by row where that is faster; [..., in_features] -> [..., out_features].

    `F.linear` hands one row of bfloat16 to oneDNN's general product, which reads the weight in tiles; torch's product
    of a matrix and a vector reads it row by row, on some processors at the full speed of memory where the other comes
    to two thirds. A module that is more than the product with a plain weight is called.
    """
    if x.numel() == x.shape[-1] and _is_one_product(module, x):
        return torch.mv(module.weight, x.reshape(-1)).view(*x.shape[:-1], -1)
    return module(x)


def _is_one_product(module: nn.Module, x: torch.Tensor) -> bool:
    """Whether the product with the weight is all that the call does, and is to be served here."""
    # Adapters, quantizers, parametrizations and packed weights change the type, offloading the `forward`.
    if type(module) is not nn.Linear or x.dtype is not torch.bfloat16 or not serves(x):
        return False
    weight = module.weight
    if type(weight) is not nn.Parameter or weight.device.type != "cpu" or weight.dtype is not x.dtype:
        return False
    if module.bias is not None or weight.numel() < _LEAST_ELEMENTS or not weight.is_contiguous():
        return False
    if has_own_call(module) or _records(x, weight):
        return False
    return vector_is_faster(min(weight.shape[0], _TIMED_OUTPUTS), weight.shape[1], torch.get_num_threads())


def has_own_call(module: nn.Module) -> bool:
    """Whether calling the module does more than its class's `forward`: hooks, or a `forward` put in its place."""
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return bool(hooks or _global_forward_hooks or _global_forward_pre_hooks or "forward" in vars(module))


@functools.cache
def vector_is_faster(outputs: int, inputs: int, threads: int) -> bool:
    """Times both ways on a bfloat16 weight [outputs, inputs], once in a process; takes some milliseconds.

    Args:
        threads: of torch, to measure again when it changes.
    """
    with torch.no_grad():
        weight = torch.ones(outputs, inputs, dtype=torch.bfloat16)
        row = torch.ones(inputs, dtype=torch.bfloat16)
        runs = (lambda: F.linear(row[None], weight), lambda: torch.mv(weight, row))
        stock, vector = least_seconds(runs, times=_TIMED_ROWS_RUNS)
    return vector * _VECTOR_MARGIN < stock


# ---- few rows times a packed matrix ---------------------------------------------------------------------------------

_MOST_FEW_ROWS, _ROWS_MARGIN, _TIMED_ROW_COUNTS_RUNS = 6, 1.05, 5
# Products in turn, so that the processor's caches hold none of their weights.
_MOST_TIMED_PRODUCTS = 32
# By the dtype of the inputs and the threads of torch: the element r says how many rows r rows become.
_row_counts: dict[tuple[torch.dtype, int], tuple[int, ...]] = {}


def rows_to_multiply(rows: int, weight: torch.Size, dtype: torch.dtype) -> int:
    """How many rows to multiply with a weight [out, in] where there are so many, of this dtype.

    One or two rows wait for the memory that the weight is read from. oneDNN's kernels for five rows ask for more of it
    at a time, on some processors so much that all five take less time than one.
    """
    if not 0 < rows < _MOST_FEW_ROWS or weight.numel() < _LEAST_ELEMENTS:
        return rows
    counts = _row_counts.get((dtype, torch.get_num_threads()))
    return rows if counts is None else counts[rows]


@torch.no_grad()
def measure_rows(products: Sequence[tuple[Callable[[torch.Tensor], Any], torch.Size]], dtype: torch.dtype) -> None:
    """Times products of few rows, once in a process for a dtype; takes a fraction of a second.

    Args:
        products: pairs of a function of rows [count, in] and the shape [out, in] of the weight; small ones are left
            out, as in `rows_to_multiply`.
        dtype: of the rows.
    """
    key = dtype, torch.get_num_threads()
    large = [product for product in products if product[1].numel() >= _LEAST_ELEMENTS][:_MOST_TIMED_PRODUCTS]
    if key in _row_counts or len(large) < 2:
        return
    inputs = [(product, torch.ones(_MOST_FEW_ROWS, shape[1], dtype=dtype)) for product, shape in large]

    def run(count: int) -> None:
        for product, rows in inputs:
            product(rows[:count])

    runs = [functools.partial(run, count) for count in range(1, _MOST_FEW_ROWS + 1)]
    seconds = [0.0, *least_seconds(runs, times=_TIMED_ROW_COUNTS_RUNS)]
    counts = list(range(_MOST_FEW_ROWS + 1))
    for rows in range(1, _MOST_FEW_ROWS):
        best = min(range(rows, _MOST_FEW_ROWS + 1), key=seconds.__getitem__)
        if seconds[best] * _ROWS_MARGIN < seconds[rows]:
            counts[rows] = best
    _row_counts[key] = tuple(counts)


# ---- attention of one query -----------------------------------------------------------------------------------------

# Below this many keys there is little to gain.
_LEAST_KEYS = 32
# From here on, the ratios no longer change, and copies in float32 would fill the memory rather than the caches.
_MOST_TIMED_KEYS = 4096
# How much faster a way has to be than the stock kernel, which also keeps the choice the same from run to run. Products
# in the cache's dtype round the scores to it, which the other two do not: they have to be worth it.
_WIDE_MARGIN, _PRODUCTS_MARGIN = 1.05, 1.2
_TIMED_HEADS, _TIMED_QUERIES, _TIMED_QUERY_RUNS = 12, 4, 7
# Between two layers' attention the weights pass through the processor's caches, which then hold no keys. This many
# elements, read in turn, see to the same.
_COLD_ELEMENTS = 1 << 25

_rooms = threading.local()

QueryAttention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, "torch.Tensor | None", float], torch.Tensor]


def single_query_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scaling: float
) -> torch.Tensor:
    """Attention of one query a row as two batched matrix products, softmax in float32.

    For a single query the stock kernel calls a small matrix product of MKL for each head and 512 keys. On processors
    that MKL does not favour this reads a bfloat16 cache at a tenth of the memory's speed.

    Args:
        query: [batch, heads, 1, head_dim].
        key, value: [batch, heads, keys, head_dim], also views of a longer storage.
        mask: broadcasting to [batch, heads, 1, keys]; bool, True where the query sees the key, or floats that are
            added to the scores; None for all.
        scaling: factor on the scores.

    Returns:
        [batch, heads, 1, head_dim].
    """
    batch, heads, _, head_dim = query.shape
    # Batch and heads merge without a copy: rows of a storage lie at equal distances.
    scores = torch.bmm(key.flatten(0, 1), query.reshape(batch * heads, head_dim, 1)).view(batch, heads, 1, -1).float()
    weights = _weights(scores * scaling, mask).to(value.dtype)
    return torch.bmm(weights.flatten(0, 1), value.flatten(0, 1)).view(query.shape)


def wide_single_query_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scaling: float
) -> torch.Tensor:
    """As `single_query_attention`, in float32 throughout; for keys and values whose copies fit into the caches."""
    # One room for both, kept: the copies are as large as what the allocator hands back to the system each time.
    room = _room(key.numel()).view(-1, *key.shape[2:])
    scores = torch.bmm(query.flatten(0, 1).float() * scaling, room.copy_(key.flatten(0, 1)).mT)
    weights = _weights(scores.view(*query.shape[:3], -1), mask)
    output = torch.bmm(weights.flatten(0, 1), room.copy_(value.flatten(0, 1)))
    return output.to(query.dtype).view(query.shape)


def _room(elements: int) -> torch.Tensor:
    """float32 [elements], whose values are whatever was left there."""
    held = getattr(_rooms, "held", None)
    if held is None or len(held) < elements:
        with torch.inference_mode(False):
            held = _rooms.held = torch.empty(1 << (elements - 1).bit_length())
    return held[:elements]


def _weights(scores: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype is torch.bool else scores + mask
    return scores.softmax(dim=-1)


def attention_of_one_query(query: torch.Tensor, key: torch.Tensor) -> QueryAttention | None:
    """The function that is to serve this call instead of the stock kernel, if one is."""
    if query.shape[2] != 1 or key.shape[2] < _LEAST_KEYS or query.dtype is not torch.bfloat16:
        return None
    if not serves(query) or type(key) is not torch.Tensor or _records(query, key) or torch.is_autocast_enabled("cpu"):
        return None
    # What counts is how much is read, whether many rows or long ones.
    keys = max(_LEAST_KEYS, key.shape[0] * key.shape[1] * key.shape[2] // _TIMED_HEADS)
    return fastest_attention(
        query.shape[3], torch.get_num_threads(), min(1 << (keys.bit_length() - 1), _MOST_TIMED_KEYS)
    )


@functools.cache
def fastest_attention(head_dim: int, threads: int, keys: int) -> QueryAttention | None:
    """Times all ways on bfloat16 keys and values, once in a process; takes some milliseconds.

    Args:
        head_dim: of the model.
        threads: of torch, to measure again when it changes.
        keys: how many; a power of two, so that a growing cache asks few times.

    Returns:
        None for the stock kernel.
    """

    def stock(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any) -> torch.Tensor:
        return F.scaled_dot_product_attention(query, key, value)

    def run(way: Callable[..., torch.Tensor]) -> None:
        for _ in range(_TIMED_QUERIES):
            way(query, next(storages), next(storages), None, 1.0)

    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        query = torch.randn(1, _TIMED_HEADS, 1, head_dim, generator=generator).to(torch.bfloat16)
        shape = (1, _TIMED_HEADS, keys, head_dim)
        room = torch.ones(max(2 * _TIMED_QUERIES, _COLD_ELEMENTS // math.prod(shape)), *shape, dtype=torch.bfloat16)
        storages = itertools.cycle(room)
        ways = {stock: 1.0, single_query_attention: _PRODUCTS_MARGIN}
        if keys < _MOST_TIMED_KEYS:
            ways[wide_single_query_attention] = _WIDE_MARGIN
        seconds = least_seconds([functools.partial(run, way) for way in ways], times=_TIMED_QUERY_RUNS)
    best = min(zip(ways, seconds), key=lambda pair: pair[1] * ways[pair[0]])[0]
    return None if best is stock else best


__all__ = [
    "attention_of_one_query",
    "fused_gate",
    "fused_norm",
    "fused_split_and_rotate",
    "fused_swiglu",
    "has_own_call",
    "is_eager",
    "is_enabled",
    "least_seconds",
    "linear",
    "measure_rows",
    "rotate_differentiably",
    "rows_to_multiply",
    "saves_memory",
    "serves",
    "single_query_attention",
    "use_kernels",
]
