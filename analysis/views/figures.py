"""Pictures of relevance with matplotlib: layer x position, heads, neurons, ledger, tokens, images.

Red is evidence for the target and blue against it; `lenslrp.analysis.views.drawing` has the
colours and says how figures are made.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from lenslrp.analysis.views.drawing import (
    LIGHT,
    Theme,
    draw_bars,
    draw_grid,
    label_layer_rows,
    label_token_columns,
    largest_magnitude,
    one_panel,
    require_row,
    short_label,
    write_titles,
)
from lenslrp.analysis.views.images import image_map
from lenslrp.errors import InputError
from lenslrp.views.heatmap import colour_scale

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from lenslrp.cache import RelevanceCache

LEDGER_TERMS = (
    ("leaves", "leaves (tokens)"),
    ("biases", "biases"),
    ("softmax", "softmax"),
    ("recurrence", "recurrence"),
    ("positional", "positional"),
    ("stabiliser", "stabiliser"),
    ("plain", "plain operations"),
    ("nonlinear_target", "non-linear target"),
)


def _kept(R: RelevanceCache, row: int) -> list[int]:
    require_row(R, row)
    return [index for index, kept in enumerate(R.attention_mask[row]) if bool(kept)]


def residual_map(
    R: RelevanceCache, row: int = 0, *, without_first: bool = False, theme: Theme = LIGHT
) -> Figure:
    """Total relevance of the residual stream, layer (upwards) x position, padding left out.

    Args:
        R: with the residual stream's hook points.
        row: which row of the batch.
        without_first: take the colour scale from the positions after the first, which is drawn.
        theme: `LIGHT` or `DARK`.

    Raises:
        InputError: no such row.
        MissingExtraError: matplotlib is not installed.
    """
    kept = _kept(R, row)
    table = R.residual(row)
    values = np.asarray(table, dtype=float)
    limit = (
        largest_magnitude(values[:, 1:])
        if without_first and len(kept) > 1
        else largest_magnitude(values)
    )
    rows, columns = values.shape
    figure, axes = one_panel(min(4 + 0.3 * columns, 15.0), min(2.2 + 0.2 * rows, 11.0), theme)
    draw_grid(figure, axes, values, limit, theme, "relevance")
    label_token_columns(axes, [R.str_tokens[row][index] for index in kept])
    label_layer_rows(axes, [str(name) for name in table.index])
    scaled = " (scaled without the first token)" if without_first else ""
    write_titles(axes, theme, title=f"Residual stream{scaled}", x="token and position", y="layer")
    return figure


def head_grid(R: RelevanceCache, row: int = 0, *, theme: Theme = LIGHT) -> Figure:
    """Relevance of every head, layer (upwards) x head, in units of the target.

    Rows and columns are those of `RelevanceCache.heads`: attention's and recurrent mixers'.
    """
    table = R.heads(row)
    values = np.asarray(table, dtype=float)
    rows, columns = values.shape
    figure, axes = one_panel(min(2.6 + 0.42 * columns, 13.0), min(1.6 + 0.24 * rows, 11.0), theme)
    draw_grid(figure, axes, values, largest_magnitude(values), theme, "relevance")
    step = -(-columns // 32)
    ticks = list(range(0, columns, step))
    axes.set_xticks(ticks, [str(table.columns[tick]) for tick in ticks])
    label_layer_rows(axes, [str(name) for name in table.index])
    write_titles(axes, theme, title="Heads", x="head", y="layer")
    return figure


def top_neurons(R: RelevanceCache, k: int = 10, row: int = 0, *, theme: Theme = LIGHT) -> Figure:
    """The ``k`` MLP neurons (at a token) with the largest relevance, as bars."""
    table = R.top("mlp.hook_post", k=k, row=row)
    labels = [
        f"layer {entry.layer}  neuron {entry.neuron}  at {short_label(str(entry.token))}"
        f" {entry.position}"
        for entry in table.itertuples()
    ]
    figure, axes = one_panel(7.5, 1.4 + 0.3 * max(len(labels), 1), theme)
    values = np.asarray(table["relevance"], dtype=float)
    draw_bars(axes, labels, values, np.zeros(len(labels)), theme)
    write_titles(axes, theme, title="Neurons", x="relevance", y="")
    return figure


def ledger_bars(R: RelevanceCache, *, theme: Theme = LIGHT) -> Figure:
    """The ledger as a waterfall: each term starts where the one above it ended, at last the target.

    Terms below a millionth of the target are left out.
    """
    ledger = R.ledger()
    terms = [(label, float(getattr(ledger, name))) for name, label in LEDGER_TERMS]
    visible_size = 1e-6 * abs(float(ledger.target))
    terms = [(label, value) for label, value in terms if not abs(value) <= visible_size]
    values = np.array([value for _, value in terms])
    starts = np.concatenate([[0.0], np.cumsum(np.nan_to_num(values))])[: len(values)]
    figure, axes = one_panel(7.5, 1.9 + 0.32 * len(values), theme)
    draw_bars(axes, [label for label, _ in terms], values, starts, theme)
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
    figure, axes = one_panel(min(3 + 0.28 * len(kept), 15.0), 3.6, theme)
    known = np.nan_to_num(values, posinf=0.0, neginf=0.0)
    colours = [theme.positive if value >= 0 else theme.negative for value in known]
    axes.bar(np.arange(len(kept)), known, color=colours, width=0.8)
    axes.axhline(0, color=theme.muted, linewidth=0.8)
    label_token_columns(axes, [R.str_tokens[row][index] for index in kept])
    scale = colour_scale(values.tolist(), [True] * len(kept), without_first=without_first)
    if scale.without_first:
        axes.set_ylim(-1.15 * scale.limit, 1.15 * scale.limit)
    scaled = " (the first token is cut off)" if scale.without_first else ""
    write_titles(axes, theme, title=f"Tokens{scaled}", x="token and position", y="relevance")
    return figure


PLOTS: dict[str, Callable[..., Figure]] = {
    "residual": residual_map,
    "heads": head_grid,
    "neurons": top_neurons,
    "ledger": ledger_bars,
    "tokens": token_bars,
    "image": image_map,
}


def plot(R: RelevanceCache, kind: str = "residual", **options: Any) -> Figure:
    """The figure named ``kind``; ``options`` go to its function (see `PLOTS`).

    Args:
        R: with the hook points that the figure shows.
        kind: ``"residual"``, ``"heads"``, ``"neurons"``, ``"ledger"``, ``"tokens"`` or ``"image"``.
        options: such as ``row=``, ``theme=``, ``without_first=``.

    Raises:
        InputError: when there is no such kind.
        MissingExtraError: matplotlib is not installed.
    """
    if kind not in PLOTS:
        raise InputError(f"no plot is called {kind!r}; there are {', '.join(map(repr, PLOTS))}")
    return PLOTS[kind](R, **options)
