"""Clocks, interleaved medians, and the limits of the machine."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch


def clock(device: str, run: Callable[[], Any]) -> float:
    """Seconds that `run` takes, on CUDA between two events."""
    if device != "cuda":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    begin.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1000


@dataclass(frozen=True)
class Figure:
    """What the runs of one variant took, in the order in which all variants took turns.

    Attributes:
        seconds: of each run.
        limits: the least that the machine allowed just then, measured before and after each run; empty where there is
            no such limit.
    """

    seconds: tuple[float, ...]
    limits: tuple[float, ...] = ()

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def of_limit(self) -> float | None:
        """The part of what the machine allowed: the median over the turns."""
        return statistics.median(b / a for a, b in zip(self.seconds, self.limits)) if self.limits else None

    def times(self, other: Figure) -> float:
        """How many times as fast as `other`: the median over the turns, each beside the other's run of that turn.

        A shared machine may be twice as fast in one minute as in the next, which strikes both runs of a turn alike.
        """
        if len(self.seconds) != len(other.seconds):
            return other.median / self.median
        return statistics.median(b / a for a, b in zip(self.seconds, other.seconds))

    def with_limits_times(self, factor: float) -> Figure:
        """The same seconds, each limit multiplied."""
        return Figure(self.seconds, tuple(limit * factor for limit in self.limits))

    def row(self) -> dict[str, Any]:
        row: dict[str, Any] = {
            "median": self.median,
            "least": min(self.seconds),
            "greatest": max(self.seconds),
            "seconds": [round(value, 6) for value in self.seconds],
        }
        if self.limits:
            row |= {"limit": statistics.median(self.limits), "of_limit": self.of_limit}
            row["limits"] = [round(value, 6) for value in self.limits]
        return row

    @classmethod
    def of_row(cls, row: dict[str, Any]) -> Figure:
        """What `row` was made of."""
        return cls(tuple(row["seconds"]), tuple(row.get("limits", ())))


def interleaved(
    device: str,
    runs: dict[str, Callable[[], Any]],
    rounds: int,
    after: Callable[[], Any] = lambda: None,
    steps: int = 1,
    limit: Callable[[], float] | None = None,
) -> dict[str, Figure]:
    """Times the runs in turn, `rounds` times after one warm-up.

    The order within a round is drawn anew, from a fixed seed: what a run leaves behind in the allocator and the caches
    is then nobody's advantage.

    Args:
        device: "cpu" or "cuda".
        runs: name -> what is timed.
        rounds: turns.
        after: called after each run, untimed.
        steps: a run is so many steps, and the figures are of one.
        limit: measures how many seconds the machine allows for a step just now; called between the runs.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    limits: dict[str, list[float]] = {name: [] for name in runs}
    order, names = random.Random(0), list(runs)
    for i in range(rounds + 1):
        before = limit() if limit and i else 0.0
        for name in order.sample(names, len(names)):
            taken = clock(device, runs[name])
            if i:
                seconds[name].append(taken / steps)
            if limit and i:
                now = limit()
                limits[name].append((before + now) / 2)
                before = now
            after()
    return {name: Figure(tuple(values), tuple(limits[name])) for name, values in seconds.items()}


def merged(parts: Sequence[dict[str, Figure]]) -> dict[str, Figure]:
    """The figures of one run after another, as those of one."""
    return {
        name: Figure(sum((part[name].seconds for part in parts), ()), sum((part[name].limits for part in parts), ()))
        for name in parts[0]
    }


def joined(old: Sequence[dict[str, Any]], new: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of an earlier run and of this one.

    Turns of the same size, section, case and variant add up; what is not seconds is replaced.
    """
    rows = {_key(row): row for row in old}
    for row in new:
        before = rows.get(_key(row), {})
        if "seconds" in row and "seconds" in before:
            both = merged([{"": Figure.of_row(before)}, {"": Figure.of_row(row)}])[""]
            # A ratio is of the turns of one run.
            row = {name: value for name, value in row.items() if name != "times_library"} | both.row()
        rows[_key(row)] = row
    return list(rows.values())


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row.get(name) for name in ("size", "section", "case", "variant"))


def _best(device: str, run: Callable[[], Any], times: int) -> float:
    return min(clock(device, run) for _ in range(times))


class Limits:
    """How fast the machine reads memory and multiplies matrices, at the moment of each call."""

    # Far larger than any cache; and the edge of the matrix.
    _READ_BYTES, _EDGE = 800_000_000, 4096

    def __init__(self, device: str, dtype: torch.dtype):
        self.device = device
        self.buffer = torch.ones(self._READ_BYTES // 4, dtype=torch.float32, device=device)
        self.right = torch.randn(self._EDGE, self._EDGE).to(device, dtype)
        # What is called first is slower.
        self.bytes_read()
        self.operations(16)

    def bytes_read(self) -> float:
        """Bytes a second, the best of two kernels."""
        buffer = self.buffer
        kernels = (lambda: buffer.sum(), lambda: torch.dot(buffer, buffer))
        return buffer.nbytes / min(_best(self.device, kernel, times=2) for kernel in kernels)

    def operations(self, rows: int) -> float:
        """Floating point operations a second of one matrix product, with so many rows on the left."""
        left = self.right[:rows]
        return 2 * rows * self._EDGE**2 / _best(self.device, lambda: left @ self.right, times=5)


def free_memory(device: str) -> float:
    """Bytes that can still be allocated."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        return float(torch.cuda.mem_get_info()[0])
    _trim_heap()
    try:
        import psutil
    except ImportError:
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES"))
    return float(psutil.virtual_memory().available)


def held_memory() -> float | None:
    """Bytes of main memory that this process holds; None where the system does not tell as Linux does."""
    try:
        with open("/proc/self/status", encoding="ascii") as file:
            return next(float(line.split()[1]) * 1024 for line in file if line.startswith("VmRSS:"))
    except OSError:
        return None


def _trim_heap() -> None:
    """Gives back what glibc keeps of freed memory, which other allocations of the process may not be able to use."""
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def describe_machine(device: str, threads: int) -> dict[str, Any]:
    """What a reader needs to compare figures with those of another machine."""
    import transformers

    about: dict[str, Any] = {
        "device": device,
        "processor": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": threads,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "date": time.strftime("%Y-%m-%d %H:%M", time.gmtime()),
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        about["gpu"] = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
        about["cuda"] = torch.version.cuda
    else:
        about["instructions"] = [
            name
            for name in ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_int8")
            if name in _cpu_flags()
        ]
    return about


def _cpu_info(key: str) -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith(key):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return ""


def _cpu_name() -> str:
    name, model = _cpu_info("model name"), _cpu_info("model\t")
    return f"{name} (family {_cpu_info('cpu family')}, model {model})" if name else platform.processor()


def _cpu_flags() -> Sequence[str]:
    return _cpu_info("flags").split()
