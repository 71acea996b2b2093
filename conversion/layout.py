"""Names and shapes of an HRM-Text checkpoint, fused (as published) and split (as transformers holds it in memory)."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod

import torch

from .errors import ConversionError


# Rows of a fused projection, in order. A single entry is a mere rename.
SPLIT_PARTS = {
    "attn.gqkv_proj": ("self_attn.gate_proj", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attn.o_proj": ("self_attn.o_proj",),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.down_proj": ("mlp.down_proj",),
}
_FUSED_OF = {part: fused for fused, parts in SPLIT_PARTS.items() for part in parts}
_LAYER_NAME = re.compile(r"(model\.[HL]_module\.layers\.(?:0|[1-9]\d{0,5})\.)([a-z_]+\.[a-z_]+)\.weight")
OUTER_NAMES = ("model.embed_tokens.weight", "model.z_L_init", "lm_head.weight")


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype of a tensor that has not been read."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Dimensions:
    """Sizes that the tensors tell: layers of a stack, hidden, intermediate, heads * head_dim, and vocabulary."""

    layers: int
    hidden: int
    intermediate: int
    attention: int
    vocabulary: int

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of the published layout with its shape, in file order."""
        layer = {
            "attn.gqkv_proj": (4 * self.attention, self.hidden),
            "attn.o_proj": (self.hidden, self.attention),
            "mlp.gate_up_proj": (2 * self.intermediate, self.hidden),
            "mlp.down_proj": (self.hidden, self.intermediate),
        }
        return {
            "model.embed_tokens.weight": (self.vocabulary, self.hidden),
            "model.z_L_init": (self.hidden,),
            **{
                f"model.{stack}_module.layers.{index}.{name}.weight": shape
                for stack in "HL"
                for index in range(self.layers)
                for name, shape in layer.items()
            },
            "lm_head.weight": (self.vocabulary, self.hidden),
        }


def split_names(name: str) -> tuple[str, ...]:
    """The split layout's names for one tensor of the published layout, in the order of its rows."""
    match = _LAYER_NAME.fullmatch(name)
    return tuple(f"{match[1]}{part}.weight" for part in SPLIT_PARTS[match[2]]) if match else (name,)


def group_names(names: Iterable[str], origin: str) -> dict[str, tuple[str, ...]]:
    """For each published name, the stored tensors that make it up: itself, or its parts.

    Args:
        names: tensor names of a file in either layout.
        origin: the file or folder, for messages.

    Raises:
        ConversionError: a name does not belong to an HRM-Text, or parts of a projection are missing or stored twice.
    """
    stored = set(names)
    groups: dict[str, tuple[str, ...]] = {}
    for name in sorted(stored):
        match = _LAYER_NAME.fullmatch(name)
        if name in OUTER_NAMES or (match and match[2] in SPLIT_PARTS):
            published, members = name, (name,)
        elif match and match[2] in _FUSED_OF:
            published = f"{match[1]}{_FUSED_OF[match[2]]}.weight"
            members = split_names(published)
        else:
            raise ConversionError(f"{origin} holds the tensor {name}, which HRM-Text does not have: remove it")
        if groups.setdefault(published, members) != members:
            raise ConversionError(f"{origin} holds {published} both fused and split: remove one of them")
        missing = [member for member in members if member not in stored]
        if missing:
            raise ConversionError(f"{origin} lacks the tensor {missing[0]}: save or download the checkpoint again")
    return groups


def measure(specs: dict[str, TensorSpec], origin: str) -> Dimensions:
    """The sizes that the tensors tell, after checking that every tensor of such a model is there in its shape.

    Args:
        specs: published name to spec.
        origin: the file or folder, for messages.

    Raises:
        ConversionError: a tensor is missing or left over, or has another shape or a dtype that is not floating.
    """

    def shape(name: str, length: int) -> tuple[int, ...]:
        if name not in specs:
            raise ConversionError(f"{origin} lacks the tensor {name}: save or download the checkpoint again")
        if len(specs[name].shape) != length or prod(specs[name].shape) == 0:
            raise ConversionError(f"{origin}: {name} has the shape {specs[name].shape}; is it an HRM-Text?")
        return specs[name].shape

    vocabulary, hidden = shape("model.embed_tokens.weight", 2)
    attention = shape("model.L_module.layers.0.attn.o_proj.weight", 2)[1]
    intermediate = shape("model.L_module.layers.0.mlp.down_proj.weight", 2)[1]
    layers = 1 + max(int(name.split(".")[3]) for name in specs if ".layers." in name)
    if layers > len(specs):
        raise ConversionError(f"{origin} lacks tensors of layers below {layers - 1}: save the checkpoint again")
    dimensions = Dimensions(layers, hidden, intermediate, attention, vocabulary)
    expected = dimensions.shapes()
    for name, wanted in expected.items():
        if shape(name, len(wanted)) != wanted:
            raise ConversionError(f"{origin}: {name} has the shape {specs[name].shape}, and {wanted} fits the others")
        dtype = specs[name].dtype
        if not dtype.is_floating_point or dtype.itemsize < 2:
            raise ConversionError(f"{origin}: {name} is {dtype}; convert the checkpoint before it was quantized")
    return dimensions
