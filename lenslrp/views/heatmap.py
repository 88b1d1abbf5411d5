"""A token heatmap as HTML without JavaScript: relevance as colour behind the text it belongs to.

The picture of the LRP literature: red where a token speaks for the target, blue where it speaks
against it, one symmetric linear scale around 0. Colours are translucent and sit in inline styles,
so the same tile is legible on a light and a dark page and survives a viewer that drops style
sheets; one that drops inline styles too (GitHub's) shows the number after each token instead.
Tokens are text: escaped, isolated from the direction of their neighbours, invisible characters
made visible (`lenslrp.text.visible_text`).

The first token often soaks up relevance (the attention sink). It is always drawn. The legend
says when it dominates, and ``without_first=True`` takes the scale from the other tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import accumulate, groupby
from typing import TYPE_CHECKING

from lenslrp.errors import InputError
from lenslrp.text.visible_text import visible, visible_pieces

if TYPE_CHECKING:
    from torch import Tensor

POSITIVE = (214, 39, 55)
NEGATIVE = (43, 120, 205)
STRONGEST = 0.7  # opacity at the end of the scale: body text on it keeps a contrast above 4.5 : 1
_TABLE_ROWS = 50
_DOMINATES = 3.0

_LIGHT = "--llrp-bg:#fff;--llrp-fg:#1b1f24;--llrp-muted:#57606a;--llrp-line:#d8dee4"
_DARK = "--llrp-bg:#15181d;--llrp-fg:#e6e9ed;--llrp-muted:#9aa4b0;--llrp-line:#343b45"


def themed(name: str, light: str, dark: str, rest: str = "") -> str:
    """The rules of a class `name`, light or dark as the page or the system is.

    Background and text always change together: a page that stays light under a dark system theme
    (an exported notebook) shows a dark card, never light text on white.
    """
    return f""".{name}{{{light}{rest}}}
@media (prefers-color-scheme:dark){{.{name}{{{dark}}}}}
[data-jp-theme-light="true"] .{name},.vscode-light .{name},\
html[theme="light"] .{name}{{{light}}}
[data-jp-theme-light="false"] .{name},.vscode-dark .{name},\
html[theme="dark"] .{name}{{{dark}}}"""


def card(name: str) -> str:
    """The style rules of a card of class `name`."""
    rest = """;background:var(--llrp-bg);color:var(--llrp-fg);\
border:1px solid var(--llrp-line);border-radius:8px;padding:12px 16px;max-width:72em"""
    return themed(name, _LIGHT, _DARK, rest)


STYLE = f"""<style>
{card("lenslrp-heatmap")}
.lenslrp-heatmap .lenslrp-token:hover{{outline:2px solid currentColor;outline-offset:-1px}}
.lenslrp-heatmap .lenslrp-note,.lenslrp-heatmap summary{{color:var(--llrp-muted)}}
.lenslrp-heatmap table.lenslrp-values{{border-collapse:collapse;font-size:.85em;margin:.4em 0 0;\
color:inherit;background:none}}
.lenslrp-heatmap .lenslrp-values th,.lenslrp-heatmap .lenslrp-values td{{text-align:left;\
padding:.15em 1.2em .15em 0;border:0;border-bottom:1px solid var(--llrp-line);background:none;\
color:inherit}}
</style>"""


@dataclass(frozen=True)
class ColourScale:
    """How relevance becomes colour.

    Attributes:
        limit: relevance (in units of the target, logits for a logit) that gets the full colour.
        largest: position of the largest absolute relevance, None when there is none.
        first: position of the first token that is not padding, None when there is none.
        dominated: the first token exceeds every other token's absolute relevance threefold.
        clipped: positions beyond ``limit``, drawn in the full colour.
        without_first: the limit was taken from the tokens after the first.
    """

    limit: float
    largest: int | None
    first: int | None
    dominated: bool
    clipped: tuple[int, ...]
    without_first: bool

    def fraction(self, value: float) -> float:
        """``value`` on the scale, in [-1, 1]; 0 when everything is 0."""
        if self.limit == 0.0:
            return 0.0
        return max(-1.0, min(1.0, value / self.limit))


def as_row(name: str, values: Sequence[float] | Tensor, length: int) -> list[float]:
    """``values`` as ``length`` floats.

    Raises:
        InputError: when ``values`` has more than one dimension or another length.
    """
    shape = tuple(getattr(values, "shape", ()))
    if len(shape) > 1:
        raise InputError(
            f"{name} has shape {shape}, but a heatmap shows one row of {length} tokens; "
            f"take one batch row, for example {name}[0]"
        )
    row = [float(value) for value in values]
    if len(row) != length:
        raise InputError(
            f"{name} has {len(row)} values for {length} tokens; give one value a token"
        )
    return row


def colour_scale(
    values: Sequence[float],
    mask: Sequence[bool],
    *,
    scale: float | None = None,
    without_first: bool = False,
) -> ColourScale:
    """The symmetric scale of a row of relevances, taken from its finite, unmasked values.

    Raises:
        InputError: when ``scale`` is not a positive finite number.
    """
    if scale is not None and not (math.isfinite(scale) and scale > 0):
        raise InputError(f"scale is {scale!r}, expected a positive number, in units of relevance")
    shown = [index for index, kept in enumerate(mask) if kept]
    first = shown[0] if shown else None
    size = {index: abs(values[index]) for index in shown if math.isfinite(values[index])}
    others = max((size[index] for index in size if index != first), default=0.0)
    head = size.get(first, 0.0) if first is not None else 0.0
    skip = without_first and others > 0
    limit = scale if scale is not None else (others if skip else max(others, head))
    return ColourScale(
        limit=limit,
        largest=max(size, key=size.__getitem__, default=None),
        first=first,
        dominated=others > 0 and head > _DOMINATES * others,
        clipped=tuple(index for index in size if size[index] > limit * (1 + 1e-9)),
        without_first=skip and scale is None,
    )


def signed(value: float, limit: float) -> str:
    """``value`` with its sign and the digits that matter on a scale that ends at ``limit``."""
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("+inf" if value > 0 else "-inf")
    if limit == 0 or 1e-2 <= limit < 1e5:
        digits = 2 if limit == 0 else max(0, 2 - math.floor(math.log10(limit)))
        return f"{value:+.{digits}f}"
    return f"{value:+.2e}"


def token_html(token: str) -> str:
    """``token`` escaped, its invisible characters visible (and dimmed), its direction isolated."""
    inner = "".join(
        f'<span style="opacity:.65">{escape(piece.text)}</span>'
        if piece.symbol
        else escape(piece.text)
        for piece in visible_pieces(token)
    )
    return f'<bdi style="unicode-bidi:isolate">{inner}</bdi>'


def rgba(fraction: float) -> str:
    """The CSS colour at ``fraction`` in [-1, 1] of the scale: red above 0, blue below it."""
    red, green, blue = POSITIVE if fraction >= 0 else NEGATIVE
    return f"rgba({red},{green},{blue},{STRONGEST * abs(fraction):.3f})"


_TILE = (
    "display:inline-block;padding:2px 3px;margin:1px 0;border-radius:3px;line-height:1.5;"
    "white-space:pre-wrap;overflow-wrap:anywhere;max-width:100%;print-color-adjust:exact"
)
_HATCH = "repeating-linear-gradient(45deg,rgba(128,128,128,.55) 0 2px,transparent 2px 6px)"


def _tile(column: int, position: int, token: str, value: float, scale: ColourScale) -> str:
    if not math.isfinite(value):
        look = f"background-image:{_HATCH};outline:1px dashed rgba(128,128,128,.8)"
    else:
        fraction = scale.fraction(value)
        # Colour is not the only sign: the line below a token is solid for +, dotted for -.
        line = "solid" if fraction >= 0 else "dotted"
        look = f"background-color:{rgba(fraction)};border-bottom:2px {line} {rgba(fraction)}"
        if column in scale.clipped:
            look += ";outline:1px dashed currentColor;outline-offset:-1px"
    exact = f"{value:+.6g}" if math.isfinite(value) else signed(value, scale.limit)
    title = escape(f"\u2068{visible(token)}\u2069 · position {position} · relevance {exact}")
    # Hidden where styles work; where they are stripped it is what remains of the heatmap.
    number = f'<span style="display:none"> ({signed(value, scale.limit)}) </span>'
    tile = (
        f'<span class="lenslrp-token" title="{title}" style="{_TILE};{look}">'
        f"{token_html(token)}{number}</span>"
    )
    return tile + "<br>" * ("\n" in token)


_SQUARE = "width:1.5em;height:1.5em;border-radius:2px;print-color-adjust:exact;overflow:hidden"


def _grid(
    positions: range,
    tokens: Sequence[str],
    values: Sequence[float],
    scale: ColourScale,
    columns: int,
) -> str:
    """Patches as squares in their rows; their numbers are in the titles and in the table."""
    squares = []
    for p in positions:
        value, exact = values[p], f"{values[p]:+.6g}"
        look = f"background-image:{_HATCH}"
        if math.isfinite(value):
            look = f"background-color:{rgba(scale.fraction(value))}"
        title = escape(f"patch {visible(tokens[p])} · position {p} · relevance {exact}")
        squares.append(
            f'<span class="lenslrp-token" title="{title}" style="{_SQUARE};{look}">'
            f'<span style="display:none"> {signed(value, scale.limit)} </span></span>'
        )
    return (
        f'<div style="display:grid;grid-template-columns:repeat({columns},1.5em);gap:1px;'
        f'margin-top:.4em">{"".join(squares)}</div>'
    )


def _padding(positions: Sequence[int], values: Sequence[float]) -> str:
    """One chip for a run of padding, with its relevance where it is not zero."""
    where = f"{positions[0]}" if len(positions) == 1 else f"{positions[0]}-{positions[-1]}"
    total = sum(values[position] for position in positions)
    extra = "" if total == 0 else f", relevance {total:+.3g}"
    title = escape(f"padding at column {where}: not part of the input{extra}")
    return (
        f'<span class="lenslrp-padding" title="{title}" style="{_TILE};opacity:.65;'
        f'border:1px dashed currentColor;font-size:.8em">padding ×{len(positions)}{extra}</span> '
    )


def scale_bar(limit: float) -> str:
    """The symmetric scale as a strip of colour between its two ends."""
    if limit == 0:
        return "all relevance is 0"
    return (
        f'<span style="white-space:nowrap">{signed(-limit, limit)} '
        '<span style="display:inline-block;width:9em;height:.8em;vertical-align:-.05em;'
        "border-radius:3px;print-color-adjust:exact;"
        f'background:linear-gradient(90deg,{rgba(-1.0)},transparent,{rgba(1.0)})"></span> '
        f"{signed(limit, limit)}</span>"
    )


def _legend(
    tokens: Sequence[str], values: Sequence[float], mask: Sequence[bool], s: ColourScale
) -> str:
    finite = [v for v, kept in zip(values, mask, strict=True) if kept and math.isfinite(v)]
    parts = [scale_bar(s.limit), f"sum {signed(math.fsum(finite), s.limit)}"]
    if s.largest is not None and s.limit > 0:
        parts.append(
            f"largest {signed(values[s.largest], s.limit)} at {token_html(tokens[s.largest])} "
            f"(position {sum(mask[: s.largest])})"
        )
    if any(kept and not math.isfinite(v) for v, kept in zip(values, mask, strict=True)):
        parts.append("hatched: not a finite number")
    return " · ".join(parts)


def _notes(values: Sequence[float], s: ColourScale) -> list[str]:
    notes = []
    if s.without_first and s.first is not None:
        size = signed(values[s.first], s.limit)
        notes.append(f"Scaled without the first token, which holds {size} (drawn, outlined).")
    elif s.dominated and s.first not in s.clipped:
        notes.append(
            "The first token outweighs every other one threefold (often an attention sink); "
            "without_first=True scales the colours by the others."
        )
    others = [position for position in s.clipped if not (s.without_first and position == s.first)]
    if others:
        notes.append(f"{len(others)} beyond the end of the scale, outlined.")
    return notes


def _table(tokens: Sequence[str], values: Sequence[float], mask: Sequence[bool]) -> str:
    shown = [position for position, kept in enumerate(mask) if kept]
    ranked = sorted(shown, key=lambda p: -abs(values[p]) if math.isfinite(values[p]) else -math.inf)
    largest = ranked[:_TABLE_ROWS]
    summary = "Values" if len(largest) == len(shown) else f"The {len(largest)} largest values"
    rows = "".join(
        f"<tr><td>{sum(mask[:position])}</td><td>{token_html(tokens[position])}</td>"
        f"<td>{values[position]:+.6g}</td></tr>"
        for position in largest
    )
    return (
        '<details style="margin-top:.5em;font-size:.9em">'
        f'<summary style="cursor:pointer">{summary}</summary>'
        '<table class="lenslrp-values"><thead><tr><th scope="col">position</th>'
        '<th scope="col">token</th><th scope="col">relevance</th></tr></thead>'
        f"<tbody>{rows}</tbody></table></details>"
    )


def token_heatmap(
    str_tokens: Sequence[str],
    relevance: Sequence[float] | Tensor,
    *,
    title: str | None = None,
    attention_mask: Sequence[bool] | Tensor | None = None,
    scale: float | None = None,
    without_first: bool = False,
    grid: tuple[int, int] | None = None,
) -> str:
    """The tokens of one prompt, coloured by relevance, as an HTML fragment without JavaScript.

    Args:
        str_tokens: the tokens as text, ``pos`` of them.
        relevance: ``[pos]``, in units of the target (logits, for a logit). NaN and infinities are
            hatched.
        title: a line above the tokens.
        attention_mask: ``[pos]``; False marks padding, which is shown as one chip a run.
        scale: relevance at the full colour; by default the largest absolute relevance.
        without_first: take the scale from the tokens after the first; the first is drawn in the
            full colour, outlined.
        grid: (rows, columns) of an image whose patches the last tokens are: drawn as squares.

    Returns:
        One ``<div class="lenslrp-heatmap">`` with a style element whose rules name that class.

    Raises:
        InputError: when lengths differ, ``relevance`` is a batch, or ``scale`` is not positive.
    """
    tokens = list(str_tokens)
    values = as_row("relevance", relevance, len(tokens))
    mask = [True] * len(tokens)
    if attention_mask is not None:
        mask = [bool(kept) for kept in as_row("attention_mask", attention_mask, len(tokens))]
    colours = colour_scale(values, mask, scale=scale, without_first=without_first)

    tiles = []
    places = [0, *accumulate(map(int, mask))]  # the position of each column that is no padding
    words = len(tokens) - (0 if grid is None else grid[0] * grid[1])
    for kept, run in groupby(range(words), key=lambda position: mask[position]):
        positions = list(run)
        if kept:
            tiles += [_tile(p, places[p], tokens[p], values[p], colours) for p in positions]
        else:
            tiles.append(_padding(positions, values))
    if grid is not None:
        tiles.append(_grid(range(words, len(tokens)), tokens, values, colours, grid[1]))
    legend = _legend(tokens, values, mask, colours)
    shown = f'<div style="font-size:1.1em">{"".join(tiles) or "no tokens"}</div>'
    table = _table(tokens, values, mask)
    return framed("Token relevance", title, shown, legend, _notes(values, colours), table)


def framed(
    label: str, title: str | None, shown: str, legend: str, notes: Sequence[str], table: str = ""
) -> str:
    """The card that a heatmap is drawn in: title, picture, legend, notes, table of values."""
    heading = ""
    if title is not None:
        text = escape(visible(title))
        heading = f'<div style="font-weight:600;margin-bottom:.5em"><bdi>{text}</bdi></div>'
    remarks = "".join(
        f'<div class="lenslrp-note" style="font-size:.85em;margin-top:.25em">{escape(note)}</div>'
        for note in notes
    )
    return (
        f'<div class="lenslrp-heatmap" dir="ltr" role="group" aria-label="{label}" '
        f'style="font-family:system-ui,sans-serif;font-size:14px">{STYLE}{heading}{shown}'
        f'<div class="lenslrp-note" style="font-size:.85em;margin-top:.6em">'
        f"{legend}</div>{remarks}{table}</div>"
    )
