"""Pictures of relevance with matplotlib: layer x position, heads, neurons, ledger, tokens, images.

One convention throughout: red is positive (speaks for the target), blue is negative, the scale is
linear and symmetric around 0, an entry that is not a finite number is hatched. Every function
returns a :class:`matplotlib.figure.Figure` made without pyplot, so no backend is chosen, no
window opens and nothing is left behind in matplotlib's state. matplotlib is imported when a
figure is asked for (``pip install 'lenslrp[plot]'``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from typing import TYPE_CHECKING, Any

import numpy as np

from lenslrp.errors import InputError
from lenslrp.extras import require
from lenslrp.text.visible_text import visible
from lenslrp.views.heatmap import colour_scale

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

    from lenslrp.cache import RelevanceCache

_MOST_LABELS = 48  # more tokens than this on an axis: every n-th one is named
_LONGEST_LABEL = 16
TERMS = (
    ("leaves", "leaves (tokens)"),
    ("biases", "biases"),
    ("softmax", "softmax"),
    ("positional", "positional"),
    ("stabiliser", "stabiliser"),
    ("plain", "plain operations"),
    ("nonlinear_target", "non-linear target"),
)
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


LIGHT = Theme("#ffffff", "#1b1f24", "#8c959f", "#f7f7f7", "#b2182b", "#2166ac")
DARK = Theme("#15181d", "#e6e9ed", "#6e7781", "#22262d", "#ff5f6b", "#58a6ff")


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
    found = [
        figure.add_subplot(1, panels, place + 1, facecolor=theme.paper) for place in range(panels)
    ]
    for axes in found:
        _ink(axes, theme)
    return figure, found


def _figure(width: float, height: float, theme: Theme) -> tuple[Figure, Axes]:
    figure, (axes,) = new_figure(width, height, theme, 1)
    return figure, axes


def _ink(axes: Axes, theme: Theme) -> None:
    axes.tick_params(colors=theme.ink, labelsize=9, length=2)
    for side in axes.spines.values():
        side.set_visible(False)


def _names(axes: Axes, theme: Theme, *, title: str, x: str, y: str) -> None:
    axes.set_title(title, loc="left", color=theme.ink, fontsize=11, parse_math=False, **_font())
    axes.set_xlabel(x, color=theme.ink)
    axes.set_ylabel(y, color=theme.ink)


def _font() -> dict[str, Any]:
    from matplotlib import font_manager

    installed = set(font_manager.get_font_names())
    return {"fontfamily": [name for name in _FONTS if name in installed]}


def _drawable(text: str) -> str:
    """``text`` with the characters that no installed font of ours has as ``U+1F600``."""
    require("matplotlib", "a figure")
    from matplotlib import font_manager

    paths = [
        font_manager.findfont(name, fallback_to_default=False) for name in _font()["fontfamily"]
    ]
    fonts = [font_manager.get_font(path) for path in paths]
    return "".join(
        char if any(font.get_char_index(ord(char)) for font in fonts) else f"⟨U+{ord(char):04X}⟩"
        for char in text
    )


def _short(token: str) -> str:
    text = _drawable(visible(token))
    return text if len(text) <= _LONGEST_LABEL else text[: _LONGEST_LABEL - 1] + "…"


def _label_tokens(axes: Axes, tokens: Sequence[str]) -> None:
    """Name the columns by position and token, every n-th one where there are many."""
    step = -(-len(tokens) // _MOST_LABELS) if tokens else 1
    places = list(range(0, len(tokens), step))
    # The mark keeps the number behind a right-to-left token.
    labels = [f"{_short(tokens[place])}\u200e  {place}" for place in places]
    axes.set_xticks(places, labels, rotation=90, parse_math=False, **_font())


def colour_map(theme: Theme) -> Any:
    """The colour map of relevance: blue, the middle at 0, red."""
    from matplotlib import colormaps
    from matplotlib.colors import LinearSegmentedColormap

    if theme is LIGHT:
        return colormaps["RdBu_r"]
    return LinearSegmentedColormap.from_list(
        "RdBu_r_dark", ["#7cc0ff", "#2f7fd6", theme.middle, "#d63c48", "#ff9a9f"]
    )


def _map(
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


def _kept(R: RelevanceCache, row: int) -> list[int]:
    batch = len(R.str_tokens)
    if not -batch <= row < batch:
        raise InputError(f"row is {row}, but R holds {batch} rows (0 to {batch - 1})")
    return [index for index, kept in enumerate(R.attention_mask[row]) if bool(kept)]


def _limit(values: NDArray[Any]) -> float:
    finite = np.abs(values[np.isfinite(values)])
    return float(finite.max()) if finite.size else 0.0


def residual_map(
    R: RelevanceCache, row: int = 0, *, without_first: bool = False, theme: Theme = LIGHT
) -> Figure:
    """Total relevance of the residual stream, layer (upwards) x position, padding left out.

    ``without_first`` takes the colour scale from the positions after the first, which is drawn.
    """
    kept = _kept(R, row)
    table = R.residual(row)
    values = np.asarray(table, dtype=float)
    limit = _limit(values[:, 1:]) if without_first and len(kept) > 1 else _limit(values)
    rows, columns = values.shape
    figure, axes = _figure(min(4 + 0.3 * columns, 15.0), min(2.2 + 0.2 * rows, 11.0), theme)
    _map(figure, axes, values, limit, theme, "relevance")
    _label_tokens(axes, [R.str_tokens[row][index] for index in kept])
    _label_layers(axes, [str(name) for name in table.index])
    scaled = " (scaled without the first token)" if without_first else ""
    _names(axes, theme, title=f"Residual stream{scaled}", x="token and position", y="layer")
    return figure


def _label_layers(axes: Axes, names: Sequence[str]) -> None:
    step = -(-len(names) // 40)
    places = sorted({*range(0, len(names), step), len(names) - 1})
    axes.set_yticks(places, [names[place] for place in places])


def head_grid(R: RelevanceCache, row: int = 0, *, theme: Theme = LIGHT) -> Figure:
    """Relevance of every attention head, layer (upwards) x head."""
    table = R.heads(row)
    values = np.asarray(table, dtype=float)
    rows, columns = values.shape
    figure, axes = _figure(min(2.6 + 0.42 * columns, 13.0), min(1.6 + 0.24 * rows, 11.0), theme)
    _map(figure, axes, values, _limit(values), theme, "relevance")
    step = -(-columns // 32)
    places = list(range(0, columns, step))
    axes.set_xticks(places, [str(table.columns[place]) for place in places])
    _label_layers(axes, [str(name) for name in table.index])
    _names(axes, theme, title="Attention heads", x="head", y="layer")
    return figure


def _bars(
    axes: Axes, labels: Sequence[str], values: NDArray[Any], starts: NDArray[Any], theme: Theme
) -> None:
    """Horizontal bars from the top down, each with its signed number; NaN gets no bar."""
    places = np.arange(len(labels))
    known = np.nan_to_num(values, posinf=0.0, neginf=0.0)
    colours = [theme.positive if value >= 0 else theme.negative for value in known]
    axes.barh(places, known, left=starts, color=colours, height=0.72)
    for place, value, start in zip(places, values, starts, strict=True):
        end = start + (value if np.isfinite(value) else 0.0)
        right = end >= start
        axes.annotate(
            f"{value:+.3g}",
            (end, place),
            xytext=(4 if right else -4, 0),
            textcoords="offset points",
            ha="left" if right else "right",
            va="center",
            color=theme.ink,
            fontsize=8,
            bbox={"facecolor": theme.paper, "edgecolor": "none", "pad": 0.6},
        )
    axes.set_yticks(places, labels, parse_math=False, **_font())
    axes.invert_yaxis()
    axes.axvline(0, color=theme.muted, linewidth=0.8)
    axes.margins(x=0.16)


def top_neurons(R: RelevanceCache, k: int = 10, row: int = 0, *, theme: Theme = LIGHT) -> Figure:
    """The ``k`` MLP neurons (at a token) with the largest relevance, as bars."""
    table = R.top("mlp.hook_post", k=k, row=row)
    labels = [
        f"layer {entry.layer}  neuron {entry.neuron}  at {_short(str(entry.token))}"
        f" {entry.position}"
        for entry in table.itertuples()
    ]
    figure, axes = _figure(7.5, 1.4 + 0.3 * max(len(labels), 1), theme)
    values = np.asarray(table["relevance"], dtype=float)
    _bars(axes, labels, values, np.zeros(len(labels)), theme)
    _names(axes, theme, title="Neurons", x="relevance", y="")
    return figure


def ledger_bars(R: RelevanceCache, *, theme: Theme = LIGHT) -> Figure:
    """The ledger as a waterfall: each term starts where the one above it ended, at last the target.

    Terms below a millionth of the target are left out.
    """
    ledger = R.ledger()
    terms = [(label, float(getattr(ledger, name))) for name, label in TERMS]
    visible_size = 1e-6 * abs(float(ledger.target))
    terms = [(label, value) for label, value in terms if not abs(value) <= visible_size]
    values = np.array([value for _, value in terms])
    starts = np.concatenate([[0.0], np.cumsum(np.nan_to_num(values))])[: len(values)]
    figure, axes = _figure(7.5, 1.9 + 0.32 * len(values), theme)
    _bars(axes, [label for label, _ in terms], values, starts, theme)
    target = float(ledger.target)
    axes.axvline(target, color=theme.ink, linewidth=1.2, linestyle="--", zorder=0.5)
    axes.annotate(
        f"target {target:+.4g}",
        (target, 1.0),
        xycoords=("data", "axes fraction"),
        xytext=(0, 3),
        textcoords="offset points",
        ha="center",
        color=theme.ink,
        fontsize=8,
    )
    title = f"Ledger (relative error {float(ledger.error):+.1e})"
    axes.set_title(title, loc="left", color=theme.ink, fontsize=11, pad=18)
    axes.set_xlabel("running total, in units of the target", color=theme.ink)
    return figure


def token_bars(
    R: RelevanceCache, row: int = 0, *, without_first: bool = False, theme: Theme = LIGHT
) -> Figure:
    """Relevance of every token, as bars in the order of the text, padding left out."""
    kept = _kept(R, row)
    values = np.array([float(R.tokens[row][index]) for index in kept])
    figure, axes = _figure(min(3 + 0.28 * len(kept), 15.0), 3.6, theme)
    known = np.nan_to_num(values, posinf=0.0, neginf=0.0)
    colours = [theme.positive if value >= 0 else theme.negative for value in known]
    axes.bar(np.arange(len(kept)), known, color=colours, width=0.8)
    axes.axhline(0, color=theme.muted, linewidth=0.8)
    _label_tokens(axes, [R.str_tokens[row][index] for index in kept])
    scale = colour_scale(values.tolist(), [True] * len(kept), without_first=without_first)
    if scale.without_first:
        axes.set_ylim(-1.15 * scale.limit, 1.15 * scale.limit)
    scaled = " (the first token is cut off)" if scale.without_first else ""
    _names(axes, theme, title=f"Tokens{scaled}", x="token and position", y="relevance")
    return figure


def image_map(R: RelevanceCache, row: int = 0, **options: Any) -> Figure:
    """Relevance over an image, see :func:`lenslrp.analysis.views.images.image_map`."""
    from lenslrp.analysis.views import images  # which draws with what is in this file

    return images.image_map(R, row, **options)


KINDS: dict[str, Callable[..., Figure]] = {
    "residual": residual_map,
    "heads": head_grid,
    "neurons": top_neurons,
    "ledger": ledger_bars,
    "tokens": token_bars,
    "image": image_map,
}


def plot(R: RelevanceCache, kind: str = "residual", **options: Any) -> Figure:
    """The figure named ``kind``; ``options`` go to its function (see :data:`KINDS`).

    Raises:
        InputError: when there is no such kind.
        MissingExtraError: matplotlib is not installed.
    """
    if kind not in KINDS:
        raise InputError(f"no plot is called {kind!r}; there are {', '.join(map(repr, KINDS))}")
    return KINDS[kind](R, **options)
