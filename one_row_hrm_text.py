"""A linear layer of one row on the CPU, where the stock call may read a plain weight slowly.

`F.linear` hands one row of bfloat16 to oneDNN's general product, which reads the weight in tiles; torch's product of a
matrix and a vector reads it row by row, on some processors at the full speed of memory where the other comes to two
thirds. Both are timed once for a shape. `optimize_for_inference` has its own answer, see `packed_hrm_text.py`.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.module import _has_any_global_hook

from .timing_hrm_text import least_seconds, may_choose


# Smaller weights stay in the processor's caches, and the call costs more than the product.
_LEAST_ELEMENTS = 1 << 20
# Two ways that are about as fast should not take turns from one process to the next.
_MARGIN = 1.1
_TIMED_OUTPUTS, _TIMED_RUNS = 4096, 9


def project(linear: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """`linear(x)`, read row by row where that is faster; [..., in_features] -> [..., out_features]."""
    if x.numel() == x.shape[-1] and _is_plain(linear, x):
        return torch.mv(linear.weight, x.reshape(-1)).view(*x.shape[:-1], -1)
    return linear(x)


def _is_plain(linear: nn.Module, x: torch.Tensor) -> bool:
    """Whether the product with the weight is all that the call does, and is to be served here."""
    # Adapters, quantizers and packed weights change the type, offloading the `forward`, and hooks want to be called.
    if type(linear) is not nn.Linear or linear.bias is not None or x.dtype is not torch.bfloat16:
        return False
    weight = linear.weight
    if type(x) is not torch.Tensor or type(weight) is not nn.Parameter or weight.numel() < _LEAST_ELEMENTS:
        return False
    if x.device.type != "cpu" or weight.device.type != "cpu" or weight.dtype is not x.dtype:
        return False
    if linear._forward_hooks or linear._forward_pre_hooks or "forward" in vars(linear) or _has_any_global_hook():
        return False
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return False
    if not weight.is_contiguous() or not may_choose():
        return False
    return vector_is_faster(min(weight.shape[0], _TIMED_OUTPUTS), weight.shape[1], torch.get_num_threads())


@functools.cache
def vector_is_faster(outputs: int, inputs: int, threads: int) -> bool:
    """Times both ways on a bfloat16 weight [outputs, inputs], once in a process; takes some milliseconds.

    Args:
        threads: of torch, to measure again when it changes.
    """
    with torch.no_grad():
        weight = torch.ones(outputs, inputs, dtype=torch.bfloat16)
        row = torch.ones(inputs, dtype=torch.bfloat16)
        stock, vector = least_seconds(
            (lambda: F.linear(row[None], weight), lambda: torch.mv(weight, row)), times=_TIMED_RUNS
        )
    return vector * _MARGIN < stock


__all__ = ["project", "vector_is_faster"]
