"""Where the nodes of an attribution graph are drawn: tokens left to right, layers bottom to top.

A row holds the nodes of one hook point; hook points without nodes take no room. A column is a
position, as wide as its fullest row; a row with more nodes than fit beside each other has several
lines.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

WIDTH, HEIGHT = 62.0, 20.0
"""Of a node, in units of the drawing."""

WIDEST_NODE = 2.5 * WIDTH
"""Of the target, which is named in full."""

GAP_X, GAP_Y, LINE = 8.0, 46.0, 26.0
ABREAST = 5
"""Nodes of one position and row beside each other."""

MARGIN = 74.0
"""On the left, where rows are named."""

_NAMED = {"token": "tokens", "target": "target"}


@dataclass(frozen=True)
class Layout:
    """Centres of nodes by id, the name of every row with its height, and the size of it all.

    y grows downwards, as in SVG.
    """

    places: Mapping[str, tuple[float, float]]
    rows: tuple[tuple[str, float], ...]
    width: float
    height: float

    def frame(self, edges: Iterable[tuple[str, str]]) -> tuple[float, float, float, float]:
        """Left, top, width and height of what holds all nodes, names of rows and curves."""
        xs = [0.0, self.width]
        for x, _ in self.places.values():
            xs += [x - WIDEST_NODE / 2, x + WIDEST_NODE / 2]
        steps = np.linspace(0.0, 1.0, 33)[:, None]
        weights = np.concatenate(
            [(1 - steps) ** 3, 3 * steps * (1 - steps) ** 2, 3 * steps**2 * (1 - steps), steps**3],
            1,
        )
        for source, target in edges:
            x = weights @ np.array(self.curve(source, target))[:, 0]
            xs += [float(x.min()) - GAP_X, float(x.max()) + GAP_X]
        return min(xs), 0.0, max(xs) - min(xs), self.height

    def curve(self, source: str, target: str) -> list[tuple[float, float]]:
        """The four points of an edge's curve; one that would run behind nodes swings out."""
        (x0, y0), (x1, y1) = self.places[source], self.places[target]
        y0, y1 = y0 - HEIGHT / 2, y1 + HEIGHT / 2
        rise = y0 - y1
        bend = max(18.0, rise * 0.45)
        swing = 0.0
        if abs(x0 - x1) < WIDTH / 2 and rise > 1.5 * GAP_Y:
            swing = (WIDTH + rise / 8) * (1 if list(self.places).index(source) % 2 else -1)
        return [(x0, y0), (x0 + swing, y0 - bend), (x1 + swing, y1 + bend), (x1, y1)]


def lay_out(nodes: pd.DataFrame) -> Layout:
    """Places for the rows of `AttributionGraph.nodes`."""
    order = {hook: index for index, hook in enumerate(nodes["hook"].drop_duplicates())}
    keys = [(layer, order[hook]) for layer, hook in zip(nodes["layer"], nodes["hook"], strict=True)]
    cells: dict[tuple[tuple[int, int], int], list[str]] = {}
    for key, position, name in zip(keys, nodes["position"], nodes["id"], strict=True):
        cells.setdefault((key, position), []).append(name)
    abreast: dict[int, int] = {}
    lines: dict[tuple[int, int], int] = {}
    for (key, position), names in cells.items():
        abreast[position] = max(abreast.get(position, 1), min(len(names), ABREAST))
        lines[key] = max(lines.get(key, 1), -(-len(names) // ABREAST))
    left, lefts = MARGIN, {}
    for position in sorted(abreast):
        lefts[position] = left
        left += abreast[position] * (WIDTH + GAP_X) + GAP_X
    bottom, heights, rows = 0.0, {}, []
    kinds = dict(zip(keys, nodes["kind"], strict=True))
    for key in sorted(lines):
        heights[key] = bottom
        middle = bottom + (lines[key] - 1) * LINE / 2
        name = _NAMED.get(kinds[key]) or f"{kinds[key]}s {key[0]}"
        rows.append((name, middle))
        bottom += lines[key] * LINE + GAP_Y
    height = bottom - GAP_Y + 2 * LINE
    places = {}
    for (key, position), names in cells.items():
        for index, name in enumerate(names):
            line, place = divmod(index, ABREAST)
            count = min(ABREAST, len(names) - line * ABREAST)
            room = abreast[position] * (WIDTH + GAP_X)
            start = lefts[position] + (room - count * (WIDTH + GAP_X)) / 2
            x = start + place * (WIDTH + GAP_X) + WIDTH / 2
            places[name] = (x, height - LINE - heights[key] - line * LINE)
    shown = tuple((name, height - LINE - y) for name, y in rows)
    return Layout(places, shown, left, height)
