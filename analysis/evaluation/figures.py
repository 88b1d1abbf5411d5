"""Perturbation curves as a figure; matplotlib is imported when one is asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from lenslrp.analysis.common.statistics import Numbers
from lenslrp.analysis.views.drawing import LIGHT, Theme, new_figure, write_titles

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def perturbation_curves(
    shares: Numbers,
    curves: Mapping[str, Sequence[Numbers]],
    *,
    unit: str,
    title: str,
    theme: Theme = LIGHT,
) -> Figure:
    """The target while features are taken away, for each method.

    Solid lines: the most relevant first; dashed: the least relevant first.

    Args:
        shares: [step] of the features that are gone.
        curves: method -> (MoRF, LeRF), each [step].
        unit: of the target, the label of the axis.
        title: of the figure.
        theme: `LIGHT` or `DARK`.

    Raises:
        MissingExtraError: matplotlib is not installed.

    Examples:
        ```python
        curve = curves(features, {"attnlrp": relevance})["attnlrp"]
        lines = {"attnlrp": (curve.morf, curve.lerf)}
        perturbation_curves(curve.shares, lines, unit="logits", title="one prompt").savefig("c.png")
        ```
    """
    figure, (axes,) = new_figure(7.0, 4.2, theme, 1)
    import matplotlib as mpl

    colours = mpl.colormaps["tab10" if len(curves) <= 10 else "tab20"].colors  # type: ignore[attr-defined]
    for (name, (morf, lerf)), colour in zip(curves.items(), colours, strict=False):
        axes.plot(shares, morf, color=colour, label=name)
        axes.plot(shares, lerf, color=colour, linestyle="--")
    write_titles(axes, theme, title=title, x="share of features gone", y=unit)
    axes.grid(color=theme.muted, alpha=0.25)
    axes.legend(
        loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize=8,
        labelcolor=theme.ink, title="solid: most relevant first\ndashed: least", title_fontsize=7,
    )  # fmt: skip
    return figure
