"""The elementwise operations of a layer: norm, rotary embedding, SwiGLU, and the gate of attention.

Each has a form that autograd, compilers and CUDA take. On the CPU without gradients a second one writes into memory
that is at hand and needs fewer kernels, since there every kernel is a pass over memory, or for one token a call whose
code has to be fetched again after all the weights in between. Both round alike: statistics, angles and products are
float32, and the result is rounded once.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F


def _is_on_cpu(x: torch.Tensor) -> bool:
    """Whether x lies there, in a dtype that float32 is wide for; a subclass of tensors may only pretend to."""
    return type(x) is torch.Tensor and x.device.type == "cpu" and x.dtype is not torch.float64


def _in_place_pays(x: torch.Tensor) -> bool:
    """Whether the second form is to be taken."""
    return (
        _is_on_cpu(x)
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
    )


def _carries_gradient(x: torch.Tensor) -> bool:
    """Whether a function with a backward of its own is to be taken; compilers do better on the plain steps."""
    return x.requires_grad and torch.is_grad_enabled() and not torch.compiler.is_compiling()


def norm(x: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm without a weight over the last dimension: x / sqrt(mean(x^2) + eps)."""
    width = x.shape[-1]
    if _carries_gradient(x) and _is_on_cpu(x):
        return _Norm.apply(x, eps)
    if not _in_place_pays(x):
        return F.rms_norm(x, (width,), eps=eps)
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
        return torch.addcmul(gradient, wide, along, out=None if gradient.requires_grad else gradient).to(x.dtype), None


def rotary_tables(cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The factors that `rotate` takes, made once for all layers.

    Args:
        cos, sin: float32 [batch or 1, tokens, head_dim / 2].

    Returns:
        cos twice, and -sin and sin, each [batch or 1, tokens, 1, 1, head_dim].
    """
    return torch.cat((cos, cos), dim=-1)[:, :, None, None], torch.cat((-sin, sin), dim=-1)[:, :, None, None]


def rotate(x: torch.Tensor, tables: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Rotary embedding in float32, cast back to the dtype of x.

    Args:
        x: [batch, tokens, kinds, heads, head_dim], halves paired as (i, i + head_dim / 2).
        tables: of `rotary_tables`.
    """
    if x.shape[1] == 1 or not _in_place_pays(x):
        cos, sin = tables
        wide = x.float()
        return torch.addcmul(wide * cos, wide.roll(x.shape[-1] // 2, dims=-1), sin).to(x.dtype)
    rotated = torch.empty_like(x, memory_format=torch.contiguous_format)
    _rotate_into(rotated, x, tables)
    return rotated


def _rotate_into(rotated: torch.Tensor, x: torch.Tensor, tables: tuple[torch.Tensor, torch.Tensor]) -> None:
    half = x.shape[-1] // 2
    cos, sin = tables[0][..., half:], tables[1][..., half:]
    first, second = x[..., :half].float(), x[..., half:].float()
    rotated[..., :half] = (first * cos).addcmul_(second, sin, value=-1)
    rotated[..., half:] = (second * cos).addcmul_(first, sin)


def split_and_rotate(
    gqkv: torch.Tensor, tables: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """What attention takes, from the output of its one projection.

    Args:
        gqkv: [batch, tokens, 4, heads, head_dim]: gate, query, key, value.
        tables: of `rotary_tables`.

    Returns:
        gate [batch, tokens, heads, head_dim]; rotated query, rotated key, and value [batch, heads, tokens, head_dim].
    """
    if _carries_gradient(gqkv):
        return _SplitAndRotate.apply(gqkv, *tables)
    gate, query_key, value = gqkv.split((1, 2, 1), dim=2)
    query, key = rotate(query_key, tables).permute(2, 0, 3, 1, 4)
    return gate.squeeze(2), query, key, value.squeeze(2).transpose(1, 2)


class _SplitAndRotate(torch.autograd.Function):
    """Keeps nothing of its input, whose four parts views would keep whole, and writes its gradient in one piece."""

    @staticmethod
    def forward(
        ctx: Any, gqkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(cos, sin)
        query, key = (
            rotate(part, (cos, sin)).squeeze(2).transpose(1, 2) for part in (gqkv[:, :, 1:2], gqkv[:, :, 2:3])
        )
        return gqkv[:, :, 0].clone(), query, key, gqkv[:, :, 3].transpose(1, 2).contiguous()

    @staticmethod
    def backward(
        ctx: Any, gate: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        back = (cos, -sin)
        gate, query, key, value = (
            part[:, :, None] for part in (gate, query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))
        )
        if not _in_place_pays(gate):
            return torch.cat((gate, rotate(query, back), rotate(key, back), value), dim=2), None, None
        batch, tokens, _, heads, width = gate.shape
        gradient = gate.new_empty((batch, tokens, 4, heads, width))
        gradient[:, :, 0:1], gradient[:, :, 3:4] = gate, value
        _rotate_into(gradient[:, :, 1:2], query, back)
        _rotate_into(gradient[:, :, 2:3], key, back)
        return gradient, None, None


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, [..., width], of [..., 2 * width] that holds gate and then up."""
    if _carries_gradient(gate_up):
        return _SwiGLU.apply(gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up) if _in_place_pays(gate) else F.silu(gate) * up


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
        if torch.is_grad_enabled():  # for derivatives of derivatives
            open_part = gate.sigmoid()
            slope = open_part * (1 + gate * (1 - open_part))
            return torch.cat((grad * up * slope, grad * F.silu(gate)), dim=-1)
        gradient = torch.empty_like(gate_up, memory_format=torch.contiguous_format)
        of_gate, of_up = gradient.chunk(2, dim=-1)
        torch.mul(F.silu(gate), grad, out=of_up)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=of_gate)
        return gradient


def gated(output: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """output * sigmoid(gate), of one shape."""
    return gate.sigmoid().mul_(output) if _in_place_pays(gate) else output * gate.sigmoid()


__all__ = ["gated", "norm", "rotary_tables", "rotate", "split_and_rotate", "swiglu"]
