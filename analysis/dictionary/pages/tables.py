"""Tables and bars of a unit's page, as its template takes them.

A table has `columns` (title, and whether its cells are numbers or names of units) and `rows` of
cells: a text with the class that colours it, or a list of tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import pandas as pd

from lenslrp.analysis.dictionary.unit import Histogram
from lenslrp.analysis.units.readability import UNRELATED, is_readable
from lenslrp.text.visible_text import visible
from lenslrp.views.heatmap import signed


def column(title: str, **kinds: bool) -> dict[str, Any]:
    """A column of a table: `number` or `unit` where its cells are."""
    return {"title": title, "number": False, "unit": False, **kinds}


def text(value: Any, look: str = "") -> dict[str, Any]:
    return {"text": str(value), "look": look}


def token_cell(tokens: Iterable[str], look: str = "") -> dict[str, Any]:
    """A cell that is a list of tokens."""
    return {"tokens": [visible(token) for token in tokens], "look": look}


def numbers(values: Iterable[float], *, coloured: bool = True) -> list[dict[str, Any]]:
    """Cells of one column: the digits that its largest value needs, and the colour of the sign."""
    floats = [float(v) for v in values]
    limit = max((abs(v) for v in floats if math.isfinite(v)), default=0.0)
    looks = ["pos" if v > 0 else "neg" if v < 0 else "" for v in floats]
    return [
        text("-" if math.isnan(v) else signed(v, limit), look if coloured else "")
        for v, look in zip(floats, looks, strict=True)
    ]


def tokens_table(lists: list[pd.DataFrame], title: str) -> dict[str, Any]:
    """The top and the bottom of one list of scores, beside each other.

    Tokens that are not of what makes an end readable are faint.
    """
    columns, cells = [], []
    for frame, arrow in zip(lists, "↑↓", strict=True):
        plain = is_readable(frame)
        columns += [column(arrow if plain else f"{arrow} {UNRELATED}"), column("", number=True)]
        looks = ["" if plain and s == "related" else "faint" for s in frame["status"]]
        tokens = [token_cell([t], look) for t, look in zip(frame["token"], looks, strict=True)]
        cells += [tokens, numbers(frame["score"])]
    table = {"columns": columns, "rows": list(zip(*cells, strict=True))}
    return {"title": title, "table": table}


def bars(histogram: Histogram, kind: str) -> dict[str, Any]:
    """A histogram as rectangles in a box of 460 by 120."""
    counts, edges = histogram.counts.tolist(), histogram.edges.tolist()
    low, high = edges[0], edges[-1]
    step, most = 460 / len(counts), math.log1p(max(counts, default=0)) or 1.0
    bars = []
    for i, count in enumerate(counts):
        height = 118 * math.log1p(count) / most
        if count:
            bars.append(
                {
                    "x": f"{i * step:.1f}",
                    "y": f"{120 - height:.1f}",
                    "width": f"{step - 1:.1f}",
                    "height": f"{height:.1f}",
                    "title": f"{edges[i]:+.3g} to {edges[i + 1]:+.3g}: {count}",
                }
            )
    zero = f"{460 * -low / (high - low):.1f}" if low < 0 < high else None
    alt = f"Histogram of {kind} from {low:+.3g} to {high:+.3g}."
    ends = {"low": f"{low:+.3g}", "high": f"{high:+.3g}"}
    return {"title": kind.capitalize(), "bars": bars, "zero": zero, "alt": alt, **ends}


def unit_table(frame: pd.DataFrame, title: str, value: str) -> dict[str, Any]:
    columns = [column("unit", unit=True), column(title, number=True)]
    cells = [[text(visible(name)) for name in frame["name"]], numbers(frame[value])]
    if "share" in frame:
        columns.append(column("share", number=True))
        cells.append([text(f"{share:+.1%}") for share in frame["share"]])
    if "same_sign" in frame:
        columns.append(column("same sign", number=True))
        cells.append(
            [
                text(f"{a} of {n}")
                for a, n in zip(frame["same_sign"], frame["examples"], strict=True)
            ]
        )
    return {"columns": columns, "rows": list(zip(*cells, strict=True))}
