"""Weights in 8 and 4 bits, in the format of compressed-tensors, which transformers and vLLM read.

A weight W [rows, columns] is stored as whole numbers Q and scales s, one for each row or for each group of columns, so
that W is about Q * s. The scales have the model's dtype, and Q is chosen for the scale as it is stored.

- `w8a8`: 8 bits with a scale for each row; the inputs of a product are quantized at the call, with a scale for each
  token, so that a token's answer does not depend on what else is in the batch.
- `w4a16`: 4 bits with a scale for each group of columns; inputs stay as they are.

Which of embeddings and output head are quantized too, and how, was measured: see `SCHEMES`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .errors import ConversionError
from .layout import OUTER_NAMES, TensorSpec


WORD_BITS = 32
# Rows are rounded a block at a time, in float32.
_BLOCK_ELEMENTS = 2**21
# Steps of the search for a scale of 4 bits, as factors on the one at which the largest value is just in range.
_FACTORS = tuple(0.72 + 0.03 * step for step in range(12))
EMBEDDING, _, HEAD = OUTER_NAMES


@dataclass(frozen=True)
class Precision:
    """How a weight is stored.

    Attributes:
        bits: of a whole number, 4 or 8.
        group: columns that share a scale; None is all of a row.
        activations: whether the inputs of the product are quantized too, to 8 bits with a scale for each token.
    """

    bits: int
    group: int | None = None
    activations: bool = False

    @property
    def packed(self) -> bool:
        """Whether the numbers are stored as words of 32 bits; they are bytes where the inputs are quantized too."""
        return not self.activations

    @property
    def format(self) -> str:
        """The name that compressed-tensors gives to this way of storing."""
        return "pack-quantized" if self.packed else "int-quantized"

    def specs(self, name: str, spec: TensorSpec) -> dict[str, TensorSpec]:
        """The tensors that a weight is stored as, by their names, in file order.

        Args:
            name: of the weight, ending in `.weight`.
            spec: of the weight, [rows, columns], with the dtype of the scales.

        Raises:
            ConversionError: groups, or words, do not divide the columns.
        """
        rows, columns = spec.shape
        group = self.group or columns
        if columns % group:
            raise ConversionError(
                f"--group-size {group} does not divide the {columns} columns of {name}: choose a divisor"
            )
        scale = {f"{name}_scale": TensorSpec((rows, columns // group), spec.dtype)}
        if not self.packed:
            return {name: TensorSpec(spec.shape, torch.int8), **scale}
        if columns * self.bits % WORD_BITS:
            raise ConversionError(
                f"--quantize: the {columns} columns of {name} fill no whole words of {WORD_BITS} bits; choose w8a8"
            )
        words = TensorSpec((rows, columns * self.bits // WORD_BITS), torch.int32)
        return {f"{name}_packed": words, **scale, f"{name}_shape": TensorSpec((2,), torch.int64)}

    def arguments(self) -> dict[str, Any]:
        """A scheme of a `quantization_config`, less its targets."""
        weights = {
            "num_bits": self.bits,
            "type": "int",
            "symmetric": True,
            "strategy": "channel" if self.group is None else "group",
            "dynamic": False,
            "observer": None,
        }
        if self.group is not None:
            weights["group_size"] = self.group
        inputs = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
        inputs["observer"] = None
        return {"weights": weights, "input_activations": inputs if self.activations else None, "format": self.format}


@dataclass(frozen=True)
class Scheme:
    """What is quantized how: the projections of the layers, the output head and the embeddings; None stays whole."""

    name: str
    layers: Precision
    head: Precision | None
    embedding: Precision | None

    @property
    def group_size(self) -> int | None:
        """Columns of the layers' projections that share a scale; None is a whole row."""
        return self.layers.group

    def lines(self, method: str, quality: list[str] | None) -> list[str]:
        """What was done, for the card, and the figures of how well that went, None where nothing was measured."""
        parts = {"projections of the layers": self.layers, "lm_head": self.head, "embed_tokens": self.embedding}
        done = ", ".join(f"{part} {_described(precision)}" for part, precision in parts.items())
        return [f"{self.name}, {method}: {done}; z_L_init as it was", *(quality or ())]

    def of(self, name: str) -> Precision | None:
        """The precision of a tensor, in either layout; None where it stays as it is."""
        if name in (EMBEDDING, HEAD):
            return self.embedding if name == EMBEDDING else self.head
        return self.layers if ".layers." in name else None

    def specs(self, specs: Mapping[str, TensorSpec], dtype: torch.dtype) -> dict[str, TensorSpec]:
        """Every tensor of the output, for those of a plain one and the dtype of the scales.

        Raises:
            ConversionError: as of `Precision.specs`.
        """
        stored: dict[str, TensorSpec] = {}
        for name, spec in specs.items():
            precision = self.of(name)
            stored |= {name: spec} if precision is None else precision.specs(name, TensorSpec(spec.shape, dtype))
        return stored

    def config(self) -> dict[str, Any]:
        """`quantization_config` of config.json."""
        # Patterns, since vLLM and transformers' own class call the modules otherwise.
        targets = {r"re:.*layers\.\d+\..*_proj$": self.layers, r"re:.*lm_head$": self.head}
        targets[r"re:.*embed_tokens$"] = self.embedding
        groups: dict[Precision, list[str]] = {}
        for target, precision in targets.items():
            if precision is not None:
                groups.setdefault(precision, []).append(target)
        formats = {precision.format for precision in groups}
        return {
            "quant_method": "compressed-tensors",
            "quantization_status": "compressed",
            "format": formats.pop() if len(formats) == 1 else "mixed-precision",
            "ignore": [] if self.head else ["lm_head"],
            "config_groups": {
                f"group_{index}": {"targets": targets, **precision.arguments()}
                for index, (precision, targets) in enumerate(groups.items())
            },
        }


def _described(precision: Precision | None) -> str:
    if precision is None:
        return "as they were"
    shared = "row" if precision.group is None else f"{precision.group} columns of a row"
    inputs = ", its inputs in 8 bits with a scale for each token" if precision.activations else ""
    return f"in {precision.bits} bits with a scale for each {shared}{inputs}"


def requested_scheme(request: Mapping[str, Any]) -> Scheme:
    """The scheme of a request, as of `verify.verify`."""
    wanted = request["quantization"]
    return make_scheme(wanted["name"], wanted["group_size"], "fused" if request["remote_code"] else "split")


GROUP_SIZE = 32
# Bits of embeddings and head: KL of HRM-Text-Nano to itself in float32, over answers to 64 held-out questions. The
# layers alone come to 3.0e-5 with w8a8 and 6.1e-4 with w4a16. On top of that,
#   w8a8:  head in 8 bits 3.3e-5, embeddings too 9.5e-5: one of the two makes the 1B 1.28 GB;
#   w4a16: head in 4 bits 6.8e-4, embeddings in 8 bits 6.2e-4, in 4 bits 1.1e-3: the first two make the 1B 0.71 GB.
SCHEMES = ("w8a8", "w4a16")


def make_scheme(name: str, group_size: int | None = None, layout: str = "fused") -> Scheme:
    """The scheme of this name.

    Args:
        name: one of `SCHEMES`.
        group_size: columns that share a scale in 4 bits; None is 32.
        layout: `fused` or `split`; transformers' own class, which reads the second, cannot load packed embeddings.

    Raises:
        ConversionError: an unknown name, or a group size where there are no groups or that is none.
    """
    if name not in SCHEMES:
        raise ConversionError(f"--quantize {name!r} is unknown: choose one of {', '.join(SCHEMES)}")
    if name == "w8a8":
        if group_size is not None:
            raise ConversionError("--group-size is for w4a16: w8a8 has a scale for each row")
        return Scheme(name, Precision(8, activations=True), Precision(8, activations=True), None)
    group_size = GROUP_SIZE if group_size is None else group_size
    if type(group_size) is not int or group_size < 8 or group_size % 8:
        raise ConversionError(f"--group-size {group_size!r} is no multiple of 8: choose 32, 64 or 128")
    embedding = Precision(8) if layout == "fused" else None
    return Scheme(name, Precision(4, group_size), Precision(4, group_size), embedding)


# ---- numbers and scales ---------------------------------------------------------------------------------------------


def limits(bits: int) -> tuple[int, int]:
    """The least and the largest number of so many bits."""
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def usable(scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The scale rounded to a dtype, back in float32, and 1 where it would vanish: all of such a group is zero."""
    scale = scale.to(dtype).float()
    return torch.where(scale == 0, torch.ones_like(scale), scale)


def to_numbers(values: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    """The nearest whole numbers in range, as floats; shapes broadcast."""
    return (values / scale).round_().clamp_(*limits(bits))


def choose_scale(
    groups: torch.Tensor, bits: int, dtype: torch.dtype, importance: torch.Tensor | None = None
) -> torch.Tensor:
    """One scale for each group of values.

    In 8 bits the largest value decides. In 4 bits it gives the sign, so that it meets the end of the range which
    reaches further, and of some scales the one with the least squared error is taken.

    Args:
        groups: float32 [..., group].
        bits: of the numbers.
        dtype: in which the scale will be stored.
        importance: factors on the squared errors, broadcasting to `groups`; None is 1.

    Returns:
        float32 [..., 1], exact in `dtype`, never zero.
    """
    least, most = limits(bits)
    largest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    if bits == 8:
        return usable(largest.abs() / most, dtype)
    start, best, chosen = largest / least, None, None
    for factor in _FACTORS:
        scale = usable(start * factor, dtype)
        error = (to_numbers(groups, scale, bits) * scale - groups).square_()
        error = (error if importance is None else error * importance).sum(-1, keepdim=True)
        if best is None:
            best, chosen = error, scale
        else:
            better = error < best
            best, chosen = torch.where(better, error, best), torch.where(better, scale, chosen)
    return chosen


def round_to_nearest(weight: torch.Tensor, precision: Precision) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers int8 [rows, columns] and scales [rows, groups], in the weight's dtype, of a weight [rows, columns]."""
    rows, columns = weight.shape
    group = precision.group or columns
    numbers = torch.empty(rows, columns, dtype=torch.int8)
    scales = torch.empty(rows, columns // group, dtype=weight.dtype)
    step = max(1, _BLOCK_ELEMENTS // columns)
    for start in range(0, rows, step):
        block = weight[start : start + step].float().reshape(-1, columns // group, group)
        scale = choose_scale(block, precision.bits, weight.dtype)
        numbers[start : start + step] = to_numbers(block, scale, precision.bits).flatten(1).to(torch.int8)
        scales[start : start + step] = scale.squeeze(-1).to(weight.dtype)
    return numbers, scales


def dequantize(numbers: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The weight [rows, columns], in the scales' dtype, of numbers [rows, columns] and scales [rows, groups]."""
    rows, columns = numbers.shape
    groups = numbers.to(scales.dtype).view(rows, scales.shape[1], -1)
    return groups.mul_(scales[..., None]).view(rows, columns)


# ---- numbers in files -----------------------------------------------------------------------------------------------


def store(name: str, numbers: torch.Tensor, scales: torch.Tensor, precision: Precision) -> dict[str, torch.Tensor]:
    """The tensors of `Precision.specs`; a word holds its first number in its lowest bits, moved to be >= 0."""
    if not precision.packed:
        return {name: numbers, f"{name}_scale": scales}
    unsigned = (numbers.to(torch.int16) - limits(precision.bits)[0]).to(torch.uint8)
    if precision.bits == 4:
        unsigned = unsigned[:, ::2] | (unsigned[:, 1::2] << 4)
    words = unsigned.contiguous().view(torch.int32)
    return {f"{name}_packed": words, f"{name}_scale": scales, f"{name}_shape": torch.tensor(numbers.shape)}


def restore(name: str, stored: Mapping[str, torch.Tensor], precision: Precision) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers int8 and scales of what `store` made."""
    scales = stored[f"{name}_scale"]
    if not precision.packed:
        return stored[name], scales
    unsigned = stored[f"{name}_packed"].contiguous().view(torch.uint8)
    if precision.bits == 4:
        unsigned = torch.stack((unsigned & 15, unsigned >> 4), dim=-1).flatten(1)
    return (unsigned.to(torch.int16) + limits(precision.bits)[0]).to(torch.int8), scales
