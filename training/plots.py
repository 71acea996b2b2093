"""Loss and accuracy curves as PNG."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def plot_curves(log: Sequence[dict[str, Any]], path: str | Path) -> None:
    """Draws what a `log.jsonl` holds: the loss, and one line for every measure that contains a slash or "exact".

    Args:
        log: entries of `read_log`.
        path: PNG to write.

    Raises:
        ImportError: matplotlib is missing.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("curves are drawn with matplotlib: pip install matplotlib") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

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
