"""What transformers' tensor-parallel tests need to know about the fused projections of HRM-Text."""

from __future__ import annotations

import contextlib
import importlib
from typing import Any
from unittest import mock


MIXIN = "transformers_tests.test_tensor_parallel_mixin"


def lift_model_gate() -> None:
    """Lets the distributed tests run on every model: the library runs them on the models of a list only."""
    with contextlib.suppress(ImportError):
        mixin = importlib.import_module(MIXIN)
        if hasattr(mixin, "TP_DISTRIBUTED_TEST_MODEL_TYPES"):
            mixin.TP_DISTRIBUTED_TEST_MODEL_TYPES = None


def _packed_shard(gradient: Any, parts: int, rank: int, world_size: int) -> Any:
    """This rank's rows of a gradient [parts * rows, ...]: its share of each of the packed parts, one after another."""
    import torch

    return torch.cat([part.chunk(world_size, dim=0)[rank] for part in gradient.chunk(parts, dim=0)])


def backward_impl(rank: int, *args: Any) -> None:
    """`_test_tp_backward_impl` of the library; gqkv_proj's reference gradient is cut by its four parts."""
    mixin = importlib.import_module(MIXIN)
    library_shard = mixin._reference_grad_shard

    def reference_shard(name: str, gradient: Any, local: Any, rank: int, world_size: int, *rest: Any) -> Any:
        if name.endswith("gqkv_proj.weight"):
            return _packed_shard(gradient, 4, rank, world_size)
        return library_shard(name, gradient, local, rank, world_size, *rest)

    with mock.patch.object(mixin, "_reference_grad_shard", reference_shard):
        mixin._test_tp_backward_impl(rank, *args)


def four_part_reference_gradients() -> Any:
    """Context in which the library's `test_tp_backward` starts `backward_impl` in the ranks."""
    return mock.patch.object(importlib.import_module(MIXIN), "_test_tp_backward_impl", backward_impl)
