"""Rows of relevance over the same positions as one HTML table without JavaScript.

The skeleton, the colours and the signs are those of the token heatmap
(`lenslrp.views.heatmap`). One symmetric scale holds for all rows, so that cells of different rows
can be compared.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

from lenslrp.text.visible_text import visible
from lenslrp.views.heatmap import colour_scale, framed, rgba, scale_bar, signed, token_html

if TYPE_CHECKING:
    from torch import Tensor

_HEAD = "font-weight:400;padding:1px 4px;white-space:nowrap;background:var(--llrp-bg)"
_UPRIGHT = "writing-mode:vertical-rl;transform:rotate(180deg);max-height:7em;overflow:hidden"
_CELL = (
    "min-width:1.15em;height:1.5em;padding:0;border:0;text-align:center;print-color-adjust:exact"
)
MARKED = 0.08
"""From this fraction of the scale on, a negative cell has a minus."""


def matrix_heatmap(
    rows: Sequence[str],
    remarks: Sequence[str],
    columns: Sequence[str],
    values: Tensor,
    *,
    lengths: Sequence[int],
    borders: Sequence[int] = (),
    title: str | None = None,
    scale: float | None = None,
    without_first: bool = False,
) -> str:
    """A matrix of relevance, coloured, its numbers in the cells' titles.

    Args:
        rows: what each row is called.
        remarks: a short note beside each.
        columns: the tokens as text.
        values: [row, column].
        lengths: of each row, how many of its columns there are; behind them it is empty.
        borders: columns before which a line is drawn.
        title: a line above the table.
        scale: relevance at the full colour; by default the largest absolute relevance.
        without_first: take the scale from the columns after the first.

    Raises:
        InputError: a scale that is not positive.
    """
    numbers = [row[:length] for row, length in zip(values.tolist(), lengths, strict=True)]
    largest = [
        max((abs(row[c]) for row in numbers if c < len(row) and math.isfinite(row[c])), default=0.0)
        for c in range(len(columns))
    ]
    colours = colour_scale(largest, [True] * len(largest), scale=scale, without_first=without_first)
    edges = dict.fromkeys(borders, ";border-left:2px solid var(--llrp-muted)")
    shown = [f"\u2068{visible(token)}\u2069" for token in columns]
    heads = "".join(
        f'<th scope="col" style="{_HEAD};vertical-align:bottom{edges.get(c, "")}" '
        f'title="{escape(f"{shown[c]} · position {c}")}">'
        f'<div style="{_UPRIGHT}">{token_html(token)}</div></th>'
        for c, token in enumerate(columns)
    )
    body = []
    for name, remark, row in zip(rows, remarks, numbers, strict=True):
        cells = []
        for c, value in enumerate(row):
            exact = f"{value:+.4g}" if math.isfinite(value) else signed(value, colours.limit)
            fraction = colours.fraction(value)
            colour = rgba(fraction) if math.isfinite(value) else "gray"
            mark = "\u2212" if fraction <= -MARKED else ""  # colour is not the only sign
            look = f"{_CELL};background-color:{colour}{edges.get(c, '')}"
            about = escape(f"\u2068{visible(name)}\u2069 from {shown[c]} · position {c} · {exact}")
            cells.append(f'<td style="{look}" title="{about}">{mark}</td>')
        body.append(
            f'<tr><th scope="row" style="{_HEAD};text-align:right;position:sticky;left:0">'
            f'{token_html(name)} <span class="lenslrp-note">{escape(remark)}</span></th>'
            f"{''.join(cells)}</tr>"
        )
    table = (
        '<div style="overflow-x:auto"><table style="border-collapse:collapse;font-size:.85em;'
        f'color:inherit;background:none"><thead><tr><td></td>{heads}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )
    notes = ["One scale for all rows; \u2212 marks what is negative."]
    if colours.without_first:
        first = signed(largest[0], colours.limit)
        notes = [
            "One scale for all rows, without the first position, which holds up to "
            f"{first}; \u2212 marks what is negative."
        ]
    elif colours.dominated:
        notes.append(
            "The first position outweighs every other one threefold (often an attention sink); "
            "without_first=True scales the colours by the others."
        )
    return framed("Relevance matrix", title, table, scale_bar(colours.limit), notes)
