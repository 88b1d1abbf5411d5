"""Where the nodes of an attribution graph are drawn: tokens left to right, layers bottom to top.

Each node has a cell: a column (its position, and a slot in it) and a row (its hook point, and a
line in it). Columns and rows without nodes that are shown take no room, so that a picture of few
nodes of a long prompt is small. `view.js` does the same arithmetic when others are shown.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

WIDTH, HEIGHT = 76.0, 20.0
"""Of a node, in units of the drawing."""

WIDEST_NODE = 2.5 * WIDTH
"""Of the target, which is named in full."""

GAP, LINE, RISE = 8.0, 26.0, 60.0
"""Between slots; from line to line of a row; from row to row."""

SLOTS = (0, 1, -1, 2, -2)
"""Where the nodes of one position and row stand beside each other: the first in the middle."""

SWINGS = 56.0 * np.array([0, 1, -1, 2, -2, 3, -3, 4, -4, 5, -5])
"""How far to the side an edge's curve may be drawn."""

MARGIN = 96.0
"""On the left, where rows are named."""

SIZES = {"width": WIDTH, "height": HEIGHT, "gap": GAP, "line": LINE, "rise": RISE,
         "margin": MARGIN, "swings": SWINGS.tolist()}  # fmt: skip
"""What `view.js` is told."""

Cell = tuple[int, int]

_STEPS = np.arange(1, 20)[:, None] / 20
_BLEND = np.concatenate(
    [(1 - _STEPS) ** 3, 3 * _STEPS * (1 - _STEPS) ** 2, 3 * _STEPS**2 * (1 - _STEPS), _STEPS**3], 1
)

_NAMED = {"token": "tokens", "target": "target"}


@dataclass(frozen=True)
class Grid:
    """The cells of all nodes of a graph, by id, and the names of rows."""

    columns: Mapping[str, Cell]
    rows: Mapping[str, Cell]
    names: tuple[str, ...]


@dataclass(frozen=True)
class Layout:
    """Centres of the nodes that are shown, by id, and the number and height of their rows.

    y grows downwards, as in SVG; the row of the target is at the top.
    """

    places: Mapping[str, tuple[float, float]]
    rows: Mapping[int, float]
    numbers: Mapping[str, int]
    widths: Mapping[str, float]

    def frame(self, edges: Iterable[tuple[str, str]]) -> tuple[float, float, float, float]:
        """Left, top, width and height of what holds all nodes, names of rows and curves."""
        xs: list[float] = []
        ys: list[float] = []
        for node, (x, y) in self.places.items():
            half = self.widths.get(node, WIDTH) / 2
            xs += [x - half, x + half]
            ys += [y - LINE, y + LINE]
        for source, target in edges:
            (x0, y0), (x, y1), (_, y2), (x1, y3) = self.curve(source, target)
            out = 0.75 * (x - x0)  # as far as a curve goes that swings out by x - x0
            xs += [x0, x1, x0 + out, x1 + out]
            ys += [y0, y1, y2, y3]
        left, right = min(xs) - MARGIN, max(xs) + GAP
        return left, min(ys), right - left, max(ys) - min(ys)

    def curve(self, source: str, target: str) -> list[tuple[float, float]]:
        """The four points of an edge's curve: of those that swing out more and more, the first
        that runs behind the fewest nodes."""
        (x0, y0), (x1, y1) = self.places[source], self.places[target]
        y0, y1 = y0 - HEIGHT / 2, y1 + HEIGHT / 2
        bend = max(18.0, (y0 - y1) * 0.45)
        swings = SWINGS[:, None, None]
        xs = _BLEND @ np.array([x0, x0, x1, x1]) + swings * (_BLEND[:, 1] + _BLEND[:, 2])
        ys = _BLEND @ np.array([y0, y0 - bend, y1 + bend, y1])
        others = [place for node, place in self.places.items() if node not in (source, target)]
        at = np.array(others).reshape(-1, 2, 1)
        behind = (abs(xs - at[:, 0]) < WIDTH / 2) & (abs(ys - at[:, 1]) < HEIGHT / 2)
        swing = float(SWINGS[behind.any(axis=2).sum(axis=1).argmin()])
        return [(x0, y0), (x0 + swing, y0 - bend), (x1 + swing, y1 + bend), (x1, y1)]


def spaced(cells: Iterable[Cell], near: float, far: float) -> dict[Cell, float]:
    """Offsets of cells in order: `near` from one to the next of the same group, else `far`."""
    offsets: dict[Cell, float] = {}
    last, offset = None, 0.0
    for cell in sorted(set(cells)):
        if last is not None:
            offset += near if cell[0] == last else far
        offsets[cell], last = offset, cell[0]
    return offsets


def grid(nodes: pd.DataFrame, order: Sequence[str]) -> Grid:
    """Cells for the rows of `AttributionGraph.nodes`; the first in `order` get the first slots."""
    hooks = {hook: index for index, hook in enumerate(nodes["hook"].drop_duplicates())}
    records = nodes.set_index("id")[["kind", "hook", "layer", "position"]].to_dict("index")
    keys = {node: (r["layer"], hooks[r["hook"]], r["kind"]) for node, r in records.items()}
    numbers = {key: row for row, key in enumerate(sorted(set(keys.values())))}
    names = tuple(_NAMED.get(kind) or f"{kind}s {layer}" for layer, _, kind in numbers)
    cells = {node: (numbers[keys[node]], records[node]["position"]) for node in order}
    full = Counter(cells.values())
    crowded = {position for (_, position), count in full.items() if count > 1}
    columns, rows, filled = {}, {}, Counter[Cell]()
    for node, (row, position) in cells.items():
        line, place = divmod(filled[row, position], len(SLOTS))
        filled[row, position] += 1
        # From row to row by one slot, so that fewer edges run behind the nodes between.
        slot = 1 - SLOTS[place] if row % 2 and position in crowded else SLOTS[place]
        columns[node], rows[node] = (position, slot), (row, line)
    return Grid(columns, rows, names)


def lay_out(
    nodes: pd.DataFrame, cells: Grid, shown: Iterable[str], widths: Mapping[str, float]
) -> Layout:
    """Places for the nodes that are shown; `widths` of those that are not `WIDTH` wide."""
    numbers = {node: number for number, node in enumerate(nodes["id"])}
    drawn = sorted(shown, key=numbers.__getitem__)
    across = spaced((cells.columns[node] for node in drawn), WIDTH + GAP, WIDTH + 2 * GAP)
    up = spaced((cells.rows[node] for node in drawn), LINE, RISE)
    bottom = max(up.values())
    places = {node: (across[cells.columns[node]], bottom - up[cells.rows[node]]) for node in drawn}
    rows: dict[int, float] = {}
    for (row, _), offset in up.items():
        rows.setdefault(row, bottom - offset)
    return Layout(places, rows, numbers, widths)
