"""Token relevance in a terminal: coloured tokens where there is colour, signed numbers where not.

The same scale and signs as the HTML heatmap (`lenslrp.views.heatmap`): red speaks for the
target, blue against it. Below the text, the tokens with the largest relevance as a table with bars,
so that a log file or a terminal without colour tells as much. Token text reaches the terminal only
as `rich.text.Text` (no console markup) with control characters replaced
(`lenslrp.text.visible_text`), so a prompt can neither colour, clear nor drive the screen.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.style import Style
from rich.table import Table
from rich.text import Text

from lenslrp.errors import InputError
from lenslrp.text.visible_text import visible
from lenslrp.views.heatmap import NEGATIVE, POSITIVE, ColourScale, as_row, colour_scale, signed

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

    from lenslrp.cache import RelevanceCache

_GREY = (96, 96, 96)  # the faint end: legible under white on dark and on light terminals
_FAINT = 0.08  # below this fraction of the scale a token keeps the terminal's own colours
_BAR = 12


def _style(fraction: float) -> Style:
    if abs(fraction) < _FAINT:
        return Style()
    end = POSITIVE if fraction > 0 else NEGATIVE
    mixed = [round(g + (e - g) * abs(fraction)) for g, e in zip(_GREY, end, strict=True)]
    return Style.parse(f"white on rgb({mixed[0]},{mixed[1]},{mixed[2]})")


class Heat:
    """Text as a run of tokens; asks the console whether it has colour. ``mark`` is underlined."""

    def __init__(
        self,
        tokens: Sequence[str],
        values: Sequence[float],
        scale: ColourScale,
        mark: int | None = None,
    ) -> None:
        self.tokens = tokens
        self.values = values
        self.scale = scale
        self.mark = mark

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        coloured = console.color_system is not None and not console.no_color
        text = Text(overflow="fold")
        for index, (token, value) in enumerate(zip(self.tokens, self.values, strict=True)):
            finite = math.isfinite(value)
            style = _style(self.scale.fraction(value)) if finite else Style(reverse=True)
            if index == self.mark:
                style += Style(bold=True, underline=True)
                text.append("" if coloured else ">")
            text.append(visible(token), style)
            if not coloured:
                text.append(f" ({signed(value, self.scale.limit)}) ")
            if "\n" in token:
                text.append("\n")
        yield text


def _largest(tokens: Sequence[str], values: Sequence[float], scale: ColourScale, k: int) -> Table:
    table = Table(box=None, pad_edge=False, show_header=True, header_style="dim")
    table.add_column("position", justify="right")
    table.add_column("token", overflow="fold")
    table.add_column("relevance", justify="right")
    table.add_column("")
    finite = [index for index, value in enumerate(values) if math.isfinite(value)]
    for index in sorted(finite, key=lambda index: -abs(values[index]))[:k]:
        value = values[index]
        width = max(1, round(abs(scale.fraction(value)) * _BAR)) if value else 0
        end = POSITIVE if value > 0 else NEGATIVE
        table.add_row(
            str(index),
            Text(visible(tokens[index])),
            signed(value, scale.limit),
            Text("#" * width if value > 0 else "-" * width, f"rgb({end[0]},{end[1]},{end[2]})"),
        )
    return table


def render(
    R: RelevanceCache, row: int = 0, *, without_first: bool = False, k: int = 5
) -> RenderableType:
    """One batch row of ``R`` as a rich renderable: ``rich.print(render(R))``.

    Args:
        R: the result of `lenslrp.run_with_relevance`.
        row: which batch row. Padding is left out and counted.
        without_first: take the colour scale from the tokens after the first, which stays.
        k: how many of the largest tokens to list.

    Raises:
        InputError: when ``row`` is out of range.
    """
    batch = len(R.str_tokens)
    if not -batch <= row < batch:
        raise InputError(f"row is {row}, but R holds {batch} rows (0 to {batch - 1})")
    mask = [bool(kept) for kept in R.attention_mask[row]]
    everything = as_row("R.tokens", R.tokens[row], len(mask))
    tokens = [token for token, kept in zip(R.str_tokens[row], mask, strict=True) if kept]
    values = [value for value, kept in zip(everything, mask, strict=True) if kept]
    scale = colour_scale(values, [True] * len(values), without_first=without_first)

    total = math.fsum(value for value in values if math.isfinite(value))
    heading = Text.assemble(
        (visible(R.target.text), "bold"),
        f" = {float(R.target.value[row]):.4g}   ",
        (f"token relevance sums to {signed(total, scale.limit)}", "dim"),
    )
    lines: list[RenderableType] = [heading, "", Heat(tokens, values, scale), ""]
    lines.append(_largest(tokens, values, scale, k))
    padding = len(mask) - len(values)
    if padding:
        lines.append(Text(f"{padding} padding tokens are not shown", "dim"))
    if scale.without_first:
        lines.append(Text("colours scaled without the first token", "dim"))
    elif scale.dominated:
        lines.append(
            Text("the first token outweighs all others; without_first=True rescales", "dim")
        )
    return Group(*lines)
