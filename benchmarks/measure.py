"""Clocks, interleaved medians, and the limits of the machine."""

from __future__ import annotations

import gc
import os
import platform
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
    """What the runs of one variant took, in the order in which all variants took turns."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def times(self, other: Figure) -> float:
        """How many times as fast as `other`: the median over the turns, each beside the other's run of that turn.

        A shared machine may be twice as fast in one minute as in the next, which strikes both runs of a turn alike.
        """
        if len(self.seconds) != len(other.seconds):
            return other.median / self.median
        return statistics.median(b / a for a, b in zip(self.seconds, other.seconds))

    def row(self) -> dict[str, Any]:
        return {
            "median": self.median,
            "least": min(self.seconds),
            "greatest": max(self.seconds),
            "seconds": [round(value, 6) for value in self.seconds],
        }


def interleaved(
    device: str,
    runs: dict[str, Callable[[], Any]],
    rounds: int,
    after: Callable[[], Any] = lambda: None,
    steps: int = 1,
) -> dict[str, Figure]:
    """Times the runs in turn, `rounds` times after one warm-up; the order changes from round to round.

    Args:
        device: "cpu" or "cuda".
        runs: name -> what is timed.
        rounds: turns.
        after: called after each run, untimed.
        steps: a run is so many steps, and the figures are of one.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    for i in range(rounds + 1):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            taken = clock(device, runs[name])
            if i:
                seconds[name].append(taken / steps)
            after()
    return {name: Figure(tuple(values)) for name, values in seconds.items()}


def merged(parts: Sequence[dict[str, Figure]]) -> dict[str, Figure]:
    """The figures of one run after another, as those of one."""
    return {name: Figure(sum((part[name].seconds for part in parts), ())) for name in parts[0]}


def _best(device: str, run: Callable[[], Any], times: int = 7) -> float:
    run()
    return min(clock(device, run) for _ in range(times))


def read_bandwidth(device: str, gigabytes: float = 0.8) -> float:
    """Bytes a second at which the machine reads a buffer far larger than its caches, the best of two kernels."""
    count = int(gigabytes * 1e9 / 4)
    buffer = torch.ones(count, dtype=torch.float32, device=device)
    kernels = (lambda: buffer.sum(), lambda: torch.dot(buffer, buffer))
    return buffer.nbytes / min(_best(device, kernel) for kernel in kernels)


def matmul_rate(device: str, dtype: torch.dtype, rows: int, columns: int = 4096, depth: int = 4096) -> float:
    """Floating point operations a second of one matrix product [rows, depth] x [depth, columns]."""
    left = torch.randn(rows, depth).to(device, dtype)
    right = torch.randn(depth, columns).to(device, dtype)
    return 2 * rows * depth * columns / _best(device, lambda: left @ right)


def free_memory(device: str) -> float:
    """Bytes that can still be allocated."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        return float(torch.cuda.mem_get_info()[0])
    try:
        import psutil
    except ImportError:
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES"))
    return float(psutil.virtual_memory().available)


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
            name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if name in _cpu_flags()
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
