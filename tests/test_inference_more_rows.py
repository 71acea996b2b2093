"""Few rows multiplied with rows of zeros below: the same outputs, where a measurement says that it is faster."""

from __future__ import annotations

import time

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from .optimized_models import sibling
from .tiny import tiny_model


DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "8 bits": torch.uint8}


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture
def kernels(model, monkeypatch):
    """The room, with small weights served and nothing measured yet."""
    room = sibling(model, "kernels_hrm_text")
    monkeypatch.setattr(room, "_LEAST_ELEMENTS", 1)
    monkeypatch.setattr(room, "_row_counts", {})
    return room


def become(kernels, dtype: torch.dtype, counts: tuple[int, ...]) -> None:
    kernels._row_counts[dtype, torch.get_num_threads()] = counts


@pytest.mark.parametrize("rows", range(1, 9))
@pytest.mark.parametrize("kind", ["bfloat16", "float32"])
def test_packed_layers(model, kernels, kind, rows):
    dtype = DTYPES[kind]
    become(kernels, dtype, (0, 5, 5, 5, 6, 5))
    torch.manual_seed(0)
    layer = nn.Linear(64, 96, bias=rows % 2 == 0).to(dtype)
    x = torch.randn(2, rows, 64, dtype=dtype).mT.contiguous().mT[:1]
    with torch.no_grad():
        wanted = F.linear(x.double(), layer.weight.double(), None if layer.bias is None else layer.bias.double())
        sibling(model, "packed_hrm_text").pack_linear(layer)
        output = layer(x)
    assert output.shape == (1, rows, 96) and output.dtype is dtype
    assert (output - wanted).norm() / wanted.norm() < (1e-2 if dtype is torch.bfloat16 else 1e-6)


@pytest.mark.parametrize("digits", [1, 2])
@pytest.mark.parametrize("rows", range(1, 9))
def test_eight_bits_are_the_same_numbers(model, kernels, rows, digits):
    quantized = sibling(model, "quantized_hrm_text")
    torch.manual_seed(0)
    matrix = quantized.quantize(torch.randn(96, 64), 8, digits, keep=False)
    x = torch.randn(rows, 64)
    wanted = matrix.multiply(x, torch.float32)
    become(kernels, torch.uint8, (0, 5, 5, 5, 6, 5))
    output = matrix.multiply(x, torch.float32)
    assert output.shape == (rows, 96) and torch.equal(output, wanted)


def test_what_is_measured_decides(kernels):
    """A product that is slow for one, two and three rows, and for more than five."""
    seconds = {1: 4e-3, 2: 4e-3, 3: 4e-3, 4: 1e-3, 5: 5e-4, 6: 4e-3}
    products = [(lambda x: time.sleep(seconds[len(x)]), torch.Size((8, 8)))] * 2
    kernels.measure_rows(products, torch.bfloat16)
    counted = [kernels.rows_to_multiply(rows, torch.Size((8, 8)), torch.bfloat16) for rows in range(9)]
    assert counted == [0, 5, 5, 5, 5, 5, 6, 7, 8]
    assert kernels.rows_to_multiply(1, torch.Size((8, 8)), torch.float32) == 1


def test_it_is_measured_once_and_for_large_weights(kernels, monkeypatch):
    monkeypatch.setattr(kernels, "_LEAST_ELEMENTS", 100)
    called = []
    products = [(lambda x: called.append(len(x)), torch.Size((8, 8)))] * 4
    kernels.measure_rows(products, torch.bfloat16)
    assert not called and not kernels._row_counts
    monkeypatch.setattr(kernels, "_LEAST_ELEMENTS", 1)
    kernels.measure_rows(products, torch.bfloat16)
    before = len(called)
    kernels.measure_rows(products, torch.bfloat16)
    assert before and len(called) == before


@pytest.mark.parametrize("weights", [None, "int8"])
def test_optimizing_measures(model, kernels, monkeypatch, weights):
    monkeypatch.setattr(sibling(model, "packed_hrm_text"), "packing_pays", lambda weight: True)
    tiny_model().to(torch.bfloat16).optimize_for_inference(weights=weights)
    dtype = torch.bfloat16 if weights is None else torch.uint8
    assert (dtype, torch.get_num_threads()) in kernels._row_counts
