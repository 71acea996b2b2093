"""Linear layers whose weights lie in oneDNN's packed layout, which the processor reads at memory speed.

A packed weight is the only copy: `state_dict()`, pickling and `unpack_linear` lay it out plainly again, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .timing_hrm_text import least_seconds


# A shape keeps the plain layout only where that is faster by more than this: timings of a shared machine scatter, and
# where packing does not pay it costs little.
_TOLERATED = 1.25
_TIMED_RUNS = 21


class PackedLinear(nn.Linear):
    """An `nn.Linear` without gradient for its weight, which is an opaque tensor of layout `torch._mkldnn`.

    Made by `pack_linear`, in place. Moving or casting the module unpacks the weight, and packs it again where that is
    still of use; loading a state dict does so too.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[..., in_features] -> [..., out_features]."""
        weight = self.weight
        if input.dtype is not weight.dtype or (torch.is_grad_enabled() and input.requires_grad) or input.numel() == 0:
            return F.linear(input, weight.to_dense(), self.bias)
        return torch.ops.mkldnn._linear_pointwise.default(input, weight, self.bias, "none", [], "")

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "weight"] = self.weight.to_dense()

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        unpack_linear(self)
        nn.Linear._load_from_state_dict(self, *args, **kwargs)
        pack_linear(self)

    def _apply(self, fn: Any, recurse: bool = True) -> nn.Module:
        unpack_linear(self)
        nn.Linear._apply(self, fn, recurse)
        if can_pack(self):
            pack_linear(self)
        return self

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        weight = nn.Parameter(self.weight.to_dense(), requires_grad=False)
        state["_parameters"] = {**state["_parameters"], "weight": weight}
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.weight = nn.Parameter(_packed(self.weight.detach()), requires_grad=False)


def _packed(weight: torch.Tensor) -> torch.Tensor:
    # No batch size is given: the layout then suits one row as well as a whole prompt.
    return torch.ops.mkldnn._reorder_linear_weight(weight, None)


def can_pack(module: nn.Module) -> bool:
    """Whether the module is a plain linear layer on the CPU of a dtype that this torch and processor pack."""
    if type(module) is not nn.Linear or not torch.backends.mkldnn.is_available() or not torch.backends.mkldnn.enabled:
        return False
    weight = module.weight
    if type(weight) is not nn.Parameter or weight.device.type != "cpu" or weight.layout is not torch.strided:
        return False
    if weight.dtype is torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return weight.dtype is torch.float32 and weight.numel() > 0


def pack_linear(module: nn.Linear) -> None:
    """Replaces the weight by its packed form; the plain one is freed."""
    weight = module.weight
    module._weight_requires_grad = weight.requires_grad
    module.weight = nn.Parameter(_packed(weight.detach()), requires_grad=False)
    module.__class__ = PackedLinear


def unpack_linear(module: PackedLinear) -> None:
    """Reverses `pack_linear`."""
    module.__class__ = nn.Linear
    module.weight = nn.Parameter(module.weight.to_dense(), requires_grad=module.__dict__.pop("_weight_requires_grad"))


@torch.no_grad()
def packing_pays(weight: torch.Tensor) -> bool:
    """Whether one row times this weight is right and not slower in the packed layout, measured in milliseconds."""
    row = torch.linspace(-1, 1, weight.shape[1], dtype=torch.float32).to(weight.dtype)[None]
    try:
        packed = _packed(weight)
        if not torch.equal(packed.to_dense(), weight):
            return False
        runs = (
            lambda: F.linear(row, weight),
            lambda: torch.ops.mkldnn._linear_pointwise.default(row, packed, None, "none", [], ""),
        )
        plain, ours = (run().float() for run in runs)
    except (AttributeError, RuntimeError):
        return False
    if not torch.allclose(plain, ours, rtol=2e-2, atol=2e-2 * float(plain.abs().max())):
        return False
    plain_seconds, packed_seconds = least_seconds(runs, times=_TIMED_RUNS)
    return packed_seconds <= plain_seconds * _TOLERATED


def packable(model: nn.Module) -> Iterator[nn.Linear]:
    """Linear layers of the model that can be packed; a weight that another module shares stays plain."""
    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    for module in model.modules():
        if can_pack(module) and owners[id(module.weight)] == 1:
            yield module


def pack_model(model: nn.Module) -> int:
    """Packs the linear layers for which it pays, one at a time; returns how many there are now."""
    pays: dict[tuple[Any, ...], bool] = {}
    for module in packable(model):
        key = (module.weight.shape, module.weight.dtype)
        if key not in pays:
            pays[key] = packing_pays(module.weight.detach())
        if pays[key]:
            pack_linear(module)
    return sum(isinstance(module, PackedLinear) for module in model.modules())


def unpack_model(model: nn.Module) -> None:
    """Reverses `pack_model`."""
    for module in model.modules():
        if isinstance(module, PackedLinear):
            unpack_linear(module)


__all__ = ["PackedLinear", "can_pack", "pack_linear", "pack_model", "packable", "packing_pays", "unpack_model"]
