"""The card that a result shows in a notebook: what it is, the numbers that matter first, a table.

One style for every result, in the colours of the token heatmap, light or dark as the page is. There
is no script. Colours and places are inline, and hold where a viewer drops style sheets.
Everything that is given as text is escaped.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import TYPE_CHECKING, Any

from lenslrp.text.visible_text import visible
from lenslrp.views.heatmap import card, rgba, signed

if TYPE_CHECKING:
    import pandas as pd

ROWS = 12
"""Rows of a table that a card shows: one screen."""

# Inline: notebooks have rules of their own for cells and lists, which would win.
_FACTS = "display:flex;flex-wrap:wrap;gap:.3em 2em;margin:.5em 0 0"
_BODY = "max-height:600px;overflow-y:auto;margin-top:.6em"  # one screen; more is scrolled
_STYLE = f"""<style>
{card("lenslrp-card")}
.lenslrp-card table{{border-collapse:collapse;font-size:.92em;margin:.5em 0 0;color:inherit;\
background:none;font-variant-numeric:tabular-nums}}
.lenslrp-card th,.lenslrp-card td{{padding:.2em .6em;border:0;\
border-bottom:1px solid var(--llrp-line);background:none;color:inherit;white-space:nowrap}}
.lenslrp-card td.long{{white-space:normal;min-width:11em}}
.lenslrp-card th,.lenslrp-card .lenslrp-note{{color:var(--llrp-muted)}}
</style>"""


@dataclass(frozen=True)
class Face:
    """What a result shows of itself.

    Attributes:
        title: what it is, in a line.
        facts: label -> number or text, the most important first.
        frame: a table, of which the first ``rows`` rows are shown, with every column.
        coloured: columns of signed numbers, drawn on one symmetric scale a column.
        notes: sentences below: units, and what is not shown.
        body: markup that this package made, between the facts and the table.
        rows: of the table.
    """

    title: str
    facts: Mapping[str, Any] = field(default_factory=dict)
    frame: pd.DataFrame | None = None
    coloured: Collection[str] = ()
    notes: Sequence[str] = ()
    body: str = ""
    rows: int = ROWS

    def html(self) -> str:
        """One ``<div class="lenslrp-card">``."""
        parts = [f'<div style="font-weight:600">{_text(self.title)}</div>']
        if self.facts:
            entries = (
                f'<div><span class="lenslrp-note" style="font-size:.85em">{_text(label)}</span><br>'
                f"<b>{_text(shown(value))}</b></div>"
                for label, value in self.facts.items()
            )
            parts.append(f'<div style="{_FACTS}">{"".join(entries)}</div>')
        if self.body:
            parts.append(f'<div style="{_BODY}">{self.body}</div>')
        hidden = 0 if self.frame is None else max(0, len(self.frame) - self.rows)
        if self.frame is not None and len(self.frame):
            parts.append(_table(self.frame.head(self.rows), self.coloured))
        more = [f"{hidden:,} more rows: .to_dataframe()"] if hidden else []
        parts += [
            f'<div class="lenslrp-note" style="font-size:.85em;margin-top:.4em">{_text(note)}</div>'
            for note in (*more, *self.notes)
        ]
        return (
            '<div class="lenslrp-card" dir="ltr" style="font-family:system-ui,sans-serif;'
            f'font-size:14px;line-height:1.45">{_STYLE}{"".join(parts)}</div>'
        )


class Shown:
    """A result that shows `face()`: in a notebook as a card, printed as a line."""

    def face(self) -> Face:
        """What is shown."""
        raise NotImplementedError

    def __repr__(self) -> str:
        face = self.face()
        facts = ", ".join(f"{label} {shown(value)}" for label, value in face.facts.items())
        return f"{type(self).__name__}({facts})"

    def _repr_html_(self) -> str:
        return self.face().html()


def shown(value: Any) -> str:
    """A cell as text: four significant digits of a float, thousands of an integer parted."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, numbers.Integral):
        return f"{int(value):,}"
    if isinstance(value, numbers.Real):
        number = float(value)
        return "–" if math.isnan(number) else f"{number:.4g}"
    if isinstance(value, list | tuple):
        return "  ".join(map(str, value))
    return "–" if value is None else str(value)


def _text(text: str) -> str:
    return f"<bdi>{escape(visible(text))}</bdi>"


def _table(frame: pd.DataFrame, coloured: Collection[str]) -> str:
    columns = []
    for name in frame.columns:
        values = frame[name].tolist()
        number = all(isinstance(v, numbers.Real) and not isinstance(v, bool) for v in values)
        cells = [shown(value) for value in values]
        look = f"text-align:{'right' if number else 'left'}"
        colours = [""] * len(cells)
        if name in coloured:
            limit = max((abs(float(v)) for v in values if math.isfinite(v)), default=0.0)
            cells = [signed(float(v), limit) for v in values]
            colours = [
                f";background:{rgba(float(v) / limit if math.isfinite(v) else 0.0)}"
                if limit
                else ""
                for v in values
            ]
        long = ' class="long"' if not number and max(map(len, cells)) > 20 else ""
        columns.append([f'<th style="{look}">{_text(str(name))}</th>'] + [
            f'<td{long} style="{look}{colour}">{_text(cell)}</td>'
            for cell, colour in zip(cells, colours, strict=True)
        ])  # fmt: skip
    head, *body = ("".join(row) for row in zip(*columns, strict=True))
    body_rows = "".join(f"<tr>{row}</tr>" for row in body)
    return (
        '<div style="overflow-x:auto"><table><thead><tr>'
        f"{head}</tr></thead><tbody>{body_rows}</tbody></table></div>"
    )
