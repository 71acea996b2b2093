"""Draws the rooms of this repository, its flat modules, and who imports whom, from the imports themselves.

    python docs/draw_rooms.py
    python docs/draw_rooms.py --output rooms.svg

A room stands above all rooms that it imports, as low as that allows, so every arrow points down. Arrows to one room
have its colour and run together. A box gives the lines of its file, comments and blank lines included.

Exit codes: 0 written; 1 no picture (a circle of imports, no matplotlib, a place that cannot be written); 2 wrong
arguments.
"""

from __future__ import annotations

import argparse
import ast
import json
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple


ROOT = Path(__file__).resolve().parent.parent
SUFFIX = "_hrm_text"
FORMATS = (".png", ".svg", ".pdf")
# Inches.
COLUMN, ROW, BOX = 1.62, 1.55, (1.32, 0.62)
# Columns between two boxes, a box and a bend, two bends.
GAPS = (1.0, 0.72, 0.4)


class Room(NamedTuple):
    """A flat module: its number of lines, and the rooms that it imports anywhere in its file."""

    lines: int
    imports: frozenset[str]


class Place(NamedTuple):
    """Where something stands in the picture: a room, or the bend of the arrows to a room on their way past a layer."""

    room: str
    layer: int
    is_bend: bool = False


def read_rooms(root: Path) -> dict[str, Room]:
    """The rooms of a folder by their short names, `cache` for `cache_hrm_text.py`.

    Raises:
        SyntaxError: a module that Python cannot read.
    """
    paths = {path.stem.removesuffix(SUFFIX): path for path in sorted(root.glob(f"*{SUFFIX}.py"))}
    rooms = {}
    for name, path in paths.items():
        source = path.read_text(encoding="utf-8")
        nodes = [node for node in ast.walk(ast.parse(source, str(path))) if isinstance(node, ast.ImportFrom)]
        imported = {(node.module or "").removesuffix(SUFFIX) for node in nodes if node.level == 1}
        rooms[name] = Room(len(source.splitlines()), frozenset(imported & set(paths)))
    return rooms


def find_layers(rooms: dict[str, Room]) -> dict[str, int]:
    """The layer of each room: 0 where it imports none, else one above the highest that it imports.

    Raises:
        ValueError: a circle of imports.
    """
    layers: dict[str, int] = {}

    def layer_of(name: str, above: tuple[str, ...]) -> int:
        if name in above:
            raise ValueError(f"a circle of imports: {' -> '.join([*above[above.index(name) :], name])}")
        if name not in layers:
            below = [layer_of(other, (*above, name)) for other in sorted(rooms[name].imports)]
            layers[name] = 1 + max(below, default=-1)
        return layers[name]

    for name in sorted(rooms):
        layer_of(name, ())
    return layers


def find_arrows(rooms: dict[str, Room], layers: dict[str, int]) -> list[tuple[Place, Place]]:
    """Pieces of arrows, each from one layer to the next below; those to one room share their bends."""
    pieces = set()
    for name, room in rooms.items():
        for target in room.imports:
            here = Place(name, layers[name])
            for layer in range(layers[name] - 1, layers[target] - 1, -1):
                there = Place(target, layer, is_bend=layer > layers[target])
                pieces.add((here, there))
                here = there
    return sorted(pieces)


def count_crossings(rows: list[list[Place]], arrows: list[tuple[Place, Place]]) -> int:
    """How many pairs of pieces cross when the places of each layer stand in this order."""
    order = {place: i for row in rows for i, place in enumerate(row)}
    ends = [(here.layer, order[here], order[there]) for here, there in arrows]
    return sum(
        layer == other and (top - other_top) * (bottom - other_bottom) < 0
        for i, (layer, top, bottom) in enumerate(ends)
        for other, other_top, other_bottom in ends[:i]
    )


def order_places(layers: dict[str, int], arrows: list[tuple[Place, Place]]) -> list[list[Place]]:
    """The places of each layer from left to right, lowest layer first; two swap where that uncrosses arrows."""
    places = {Place(name, layer) for name, layer in layers.items()} | {place for piece in arrows for place in piece}
    rows = [sorted(place for place in places if place.layer == layer) for layer in range(max(layers.values()) + 1)]
    fewest, improved = count_crossings(rows, arrows), True
    while improved:
        improved = False
        for row in rows:
            for i in range(len(row)):
                for k in range(i):
                    row[i], row[k] = row[k], row[i]
                    crossings = count_crossings(rows, arrows)
                    if crossings < fewest:
                        fewest, improved = crossings, True
                    else:
                        row[i], row[k] = row[k], row[i]
    return rows


def place_columns(rows: list[list[Place]], arrows: list[tuple[Place, Place]]) -> dict[Place, float]:
    """The column of each place: near those that it is joined with, at least the gap of its kind apart."""
    joined: dict[Place, list[Place]] = {place: [] for row in rows for place in row}
    for here, there in arrows:
        joined[here].append(there)
        joined[there].append(here)
    columns = {place: float(i) for row in rows for i, place in enumerate(row)}

    def settle(row: list[Place], wanted: list[float]) -> list[float]:
        offset = [0.0]
        for place, following in pairwise(row):
            offset.append(offset[-1] + GAPS[place.is_bend + following.is_bend])
        # The nearest rising sequence to what is wanted: runs that are out of order share their mean.
        runs: list[list[float]] = []
        for want, shift in zip(wanted, offset):
            runs.append([want - shift, 1])
            while len(runs) > 1 and runs[-2][0] > runs[-1][0]:
                (mean, count), (before, size) = runs.pop(), runs.pop()
                runs.append([(mean * count + before * size) / (count + size), count + size])
        means = [mean for mean, count in runs for _ in range(int(count))]
        return [mean + shift for mean, shift in zip(means, offset)]

    for _ in range(60):
        for row in rows:
            wanted = [[columns[other] for other in joined[place]] or [columns[place]] for place in row]
            columns.update(zip(row, settle(row, [sum(near) / len(near) for near in wanted])))
    return columns


def draw(rooms: dict[str, Room], output: Path) -> None:
    """Writes the picture; what is drawn stands in its metadata too, as JSON under "Description" (PNG only)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.patches import FancyBboxPatch
    from matplotlib.path import Path as Curve

    layers = find_layers(rooms)
    arrows = find_arrows(rooms, layers)
    rows = order_places(layers, arrows)
    columns = place_columns(rows, arrows)
    left, right = min(columns.values()), max(columns.values())
    width, height = (right - left + 1) * COLUMN, (len(rows) - 1) * ROW + 2 * BOX[1]
    figure = plt.figure(figsize=(width, height))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(0, height))
    axes.axis("off")
    palette = (*plt.get_cmap("tab10").colors, "black", *plt.get_cmap("Dark2").colors)
    targets = sorted({there.room for _, there in arrows})
    colour = {name: palette[i % len(palette)] for i, name in enumerate(targets)}

    def center(place: Place) -> tuple[float, float]:
        return (columns[place] - left + 0.5) * COLUMN, BOX[1] + place.layer * ROW

    def ends_at(here: Place, there: Place) -> tuple[tuple[float, float], tuple[float, float]]:
        (x, y), (to_x, to_y) = center(here), center(there)
        return (x, y - (0 if here.is_bend else BOX[1] / 2)), (to_x, to_y + (0 if there.is_bend else BOX[1] / 2))

    for here, there in arrows:
        (x, y), (to_x, to_y) = ends_at(here, there)
        if not here.is_bend:
            # Arrows leave a box side by side, in the order in which they go.
            fan = sorted((columns[other], other) for start, other in arrows if start == here)
            x += ((fan.index((columns[there], there)) + 1) / (len(fan) + 1) - 0.5) * BOX[0] * 0.9
        middle = (y + to_y) / 2
        curve = Curve([(x, y), (x, middle), (to_x, middle), (to_x, to_y)], [1, 4, 4, 4])
        style = {"color": colour[there.room], "linewidth": 1.5, "zorder": 1}
        axes.add_patch(_line(curve, style, with_head=not there.is_bend))
    for name, room in rooms.items():
        x, y = center(Place(name, layers[name]))
        corner = (x - BOX[0] / 2, y - BOX[1] / 2)
        edge = colour.get(name, "lightgray")
        shape = "round,pad=0,rounding_size=0.08"
        axes.add_patch(FancyBboxPatch(corner, *BOX, boxstyle=shape, fc="white", ec=edge, lw=2, zorder=2))
        axes.text(x, y + 0.11, name, ha="center", va="center", fontsize=11, fontweight="bold", zorder=3)
        axes.text(x, y - 0.14, f"{room.lines} lines", ha="center", va="center", fontsize=9, color="dimgray", zorder=3)
    facts = {name: [room.lines, sorted(room.imports)] for name, room in rooms.items()}
    metadata: dict[str, Any] = {"Description": json.dumps(facts), "Software": None} if output.suffix == ".png" else {}
    figure.savefig(output, dpi=110, metadata=metadata)
    plt.close(figure)


def _line(curve: Any, style: dict[str, Any], with_head: bool) -> Any:
    from matplotlib.patches import FancyArrowPatch

    head = "-|>,head_length=5,head_width=3" if with_head else "-"
    return FancyArrowPatch(path=curve, arrowstyle=head, shrinkA=0, shrinkB=0, capstyle="round", **style)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output", type=Path, default=ROOT / "docs" / "rooms.png", help="picture to write: .png, .svg or .pdf"
    )
    output = parser.parse_args(arguments).output
    if output.suffix not in FORMATS:
        parser.error(f"--output is {str(output)!r}: give a name that ends in {', '.join(FORMATS)}")
    try:
        if not output.parent.is_dir():
            raise FileNotFoundError(f"there is no folder {str(output.parent)!r}")
        draw(read_rooms(ROOT), output)
    except ImportError:
        print("no picture: matplotlib is not installed, `pip install 'matplotlib>=3.8'`", file=sys.stderr)
        return 1
    except (OSError, SyntaxError, ValueError) as error:
        print(f"no picture: {error}", file=sys.stderr)
        return 1
    print(output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
