"""How long ways to compute the same thing take on this machine, so that the fastest can be chosen."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch


def may_choose() -> bool:
    """Whether what is faster may decide between two ways that round differently.

    Not while a graph is traced, which has to hold one of them, nor where each process is to compute the same.
    """
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
    return not (traced or torch.are_deterministic_algorithms_enabled())


def least_seconds(runs: Sequence[Callable[[], Any]], times: int) -> list[float]:
    """Runs each in turn, `times` times; the least seconds of each, which is what a busy machine distorts least."""
    least = [float("inf")] * len(runs)
    for _ in range(times):
        for i, run in enumerate(runs):
            start = time.perf_counter()
            run()
            least[i] = min(least[i], time.perf_counter() - start)
    return least


__all__ = ["least_seconds", "may_choose"]
