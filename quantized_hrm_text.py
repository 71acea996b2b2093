"""Matrices of 8 and 4 bits, for `optimize_for_inference(weights=...)` on a processor.

A weight is `scale[o] * values[o, i]`, with `values` in int8 and one scale for each output. With 4 bits the values are
built from codes: `values[o, i] = step[o, i // 32] * code[o, i] + least[o, i // 32]`, codes from 0 to 15, and still fit
int8. So both are multiplied by the same rule, in integers:

    x[r, i] ~ size[r] * (first[r, i] + second[r, i] / 254),   first, second in -127 ... 127
    output[r, o] = size[r] * scale[o] * sum_i (first[r, i] + second[r, i] / 254) * values[o, i]

`size[r]` is taken from row r alone, never from its neighbours: a token's answer does not depend on the batch. `second`
is left out where the inputs come from a norm. It is kept where they are products of gates, whose largest elements are
far above the others: it costs a second row in the product, and removes most of what rounding the inputs costs.

The operators are torch's own. Which one multiplies depends on the number of rows and on the processor. All of them sum
the same integers, so their outputs differ by the rounding of the sum alone. `rows_are_exact` and `codes_are_exact`
test them once in a process. Where one is missing or saturates, and where `kernels_hrm_text.py` is switched off, the
plain formula takes its place.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from transformers.utils import logging

from .kernels_hrm_text import is_enabled, measure_rows, rows_to_multiply


logger = logging.get_logger(__name__)

_LARGEST = 127
_TINY = torch.finfo(torch.float32).tiny
_ZERO = 128
# Conversion to whole numbers cuts off, so this rounds to nearest. Halves go down, like -127.5 in compressed-tensors.
_TO_NEAREST = _ZERO + 0.5 - 2**-14
# One unit of the second digit: its largest value is half a unit of the first.
_SECOND = 254
GROUP = 32
# Codes times steps may stand above the largest weight by half a step; the values still have to fit int8.
_ROOM = 118
_CODES = 15
# The 4-bit operator takes its time for each row; from here on, laying codes out in 8 bits costs less.
_MOST_ROWS_OF_CODES = 24
# Columns that are laid out at a time, so that they stay in the processor's caches until they are multiplied.
_BLOCKS_AT_A_TIME = 16
# Rows of weights that are rounded at a time, for the same reason.
_ROUNDED_ROWS = 256


# ---- rounding -------------------------------------------------------------------------------------------------------


def round_rows(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rounds to nearest with one scale a row: values int8 [out, in] and scale float32 [out]."""
    wide = weight.float()
    scale = wide.abs().amax(dim=1).clamp_min(_TINY) / _LARGEST
    return (wide / scale[:, None]).round_().to(torch.int8), scale


def round_groups(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rounds to 4-bit codes in groups of 32, with the step and offset of least squared error of those tried.

    Returns:
        codes uint8 [out, in]; step and least, int8 [out, in / 32]; scale float32 [out].
    """
    parts = [_round_groups(rows.float()) for rows in weight.split(_ROUNDED_ROWS)]
    return tuple(torch.cat(kind) for kind in zip(*parts))


def _round_groups(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    out, width = weight.shape
    scale = weight.abs().amax(dim=1, keepdim=True).clamp_min(_TINY) / _ROOM
    x = (weight / scale).view(out, width // GROUP, GROUP)
    low, high = x.aminmax(dim=-1, keepdim=True)
    widest = ((high - low) / _CODES).ceil()
    best: tuple[torch.Tensor, ...] = ()
    for narrower in range(4):
        # A narrower step cuts off the ends of a group and rounds all the others more finely.
        step = (widest - narrower).clamp_(min=1)
        least = ((low + high - _CODES * step) / 2).round_()
        least = (x - step * _codes(x, step, least)).mean(dim=-1, keepdim=True).round_()
        least = torch.minimum(least.clamp_(min=-_LARGEST), _LARGEST - _CODES * step)
        codes = _codes(x, step, least)
        error = (step * codes + least - x).square_().sum(dim=-1, keepdim=True)
        if best:
            better = error < best[0]
            best = tuple(torch.where(better, new, old) for new, old in zip((error, codes, step, least), best))
        else:
            best = (error, codes, step, least)
    _, codes, step, least = best
    values = (step * codes + least).view(out, width)
    # The scale of least squared error for these values.
    square = values.square().sum(dim=1)
    scale = torch.where(square > 0, (values * weight).sum(dim=1) / square.clamp_min(1), scale[:, 0])
    return codes.view(out, width).to(torch.uint8), step[..., 0].to(torch.int8), least[..., 0].to(torch.int8), scale


def _codes(x: torch.Tensor, step: torch.Tensor, least: torch.Tensor) -> torch.Tensor:
    return ((x - least) / step).round_().clamp_(0, _CODES)


def split_digits(
    x: torch.Tensor, digits: int, steps: float = _LARGEST, count: int = 0
) -> tuple[torch.Tensor, torch.Tensor | float]:
    """Rows as whole numbers, 128 added to each, which is how the 8-bit operator takes them; and their unit.

    Args:
        x: [rows, in].
        digits: 1 or 2.
        steps: the number that the largest element of a row becomes, before rounding.
        count: at least so many rows are returned; those behind the digits hold zeros.

    Returns:
        uint8 [digits * rows or count, in], all first digits and then all second ones; and the unit float32 [rows, 1],
        for one row a number.
    """
    rows = len(x)
    if rows == 1:  # numbers are handed on faster than tensors of one element
        size = max(torch.linalg.vector_norm(x, float("inf")).item(), _TINY) / steps
        scaled = x.float() * (1 / size)
    else:
        size = x.abs().amax(dim=-1, keepdim=True).float().clamp_(min=_TINY).div_(steps)
        scaled = x * size.reciprocal()
    make = torch.zeros if count > digits * rows else torch.empty
    numbers = make((max(count, digits * rows), x.shape[1]), dtype=torch.uint8)
    first = numbers[:rows]
    if digits == 1:
        first.copy_(scaled.add_(_TO_NEAREST))
    else:
        first.copy_(scaled + _TO_NEAREST)
        numbers[rows : 2 * rows] = scaled.add_(_ZERO).sub_(first).mul_(_SECOND).add_(_TO_NEAREST)
    return numbers, size


def split_rows(x: torch.Tensor, digits: int, steps: float = _LARGEST) -> tuple[list[torch.Tensor], torch.Tensor]:
    """`split_digits` for a compiler: digits without the 128, each float32 [..., in], and the unit float32 [..., 1]."""
    x = x.float()
    unit = x.abs().amax(-1, keepdim=True).clamp_min(_TINY) / steps
    scaled = x * unit.reciprocal()
    first = (scaled + _TO_NEAREST).floor()
    found = [first - _ZERO]
    if digits == 2:
        found.append((((scaled + _ZERO) - first) * _SECOND + _TO_NEAREST).floor() - _ZERO)
    return found, unit


def join_digits(found: Sequence[torch.Tensor]) -> torch.Tensor:
    """What digits stand for, or sums of them."""
    return found[0] if len(found) == 1 else found[0] + found[1] / _SECOND


# ---- matrices -------------------------------------------------------------------------------------------------------


class QuantizedMatrix:
    """A weight in 8 bits, with one scale a row.

    Args:
        values: int8 [out, in].
        scale: float32 [out].
        dtype: of the weight that it stands for.
        digits: of the inputs, 1 or 2.
        steps: as of `split_digits`.
        plain: the weight itself, to be given back by `to_dense`; None to free it.
        in_rows: whether the values lie as they are, for `compiled_hrm_text.py`, and not in the operator's own layout.
    """

    bits, in_rows = 8, False

    def __init__(
        self,
        values: torch.Tensor,
        scale: torch.Tensor,
        dtype: torch.dtype,
        digits: int = 1,
        steps: float = _LARGEST,
        plain: torch.Tensor | None = None,
        in_rows: bool = False,
    ):
        self.shape, self.dtype, self.scale, self.plain = values.shape, dtype, scale, plain
        self.digits, self.steps, self.keeps, self.in_rows = digits, steps, plain is not None, in_rows
        self._store(values)

    def _store(self, values: torch.Tensor) -> None:
        packs = not self.in_rows and rows_are_exact()
        self._stored = torch.ops.onednn.qlinear_prepack(values, None) if packs else values
        # The operator asks for them.
        self._zeros = torch.zeros(len(values), dtype=torch.int64)

    def store_for_operator(self) -> None:
        """Gives the values the operator's own layout, where they lay in rows."""
        if self.in_rows:
            self.in_rows = False
            self._store(self.values())

    def values(self) -> torch.Tensor:
        """int8 [out, in]."""
        return self._stored.to_dense().mT.contiguous() if self._stored.is_mkldnn else self._stored

    def dequantized(self) -> torch.Tensor:
        """What the matrix stands for, [out, in] in its dtype."""
        return (self.values().float() * self.scale[:, None]).to(self.dtype)

    def to_dense(self) -> torch.Tensor:
        """The weight before rounding where it was kept, else the rounded one."""
        return self.dequantized() if self.plain is None else self.plain

    def multiply(self, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """[..., in] -> [..., out] in a dtype."""
        rows = x.reshape(-1, x.shape[-1])
        served = is_enabled() and len(rows) > 0
        count = self._rows_to_multiply(self.digits * len(rows)) if served else 0
        digits, size = split_digits(rows, self.digits, self.steps, count)
        unit = size if isinstance(size, float) else 1.0
        sums = self._sums(digits, unit, dtype) if served else self._plain_sums(digits, unit)
        if self.digits == 2:
            second = sums[len(rows) : 2 * len(rows)]
            sums = sums[: len(rows)].add_(second, alpha=1 / _SECOND)
        elif len(sums) > len(rows):
            sums = sums[: len(rows)]
        if unit is not size:
            sums = sums.mul_(size)
        return sums.to(dtype).view(*x.shape[:-1], self.shape[0])

    def _rows_to_multiply(self, rows: int) -> int:
        return rows_to_multiply(rows, self.shape, torch.uint8) if self._stored.is_mkldnn else rows

    def linear(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """As `F.linear`, in the dtype of autocast where that is on."""
        autocast = torch.is_autocast_enabled("cpu")
        output = self.multiply(x, torch.get_autocast_dtype("cpu") if autocast else x.dtype)
        return output if bias is None else output + bias

    def _plain_sums(self, digits: torch.Tensor, unit: float) -> torch.Tensor:
        """The sums of each row of digits, float32 [digits * rows, out], by the formula itself."""
        return F.linear(digits.float().sub_(_ZERO), self.values().float()).mul_(self.scale).mul_(unit)

    def _sums(self, digits: torch.Tensor, unit: float, dtype: torch.dtype) -> torch.Tensor:
        """The same by the operator for these rows; it may round them to the dtype, where nothing is added to them."""
        if not self._stored.is_mkldnn:
            if not self.in_rows or not products_are_exact():
                return self._plain_sums(digits, unit)
            sums = torch._int_mm((digits ^ _ZERO).view(torch.int8), self._stored.mT)
            # In the same memory: what is allocated anew takes longer than the multiplication.
            return sums.view(torch.float32).copy_(sums).mul_(self.scale if unit == 1.0 else self.scale * unit)
        dtype = dtype if self.digits == 1 and dtype is torch.bfloat16 else torch.float32
        return torch.ops.onednn.qlinear_pointwise.default(
            *(digits, unit, _ZERO, self._stored, self.scale, self._zeros, None, 1.0, 0, dtype, "none", [], "")
        )

    def keeping(self, weight: torch.Tensor) -> QuantizedMatrix:
        """Itself, over another copy of the weight that it keeps, if it keeps one."""
        if self.keeps:
            self.plain = weight
        return self

    def anew(self, weight: torch.Tensor) -> QuantizedMatrix:
        """A matrix of the same kind for other values of the weight."""
        return quantize(weight, self.bits, self.digits, self.keeps, self.in_rows)

    def row_operands(self, dtype: torch.dtype) -> tuple[tuple[Any, ...], tuple[torch.Tensor, ...]] | None:
        """How `compiled_hrm_text.py` multiplies one row in a dtype: the formula, its constants, and its tensors."""
        return (("bytes", self.digits, self.steps), (self._stored, self.scale)) if self.in_rows else None

    def __reduce__(self) -> tuple[Any, ...]:
        # Without the plain weight, which the layer hands on.
        arguments = (self.values(), self.scale, self.dtype, self.digits, self.steps, None, self.in_rows)
        return type(self), arguments, {"keeps": self.keeps}


class GroupedMatrix(QuantizedMatrix):
    """A weight in 4 bits.

    Args:
        codes: uint8 [out, in], 0 to 15; `in` is a multiple of 32.
        step, least: int8 [out, in / 32].
        The others are those of `QuantizedMatrix`.
    """

    bits = 4

    def __init__(
        self,
        codes: torch.Tensor,
        step: torch.Tensor,
        least: torch.Tensor,
        scale: torch.Tensor,
        dtype: torch.dtype,
        digits: int = 1,
        plain: torch.Tensor | None = None,
    ):
        self.shape, self.dtype, self.scale, self.plain = codes.shape, dtype, scale, plain
        self.digits, self.steps, self.keeps = digits, _LARGEST, plain is not None
        # The operator multiplies (code - 8) * step + zero; both are whole numbers that bfloat16 holds exactly.
        self._codes = _packed(codes)
        pairs = (step.mT.float(), least.mT.float() + 8 * step.mT.float())
        self._groups = torch.stack(pairs, dim=-1).to(torch.bfloat16)

    def values(self) -> torch.Tensor:
        return torch.cat([part.mT for part in self._columns(self._blocks())], dim=0).contiguous()

    def _blocks(self) -> int:
        return self.shape[0] // _CODE_COLUMNS

    def _steps(self) -> tuple[torch.Tensor, torch.Tensor]:
        """step and least, int8 [groups, out]."""
        step, zero = self._groups.unbind(-1)
        return step.to(torch.int8), zero.sub(step, alpha=8).to(torch.int8)

    def _columns(self, at_a_time: int) -> Iterator[torch.Tensor]:
        """The values of so many blocks of columns at a time, int8 [in, columns]; each overwrites the one before."""
        width, half = self.shape[1], _CODE_COLUMNS // 2
        packed = self._codes.view(-1, width, half)
        step, least = self._steps()
        room = torch.empty(width, min(at_a_time, len(packed)) * _CODE_COLUMNS, dtype=torch.int8)
        for start in range(0, len(packed), at_a_time):
            part = packed[start : start + at_a_time]
            values = room[:, : len(part) * _CODE_COLUMNS]
            if values.shape[1] != room.shape[1]:
                values = torch.empty_like(values, memory_format=torch.contiguous_format)
            # Whole words are moved: 32 bytes at a time are too few for a loop of their own.
            low, high = values.view(torch.int64).view(width, -1, 2, half // 8).unbind(2)
            torch.bitwise_and(part.view(torch.int64).transpose(0, 1), _LOWER_HALVES, out=low)
            high.copy_((part >> 4).view(torch.int64).transpose(0, 1))
            here = slice(start * _CODE_COLUMNS, start * _CODE_COLUMNS + values.shape[1])
            grouped = values.view(len(step), -1, values.shape[1])
            yield torch.addcmul(least[:, None, here], grouped, step[:, None, here], out=grouped).view(values.shape)

    def _rows_to_multiply(self, rows: int) -> int:
        return rows

    def _sums(self, digits: torch.Tensor, unit: float, dtype: torch.dtype) -> torch.Tensor:
        if dtype is torch.bfloat16 and len(digits) <= _MOST_ROWS_OF_CODES:
            narrow = digits.to(torch.bfloat16).sub_(_ZERO)
            sums = torch.ops.aten._weight_int4pack_mm_for_cpu(narrow, self._codes, GROUP, self._groups)
            return (sums * self.scale).mul_(unit)
        signed = (digits ^ _ZERO).view(torch.int8)
        sums = torch.empty(len(digits), self.shape[0])
        start = 0
        for values in self._columns(_BLOCKS_AT_A_TIME):
            stop = start + values.shape[1]
            torch.mul(torch._int_mm(signed, values), self.scale[start:stop], out=sums[:, start:stop])
            start = stop
        return sums if unit == 1.0 else sums.mul_(unit)

    def row_operands(self, dtype: torch.dtype) -> tuple[tuple[Any, ...], tuple[torch.Tensor, ...]] | None:
        # The operator rounds its sums to bfloat16.
        served = dtype is torch.bfloat16
        return (("codes", self.digits), (self._codes, self._groups, self.scale)) if served else None

    def __reduce__(self) -> tuple[Any, ...]:
        values, (step, least) = self.values(), (part.mT.contiguous() for part in self._steps())
        grouped = values.view(len(values), -1, GROUP).int()
        codes = (grouped - least[..., None]).div_(step[..., None], rounding_mode="trunc").to(torch.uint8)
        arguments = (codes.view_as(values), step, least, self.scale, self.dtype, self.digits)
        return type(self), arguments, {"keeps": self.keeps}


class ScaledGroups(GroupedMatrix):
    """A weight in 4 bits with scales of its own, (code - 8) * scale of the group; inputs are not rounded.

    Args:
        codes: uint8 [out, in], 0 to 15.
        scale: [out, groups], of the dtype that the weight stands for.
    """

    def __init__(self, codes: torch.Tensor, scale: torch.Tensor):
        self.shape, self.dtype, self.scale, self.plain = codes.shape, scale.dtype, scale, None
        self.digits, self.steps, self.keeps = 0, 0.0, False
        self._width = codes.shape[1] // scale.shape[1]
        self._codes = _packed(codes)
        pairs = (scale.mT, torch.zeros_like(scale.mT))
        self._groups = torch.stack(pairs, dim=-1).to(torch.bfloat16)

    def _steps(self) -> tuple[torch.Tensor, torch.Tensor]:
        one = torch.ones(1, 1, dtype=torch.int8).expand(self.scale.mT.shape)
        return one, -8 * one

    def dequantized(self) -> torch.Tensor:
        values = self.values().to(self.dtype).view(len(self.scale), -1, self._width)
        return values.mul_(self.scale[..., None]).view(self.shape)

    def multiply(self, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1]).to(dtype)
        if is_enabled() and self.dtype is dtype is torch.bfloat16 and 0 < len(rows) <= _MOST_ROWS_OF_CODES:
            output = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, self._codes, self._width, self._groups)
        else:
            output = torch.empty(len(rows), self.shape[0], dtype=dtype)
            start = 0
            for values in self._columns(_BLOCKS_AT_A_TIME):
                stop = start + values.shape[1]
                grouped = values.to(self.dtype).view(self.scale.shape[1], self._width, -1)
                part = grouped.mul_(self.scale.mT[:, None, start:stop]).view(values.shape)
                output[:, start:stop] = rows @ part.to(dtype)
                start = stop
        return output.view(*x.shape[:-1], self.shape[0])

    def row_operands(self, dtype: torch.dtype) -> tuple[tuple[Any, ...], tuple[torch.Tensor, ...]] | None:
        served = dtype is self.dtype is torch.bfloat16
        return (("scaled codes", self._width), (self._codes, self._groups)) if served else None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ((self.values() + 8).to(torch.uint8), self.scale)


@torch.no_grad()
def quantize(
    weight: torch.Tensor, bits: int, digits: int = 1, keep: bool = True, in_rows: bool = False
) -> QuantizedMatrix:
    """Rounds a weight [out, in] to nearest.

    Args:
        bits: 8 or 4. A matrix that the 4-bit operator does not take is stored in 8 bits, with the same values.
        digits: as of `QuantizedMatrix`.
        keep: whether the matrix holds the weight itself too.
        in_rows: as of `QuantizedMatrix`; codes have one layout.
    """
    plain = weight.detach() if keep else None
    if bits == 8 or weight.shape[1] % GROUP:
        return QuantizedMatrix(*round_rows(weight), weight.dtype, digits, plain=plain, in_rows=in_rows)
    codes, step, least, scale = round_groups(weight)
    if can_store_codes(weight.shape, GROUP):
        return GroupedMatrix(codes, step, least, scale, weight.dtype, digits, plain=plain)
    grouped = codes.view(len(codes), -1, GROUP).to(torch.int8)
    values = (grouped * step[..., None] + least[..., None]).view(weight.shape)
    return QuantizedMatrix(values, scale, weight.dtype, digits, plain=plain, in_rows=in_rows)


def measure_products(matrices: Iterable[QuantizedMatrix]) -> None:
    """Has the products of few rows timed, once in a process; see `measure_rows`."""
    stored = [matrix for matrix in matrices if matrix.bits == 8 and matrix._stored.is_mkldnn] if is_enabled() else []
    products = [functools.partial(matrix._sums, unit=1.0, dtype=torch.float32) for matrix in stored]
    measure_rows(list(zip(products, (matrix.shape for matrix in stored))), torch.uint8)


# ---- operators ------------------------------------------------------------------------------------------------------

# So many outputs lie together in the 4-bit layout: for each input, the codes of the first half in the lower four bits
# of the bytes, and those of the other half in the upper four.
_CODE_COLUMNS = 64
_LOWER_HALVES = 0x0F0F0F0F0F0F0F0F


def _packed(codes: torch.Tensor) -> torch.Tensor:
    """Codes uint8 [out, in] in the 4-bit layout, uint8 [out, in / 2]; some rows at a time, since they are widened."""
    packed = torch.empty(codes.shape[0], codes.shape[1] // 2, dtype=torch.uint8)
    for rows, part in zip(packed.split(_ROUNDED_ROWS), codes.split(_ROUNDED_ROWS)):
        rows.copy_(torch.ops.aten._convert_weight_to_int4pack_for_cpu(part.int(), 1))
    return packed


def can_store_codes(shape: torch.Size, width: int) -> bool:
    """Whether the 4-bit operator takes a weight [out, in] with groups of this width."""
    return (
        shape[0] % _CODE_COLUMNS == 0 and shape[1] % width == 0 and width in (32, 64, 128, 256) and codes_are_exact()
    )


@functools.cache
def rows_are_exact() -> bool:
    """Whether the 8-bit operator is here and sums rightly: without VNNI instructions it may saturate."""
    try:
        values = torch.full((64, 256), _LARGEST, dtype=torch.int8)
        values[1::2].neg_()
        rows = torch.full((3, 256), _ZERO + _LARGEST, dtype=torch.uint8)
        rows[1:] = _ZERO - _LARGEST
        matrix = QuantizedMatrix.__new__(QuantizedMatrix)
        matrix.shape, matrix.digits = values.shape, 1
        matrix.scale, matrix._zeros = torch.ones(64), torch.zeros(64, dtype=torch.int64)
        matrix._stored = torch.ops.onednn.qlinear_prepack(values, None)
        exact = torch.equal(matrix.values(), values)
        exact = exact and torch.equal(matrix._sums(rows, 1.0, torch.float32), matrix._plain_sums(rows, 1.0))
    except (AttributeError, RuntimeError, NotImplementedError):
        exact = False
    if not exact:
        logger.warning_once(
            "this torch or processor lacks exact products of 8-bit numbers: quantized weights are multiplied by the "
            "plain formula, which is slow."
        )
    return exact


@functools.cache
def products_are_exact() -> bool:
    """Whether the product of matrices of 8-bit numbers is here and sums rightly."""
    try:
        values = torch.full((64, 256), _LARGEST, dtype=torch.int8)
        values[1::2].neg_()
        rows = torch.full((3, 256), -_LARGEST, dtype=torch.int8)
        rows[1:] = -_ZERO
        return torch.equal(torch._int_mm(rows, values.mT).long(), rows.long() @ values.long().mT)
    except (AttributeError, RuntimeError, NotImplementedError):
        return False


@functools.cache
def codes_are_exact() -> bool:
    """Whether the 4-bit operator is here, sums rightly, and has the layout that `_columns` reads."""
    try:
        generator = torch.Generator().manual_seed(0)
        codes = torch.randint(16, (2 * _CODE_COLUMNS, 2 * GROUP), generator=generator, dtype=torch.uint8)
        step = torch.randint(1, 8, (len(codes), 2), generator=generator, dtype=torch.int8)
        matrix = GroupedMatrix(codes, step, -8 * step, torch.ones(len(codes)), torch.bfloat16)
        values = ((codes.view(-1, 2, GROUP).int() - 8) * step[..., None]).view(codes.shape)
        exact = torch.equal(matrix.values().int(), values)
        rows = torch.full((1, codes.shape[1]), _ZERO, dtype=torch.uint8)
        rows[0, 5] += 1
        for dtype in (torch.bfloat16, torch.float32):
            exact = exact and torch.equal(matrix._sums(rows, 1.0, dtype)[0].float(), values[:, 5].float())
    except (AttributeError, RuntimeError, NotImplementedError):
        exact = False
    if not exact:
        logger.warning_once(
            "this torch or processor lacks a 4-bit product that this code can read: weights rounded to 4 bits are "
            "stored in 8."
        )
    return exact


__all__ = [
    "GROUP",
    "GroupedMatrix",
    "QuantizedMatrix",
    "ScaledGroups",
    "can_store_codes",
    "join_digits",
    "measure_products",
    "quantize",
    "split_rows",
]
