"""Circuits as figures: scores of all heads, faithfulness over size."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from lenslrp.analysis.circuits.curves import FaithfulnessCurve
from lenslrp.analysis.circuits.scores import NodeScores
from lenslrp.analysis.views.drawing import (
    LIGHT,
    Theme,
    draw_grid,
    label_layer_rows,
    largest_magnitude,
    new_figure,
    one_panel,
    write_titles,
)
from lenslrp.hooks.readers import SCAN_HOOKS
from lenslrp.hooks.structure import layer_of
from lenslrp.tables import mixer_label

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def head_scores(scores: NodeScores, *, component: str = "heads", theme: Theme = LIGHT) -> Figure:
    """Mean score over pairs (and sum over positions) of every head, layer (upwards) x head.

    Args:
        scores: of nodes.
        component: such as `"heads"`, `"q"`, `"k"`, `"v"`; a layer with fewer units ends early.
        theme: colours.

    Raises:
        InputError: the component was not scored.
        MissingExtraError: matplotlib is not installed.
    """
    scores.of(component)
    hooks = [hook for hook, name in scores.components.items() if name == component]
    means = [scores.values[hook].double().mean(dim=0).cpu().numpy() for hook in hooks]
    rows_of = [v.sum(axis=0) if scores.by_position else v for v in means]
    width = max(map(len, rows_of))
    values = np.stack([np.pad(v, (0, width - len(v)), constant_values=np.nan) for v in rows_of])
    rows, columns = values.shape
    figure, axes = one_panel(min(2.6 + 0.42 * columns, 13), min(1.6 + 0.24 * rows, 11), theme)
    draw_grid(
        figure, axes, values, largest_magnitude(values), theme,
        f"gain in {scores.metric.replace('_', ' ')}",
    )  # fmt: skip
    axes.set_xticks(range(columns))
    label_layer_rows(
        axes,
        [mixer_label(h) if h.endswith(SCAN_HOOKS) else str(layer_of(h)) for h in hooks],
    )
    write_titles(axes, theme, title=f"Scores of {component}", x="head", y="layer")
    return figure


def faithfulness_curves(
    curves: Mapping[str, FaithfulnessCurve],
    *,
    title: str = "Faithfulness over size",
    theme: Theme = LIGHT,
) -> Figure:
    """Share of the logit difference kept over the share of nodes kept, with 95% intervals.

    Args:
        curves: name -> curve, of `faithfulness_curve`.
        title: of the figure.
        theme: colours.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    figure, (axes,) = new_figure(7.0, 4.0, theme, 1)
    for place, (name, curve) in enumerate(curves.items()):
        table = curve.table[curve.table["share"] > 0]
        label = f"{name} (CPR {curve.cpr:.2f}, CMD {curve.cmd:.2f})"
        axes.plot(table["share"], table["faithfulness"], color=f"C{place}", marker="o", label=label)
        axes.fill_between(table["share"], table["low"], table["high"], color=f"C{place}", alpha=0.2)
    axes.axhline(1, color=theme.muted, linewidth=0.8, linestyle="--")
    axes.axhline(0, color=theme.muted, linewidth=0.8)
    axes.set_xscale("log")
    write_titles(
        axes,
        theme,
        title=title,
        x="share of heads and of neurons kept",
        y="share of the logit difference",
    )
    axes.legend(frameon=False, fontsize=8, labelcolor=theme.ink)
    return figure
