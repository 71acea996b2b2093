"""Rounding that knows what the inputs of a product are: GPTQ (Frantar et al. 2022, arXiv:2210.17323).

A column that has been rounded leaves an error in the product, which the columns that follow take over as far as their
inputs go together with its own. What goes together is in H = sum of x x^T over the inputs x. In HRM-Text a matrix
meets a token several times, once in each pass through its stack: all of them are in the sum.
"""

import torch

from .quantize import Precision, choose_scale, to_numbers


# Share of the mean diagonal that is added to it, without which rarely used columns take over anything.
_DAMPING = 0.01
# Columns whose errors are handed on together.
_BLOCK = 128
# Rows are independent of one another: so many elements are solved at a time.
_ROW_ELEMENTS = 2**24


def factor(hessian: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The order in which columns are rounded, and the upper Cholesky factor of the inverse, in that order.

    Args:
        hessian: float32 [columns, columns].

    Returns:
        order [columns], those with the largest inputs first; factor float32 [columns, columns].
    """
    hessian = hessian.clone()
    diagonal = hessian.diagonal()
    diagonal[diagonal == 0] = 1.0  # an input that is always zero: its column may be anything
    order = diagonal.argsort(descending=True, stable=True)
    hessian = hessian[order][:, order]
    mean = hessian.diagonal().mean()
    damping = _DAMPING
    while True:
        hessian.diagonal().add_(damping * mean)
        lower, failed = torch.linalg.cholesky_ex(hessian)
        if not failed:
            break
        damping *= 10
    inverse = torch.cholesky_inverse(lower)
    return order, torch.linalg.cholesky(inverse, upper=True)


def solve(weight: torch.Tensor, hessian: torch.Tensor, precision: Precision) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers and scales with a small error of the product, over the inputs that H was summed over.

    Args:
        weight: [rows, columns]; its dtype is that of the scales.
        hessian: float32 [columns, columns], the sum of x x^T.
        precision: how the weight will be stored.

    Returns:
        numbers int8 [rows, columns], scales [rows, groups].
    """
    rows, columns = weight.shape
    importance = hessian.diagonal().clamp_min(1e-12 * float(hessian.diagonal().max()) + 1e-30)
    order, upper = factor(hessian)
    numbers = torch.empty(rows, columns, dtype=torch.int8)
    scales = torch.empty(rows, columns // (precision.group or columns), dtype=weight.dtype)
    step = max(1, _ROW_ELEMENTS // columns)
    for start in range(0, rows, step):
        part = slice(start, start + step)
        numbers[part], scales[part] = _solve_rows(weight[part], importance, order, upper, precision)
    return numbers, scales


def _solve_rows(
    weight: torch.Tensor, importance: torch.Tensor, order: torch.Tensor, upper: torch.Tensor, precision: Precision
) -> tuple[torch.Tensor, torch.Tensor]:
    rows, columns = weight.shape
    group = precision.group or columns
    # Columns are not rounded in the order in which they share scales, so that all scales are chosen before.
    scales = choose_scale(
        weight.float().view(rows, -1, group), precision.bits, weight.dtype, importance.view(-1, group)
    ).squeeze(-1)
    left = weight.float()[:, order]
    numbers = torch.empty_like(left)
    group_of = order // group
    for begin in range(0, columns, _BLOCK):
        end = min(begin + _BLOCK, columns)
        errors = torch.empty(rows, end - begin)
        for column in range(begin, end):
            scale = scales[:, group_of[column]]
            number = to_numbers(left[:, column], scale, precision.bits)
            numbers[:, column] = number
            error = (left[:, column] - number * scale) / upper[column, column]
            left[:, column:end] -= error[:, None] * upper[column, column:end]
            errors[:, column - begin] = error
        left[:, end:] -= errors @ upper[begin:end, end:]
    result = torch.empty(rows, columns, dtype=torch.int8)
    result[:, order] = numbers.to(torch.int8)
    return result, scales.to(weight.dtype)
