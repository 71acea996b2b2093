"""PNG plots of a benchmark's result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.models import COMPILED, INT4, INT4_COMPILED, INT8, INT8_COMPILED, LIBRARY, OPTIMIZED, OURS


_COLOURS = {
    LIBRARY: "#9aa5b1",
    OURS: "#3f7fbf",
    OPTIMIZED: "#e07a2f",
    COMPILED: "#b5482a",
    INT8: "#dc9cc4",
    INT8_COMPILED: "#c25b9b",
    INT4: "#b299cf",
    INT4_COMPILED: "#7d4fa8",
    # Greens, the fewer bits the darker; files of earlier runs have the first.
    "llama.cpp": "#5f9e6e",
    "llama.cpp BF16": "#a3cfae",
    "llama.cpp Q8_0": "#6fb07f",
    "llama.cpp Q4_0": "#3f7f52",
    "llama.cpp Q4_K_M": "#275c38",
}
# So many labels side by side do not overlap.
_MOST_LABELS = 7
_OTHERS = ("#6b7a8f", "#8d6b94", "#b185a7", "#c3a29e")
_TITLES = {
    "prefill": "Prefill of one prompt",
    "decode": "Decoding, one step",
    "llama.cpp": "Beside llama.cpp, batch 1",
    "drafts": "Decoding, several tokens of one row at once",
    "training": "Training step",
    "bytes": "Weights",
    "cache": "Decoding with quantized caches",
    "memory": "Peak memory above the weights",
    "compile": "First compiled token",
}


def draw(result: dict[str, Any], output: Path) -> list[Path]:
    """Draws one PNG for each size: bars for each case and variant, and a line at the machine's limit.

    Args:
        result: what `benchmarks.compare` writes as JSON.
        output: path of the plots without suffix; the size is appended.

    Returns:
        The files written.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    written = []
    rows = [row for row in result["rows"] if row.get("unit") in ("s", "bytes")]
    for size in dict.fromkeys(row["size"] for row in rows):
        mine = [row for row in rows if row["size"] == size]
        sections = [name for name in _TITLES if any(row["section"] == name for row in mine)]
        if not sections:
            continue
        panels = [
            panel for name in sections for panel in _panels(name, [row for row in mine if row["section"] == name])
        ]
        figure, axes = plt.subplots(len(panels), 1, figsize=(9, 3.1 * len(panels)), squeeze=False)
        for axis, (title, shown) in zip(axes[:, 0], panels):
            _bars(axis, shown, title)
        machine = result["machine"]
        about = machine.get("gpu") or f"{machine['processor']}, {machine['threads']} threads"
        layers = f" with {result['layers_per_stack']} layers a stack" if "layers_per_stack" in result else ""
        versions = f"torch {machine['torch']}, transformers {machine['transformers']}"
        figure.suptitle(f"HRM-Text {size}{layers}: {about}\n{versions}")
        figure.tight_layout()
        path = output.with_name(f"{output.name}_{size}.png")
        figure.savefig(path, dpi=110)
        plt.close(figure)
        written.append(path)
    return written


def _panels(section: str, rows: list[dict[str, Any]]) -> list[tuple[str, list[dict[str, Any]]]]:
    """What is drawn for a section: one panel, or two where steps would vanish beside prompts."""
    title = _TITLES[section]
    kinds = [kind for kind in ("step", "prompt") if any(row["case"].startswith(kind) for row in rows)]
    if len(kinds) < 2:
        return [(title, rows)]
    return [(f"{title}: {kind}s", [row for row in rows if row["case"].startswith(kind)]) for kind in kinds]


def _bars(axis: Any, rows: list[dict[str, Any]], title: str) -> None:
    """Speed in times the library's, where every row has it, since that is measured turn by turn; else what it took."""
    cases = list(dict.fromkeys(row["case"] for row in rows))
    variants = list(dict.fromkeys(row["variant"] for row in rows))
    colours = {name: _COLOURS.get(name, _OTHERS[i % len(_OTHERS)]) for i, name in enumerate(variants)}
    width = 0.8 / len(variants)
    as_speed = rows[0]["unit"] == "s" and all("times_library" in row for row in rows)
    scale, unit = (1e9, "GB") if rows[0]["unit"] == "bytes" else (1, "seconds")
    for i, variant in enumerate(variants):
        places, heights, labels = [], [], []
        for place, case in enumerate(cases):
            for row in rows:
                if (row["case"], row["variant"]) == (case, variant):
                    places.append(place + (i - (len(variants) - 1) / 2) * width)
                    heights.append(row["times_library"] if as_speed else row["median"] / scale)
                    times = row.get("times_library")
                    labels.append(f"{times:.2f}{'' if as_speed else 'x'}" if times else "")
        bars = axis.bar(places, heights, width * 0.92, color=colours[variant], label=variant)
        axis.bar_label(bars, labels, fontsize=6.5, padding=1, rotation=90 if len(variants) > _MOST_LABELS else 0)
    line = {"colors": "black", "linestyles": "dotted", "linewidth": 1.2}
    for place, case in enumerate(cases):
        reference = next((row for row in rows if row["case"] == case and "limit" in row), None)
        if reference is not None and as_speed:
            axis.hlines(1 / reference["of_limit"], place - 0.42, place + 0.42, **line)
        elif reference is not None:
            # Fewer bits have a limit of their own.
            for i, variant in enumerate(variants):
                row = next((row for row in rows if (row["case"], row["variant"]) == (case, variant)), {})
                if "limit" in row:
                    left = place + (i - len(variants) / 2) * width
                    axis.hlines(row["limit"] / scale, left, left + width, **line)
    axis.set_xticks(range(len(cases)), [case.replace(", ", "\n") for case in cases], fontsize=7)
    axis.set_title(
        f"{title} (dotted: the machine's limit)" if any("limit" in row for row in rows) else title, fontsize=10
    )
    axis.set_ylabel("times the library's speed" if as_speed else unit, fontsize=8)
    axis.margins(y=0.15)
    # Beside the bars, which it would hide.
    axis.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
