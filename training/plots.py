"""Curves as PNG: loss and accuracy of a training, what the recipes reach, and what adapters learn and keep."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any


def plot_curves(log: Sequence[dict[str, Any]], path: str | Path) -> None:
    """Draws what a `log.jsonl` holds: the loss, and one line for every measure that contains a slash or "exact".

    Args:
        log: entries of `read_log`.
        path: PNG to write.

    Raises:
        ImportError: matplotlib is missing.
    """
    pyplot = _pyplot()
    measures = sorted({name for entry in log for name in entry if "/" in name or "exact" in name})
    figure, axes = pyplot.subplots(1, 2 if measures else 1, figsize=(12 if measures else 7, 4.5), squeeze=False)
    losses = [(entry["step"], entry["loss"]) for entry in log if "loss" in entry]
    if losses:
        axes[0][0].plot(*zip(*losses), color="tab:blue")
    axes[0][0].set(xlabel="optimizer step", ylabel="loss per response token", yscale="log", title="training loss")
    axes[0][0].grid(alpha=0.3)
    colors = {}
    for name in measures:
        task, _, condition = name.partition("/")
        color = colors.setdefault(task, f"C{len(colors)}")
        points = [(entry["step"], 100 * entry[name]) for entry in log if name in entry]
        style = "--" if "cot" in condition else "-"
        axes[0][1].plot(*zip(*points), style, color=color, label=name.replace("/", ", "), linewidth=1.2)
    if measures:
        axes[0][1].set(xlabel="optimizer step", ylabel="answered exactly, %", title="held-out questions")
        axes[0][1].grid(alpha=0.3)
        axes[0][1].legend(fontsize=7, ncols=2)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def plot_run(log: Sequence[dict[str, Any]], trained: str, judged: str, path: str | Path) -> None:
    """Draws what a trainer works on, and beside it the held-out questions.

    Args:
        log: a trainer's `log_history`.
        trained: name of the entry on the left, as "loss" or "reward".
        judged: name of the entry on the right, a share.
        path: PNG to write.

    Raises:
        ImportError: matplotlib is missing.
    """
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 3.8))
    for place, name, scale in ((axes[0], trained, 1), (axes[1], judged, 100)):
        points = [(entry["step"], scale * entry[name]) for entry in log if name in entry]
        if points:
            place.plot(*zip(*points), color="tab:blue")
        place.set(xlabel="optimizer step")
        place.grid(alpha=0.3)
    axes[0].set(ylabel=trained, title="training")
    axes[1].set(ylabel="answered exactly, %", title="held-out questions", ylim=(0, 100))
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def plot_learned_and_kept(runs: Mapping[str, Sequence[tuple[float, float]]], path: str | Path) -> None:
    """Draws each way to train as a point with bars: the share learned of something new, and that kept of the old.

    Args:
        runs: label, and of each run the share learned and the share kept. The point is their mean, the bars go from
            the lowest to the highest.
        path: PNG to write.

    Raises:
        ImportError: matplotlib is missing.
    """
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(figsize=(8, 5))
    for number, (label, shares) in enumerate(runs.items()):
        means, bars = [], []
        for values in zip(*shares):
            middle = mean(values)
            means.append(100 * middle)
            bars.append([[100 * (middle - min(values))], [100 * (max(values) - middle)]])
        marker = "os^Dv<>PX*"[number // 10 % 10]
        name = f"{label} ({len(shares)})"
        axes.errorbar(*means, *reversed(bars), fmt=marker, color=f"C{number % 10}", label=name, capsize=2)
    axes.set(xlabel="new questions answered exactly, %", ylabel="old questions answered exactly, %")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5), title="in brackets: seeds", title_fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("curves are drawn with matplotlib: pip install matplotlib") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
