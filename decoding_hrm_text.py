"""One new token of one row through a stack on the CPU, with little between its operations.

Between two uses of a line of code, a decoding step reads tens of megabytes of weights, which push the line out of the
processor's caches. So whatever runs between the products of a layer is read from memory anew each time: the calls of
modules, and the questions that a general layer asks, take longer than the operations themselves. This room asks them
once for a stack, and then runs its layers in one function, by the formulas of `modeling_hrm_text.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .attention_hrm_text import AttentionPlan
from .cache_hrm_text import GrowingLayer, HrmTextCache
from .compiled_hrm_text import compiled_token_through
from .kernels_hrm_text import fused_norm, fused_swiglu, has_own_call, linear, rotate_differentiably, serves
from .packed_hrm_text import packed_product


Attend = Callable[..., tuple[torch.Tensor, "torch.Tensor | None"]]


def one_token_through(
    stack: nn.Module, x: torch.Tensor, plan: AttentionPlan, cache: Any, cycle_offset: int, attend: Attend
) -> torch.Tensor | None:
    """What the layers make of one token, or None where they have to be called one by one.

    Args:
        stack: its layers are of the classes of `modeling_hrm_text.py`.
        x: [1, 1, hidden].
        plan: of the forward pass.
        cache: holds the token afterwards.
        cycle_offset: the cache slot of the first layer.
        attend: of `attention_hrm_text.py`, as the layers call it.

    Returns:
        [1, 1, hidden], before the norm at the exit.
    """
    layers = stack.layers
    if x.shape[:-1] != (1, 1) or torch.is_grad_enabled() or layers.training or not serves(x):
        return None
    if not _sees_all(plan) or type(cache) is not HrmTextCache or len(cache.layers) < cycle_offset + len(layers):
        return None
    slots = cache.layers[cycle_offset : cycle_offset + len(layers)]
    if any(map(_is_more_than_formulas, layers)) or not all(type(slot) is GrowingLayer for slot in slots):
        return None
    row, cos_sin = x.view(1, -1), tuple(table.view(-1) for table in plan.rotary)
    if stack.compiles_decoding:
        output = compiled_token_through(layers, x, cos_sin, cache, cycle_offset)
        if output is not None:
            return output
    for i, (layer, slot) in enumerate(zip(layers, slots)):
        attn, mlp = layer.attn, layer.mlp
        # [4, heads, head_dim]: gate, query, key, value
        gqkv = _multiply(attn.gqkv_proj, fused_norm(row, layer.eps)).view(4, -1, attn.head_dim)
        query, key = rotate_differentiably(gqkv[1:3], cos_sin)
        new = key[None, :, None], gqkv[3][None, :, None]
        # The first slot makes room for all where there is none.
        keys, values = cache.update(*new, cycle_offset) if i == 0 else slot.update(*new)
        output, _ = attend(plan, query[None, :, None], keys, values, gqkv[0][None, None], attn.scaling)
        row = row + _multiply(attn.o_proj, output.reshape(1, -1))
        row = row + _multiply(mlp.down_proj, fused_swiglu(_multiply(mlp.gate_up_proj, fused_norm(row, layer.eps))))
    return row.view(x.shape)


def _sees_all(plan: AttentionPlan) -> bool:
    """Whether the one query sees every key of the cache, and nobody asks for the weights."""
    if plan.backend != "sdpa" or plan.is_causal or plan.mask is not None or plan.block_queries is not None:
        return False
    others = (plan.key_length, plan.products, plan.cache_kwargs, plan.weights)
    return all(other is None for other in others) and plan.rotary[0].numel() == plan.rotary[0].shape[-1]


def _is_more_than_formulas(layer: nn.Module) -> bool:
    """Whether a call of the layer or of a part does more than its class's `forward`."""
    return has_own_call(layer) or has_own_call(layer.attn) or has_own_call(layer.mlp)


def _multiply(module: nn.Module, row: torch.Tensor) -> torch.Tensor:
    """[1, in] -> [1, out]"""
    output = packed_product(module, row)
    return linear(module, row[None])[0] if output is None else output


__all__ = ["one_token_through"]
