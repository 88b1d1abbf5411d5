"""How every figure is drawn: colours, fonts, axes, grids and bars.

One convention throughout: red is positive, blue is negative, the scale is linear and symmetric
around 0, an entry that is not a finite number is hatched. A figure is made without pyplot, so no
backend is chosen, no window opens and nothing is left behind in matplotlib's state. matplotlib is
imported when a figure is asked for (``pip install 'lenslrp[plot]'``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from typing import TYPE_CHECKING, Any

import numpy as np

from lenslrp.errors import InputError
from lenslrp.extras import require
from lenslrp.text.visible_text import visible

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

    from lenslrp.cache import RelevanceCache

_MOST_LABELS = 48  # more tokens than this on an axis: every n-th one is named
_LONGEST_LABEL = 16
# Asked for in this order where installed, for the scripts that matplotlib's own font lacks.
_FONTS = (
    "DejaVu Sans", "Noto Sans", "Noto Sans CJK JP", "Noto Sans CJK SC", "Noto Sans Arabic",
    "Noto Sans Hebrew", "Noto Sans Devanagari", "Noto Emoji", "Hiragino Sans", "PingFang SC",
    "Microsoft YaHei", "Malgun Gothic", "Yu Gothic", "Segoe UI Symbol", "Segoe UI Emoji",
    "Arial Unicode MS",
)  # fmt: skip


@dataclass(frozen=True)
class Theme:
    """The colours of a figure; ``middle`` is the colour of relevance 0."""

    paper: str
    ink: str
    muted: str
    middle: str
    positive: str
    negative: str


LIGHT = Theme("#ffffff", "#1b1f24", "#57606a", "#f7f7f7", "#b2182b", "#2166ac")
DARK = Theme("#15181d", "#e6e9ed", "#9aa4b0", "#22262d", "#ff5f6b", "#58a6ff")


@cache
def _figure_class() -> type[Figure]:
    """A Figure that a notebook shows by itself: without pyplot, IPython has no formatter."""
    from matplotlib.figure import Figure

    class NotebookFigure(Figure):
        def _repr_png_(self) -> bytes:
            buffer = BytesIO()
            self.savefig(buffer, format="png", dpi=96)
            return buffer.getvalue()

    return NotebookFigure


def new_figure(width: float, height: float, theme: Theme, panels: int) -> tuple[Figure, list[Axes]]:
    """A figure of ``width`` x ``height`` inches with ``panels`` axes beside each other."""
    require("matplotlib", "a figure")
    figure = _figure_class()(figsize=(width, height), layout="constrained", facecolor=theme.paper)
    columns = [figure.add_subplot(1, panels, n + 1, facecolor=theme.paper) for n in range(panels)]
    for axes in columns:
        axes.tick_params(colors=theme.ink, labelsize=9, length=2)
        for spine in axes.spines.values():
            spine.set_visible(False)
    return figure, columns


def one_panel(width: float, height: float, theme: Theme) -> tuple[Figure, Axes]:
    """A figure of ``width`` x ``height`` inches with one pair of axes."""
    figure, (axes,) = new_figure(width, height, theme, 1)
    return figure, axes


def write_titles(axes: Axes, theme: Theme, *, title: str, x: str, y: str) -> None:
    """The title above the axes, and the names of both axes."""
    axes.set_title(
        title, loc="left", color=theme.ink, fontsize=11, parse_math=False, **installed_fonts()
    )
    axes.set_xlabel(x, color=theme.ink)
    axes.set_ylabel(y, color=theme.ink)


def installed_fonts() -> dict[str, Any]:
    """Text options that name every installed font of ours, for scripts of many languages."""
    from matplotlib import font_manager

    installed = set(font_manager.get_font_names())
    return {"fontfamily": [name for name in _FONTS if name in installed]}


def drawable(text: str) -> str:
    """``text`` with the characters that no installed font of ours has as ``U+1F600``."""
    require("matplotlib", "a figure")
    from matplotlib import font_manager

    paths = [
        font_manager.findfont(name, fallback_to_default=False)
        for name in installed_fonts()["fontfamily"]
    ]
    fonts = [font_manager.get_font(path) for path in paths]
    return "".join(
        char if any(font.get_char_index(ord(char)) for font in fonts) else f"⟨U+{ord(char):04X}⟩"
        for char in text
    )


def short_label(token: str) -> str:
    """A token as an axis shows it: white space visible, cut after 16 characters."""
    text = drawable(visible(token))
    return text if len(text) <= _LONGEST_LABEL else text[: _LONGEST_LABEL - 1] + "…"


def label_token_columns(axes: Axes, tokens: Sequence[str]) -> None:
    """Name the columns by position and token, every n-th one where there are many."""
    axes.set_xticks(*_token_ticks(tokens), rotation=90, parse_math=False, **installed_fonts())


def label_token_rows(axes: Axes, tokens: Sequence[str]) -> None:
    """The same of rows."""
    axes.set_yticks(*_token_ticks(tokens), parse_math=False, **installed_fonts())


def _token_ticks(tokens: Sequence[str]) -> tuple[list[int], list[str]]:
    step = -(-len(tokens) // _MOST_LABELS) if tokens else 1
    ticks = list(range(0, len(tokens), step))
    # The mark keeps the number behind a right-to-left token.
    return ticks, [f"{short_label(tokens[tick])}\u200e  {tick}" for tick in ticks]


def colour_map(theme: Theme) -> Any:
    """The colour map of relevance: blue, the middle at 0, red."""
    from matplotlib import colormaps
    from matplotlib.colors import LinearSegmentedColormap

    if theme is LIGHT:
        return colormaps["RdBu_r"]
    return LinearSegmentedColormap.from_list(
        "RdBu_r_dark", ["#7cc0ff", "#2f7fd6", theme.middle, "#d63c48", "#ff9a9f"]
    )


def draw_grid(
    figure: Figure, axes: Axes, values: NDArray[Any], limit: float, theme: Theme, label: str
) -> None:
    """``values`` [row, column] as a grid, first row at the bottom, with a colour bar."""
    limit = limit if limit > 0 else 1.0
    axes.patch.set(hatch="////", edgecolor=theme.muted, facecolor=theme.paper)
    image = axes.imshow(
        np.ma.masked_invalid(values),
        cmap=colour_map(theme),
        vmin=-limit,
        vmax=limit,
        aspect="auto",
        origin="lower",
        interpolation="nearest",
    )
    colour_bar(figure, image, axes, theme, label)


def colour_bar(figure: Figure, image: Any, axes: Axes, theme: Theme, label: str) -> None:
    """The legend of a drawn map."""
    bar = figure.colorbar(image, ax=axes, pad=0.015, fraction=0.05, aspect=28)
    bar.outline.set_visible(False)
    bar.ax.tick_params(colors=theme.ink, labelsize=8, length=2)
    bar.set_label(label, color=theme.ink)


def require_row(R: RelevanceCache, row: int) -> None:
    """Refuse a row that ``R`` does not hold; negative ones count from the end.

    Raises:
        InputError: no such row.
    """
    batch = len(R.str_tokens)
    if not -batch <= row < batch:
        raise InputError(f"row is {row}, but R holds {batch} rows (0 to {batch - 1})")


def largest_magnitude(values: NDArray[Any]) -> float:
    """The largest absolute value that is a finite number; 0 for none."""
    finite = np.abs(values[np.isfinite(values)])
    return float(finite.max()) if finite.size else 0.0


def label_layer_rows(axes: Axes, names: Sequence[str]) -> None:
    """Name the rows by layer, about 40 of them where there are many, always the last."""
    step = -(-len(names) // 40)
    ticks = sorted({*range(0, len(names), step), len(names) - 1})
    axes.set_yticks(ticks, [names[tick] for tick in ticks])


def draw_bars(
    axes: Axes, labels: Sequence[str], values: NDArray[Any], starts: NDArray[Any], theme: Theme
) -> None:
    """Horizontal bars from the top down, each with its signed number; NaN gets no bar."""
    bars = np.arange(len(labels))
    known = np.nan_to_num(values, posinf=0.0, neginf=0.0)
    colours = [theme.positive if value >= 0 else theme.negative for value in known]
    axes.barh(bars, known, left=starts, color=colours, height=0.72)
    for bar, value, start in zip(bars, values, starts, strict=True):
        end = start + (value if np.isfinite(value) else 0.0)
        right = end >= start
        axes.annotate(
            f"{value:+.3g}",
            (end, bar),
            xytext=(4 if right else -4, 0),
            textcoords="offset points",
            ha="left" if right else "right",
            va="center",
            color=theme.ink,
            fontsize=8,
            bbox={"facecolor": theme.paper, "edgecolor": "none", "pad": 0.6},
        )
    axes.set_yticks(bars, labels, parse_math=False, **installed_fonts())
    axes.invert_yaxis()
    axes.axvline(0, color=theme.muted, linewidth=0.8)
    axes.margins(x=0.16)
