"""What a sweep found: all numbers, their means beside the placebos', a figure.

Every metric is a number for each prompt and condition. A metric of one's own is read from the texts
with `SweepResult.scored`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from lenslrp.analysis.common.statistics import bootstrap
from lenslrp.analysis.views.drawing import LIGHT, Theme, new_figure
from lenslrp.errors import InputError
from lenslrp.views.cards import Face, Shown

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_CONDITION = ("kind", "layer", "coefficient", "draw", "prompt", "text")

METRIC_LABELS = {
    "target": "logit difference",
    "kl": "KL from base, nats",
    "nll": "nats a token under base",
    "perplexity": "perplexity under base",
    "norm_ratio": "length of the stream, over base",
    "repetition": "share of repeated bigrams",
}


@dataclass(frozen=True, eq=False, repr=False)
class SweepResult(Shown):
    """All numbers of a sweep.

    Attributes:
        frame: see `to_dataframe`.
        seed: of placebos and intervals.
        operations: what was swept, one a layer: an operation and its unit, by name.
    """

    frame: pd.DataFrame
    seed: int
    operations: tuple[str, ...] = ()

    def __repr__(self) -> str:
        steered = self.frame[self.frame.kind == "steered"]
        strengths = ", ".join(f"{c:g}" for c in sorted(steered.coefficient.unique()))
        layers = sorted(steered.layer.unique().tolist())
        return (
            f"SweepResult({self._swept()}, strengths {strengths} at layers {layers}, "
            f"{steered.prompt.nunique()} prompts, {len(self.frame)} texts)"
        )

    def face(self) -> Face:
        """What each strength did to the target, and to a text, beside a placebo's."""
        table = self.summary("target").set_index(["layer", "coefficient"])
        shown: dict[str, Any] = {"change of target": table["change"]}
        if "over_placebo" in table:
            shown["over placebo"] = table["over_placebo"]
        means = self.frame.groupby(["kind", "layer", "coefficient"])[["kl", "perplexity"]].mean()
        shown |= {name: means.loc["steered", name] for name in ("kl", "perplexity")}
        first = self.frame[(self.frame.prompt == 0) & ~(self.frame.draw > 0)]
        texts = {kind: part.set_index(["layer", "coefficient"])["text"]
                 for kind, part in first.groupby("kind")}  # fmt: skip
        base = texts.pop("base").iloc[0]
        shown |= {kind: texts[kind] for kind in ("steered", "placebo") if kind in texts}
        return Face(
            "Sweep: what steering does, beside placebos",
            {
                "swept": self._swept(),
                "prompts": self.frame.prompt.nunique(),
                "text of the base model": base,
            },
            pd.DataFrame(shown).reset_index(),
            coloured=["change of target", "over placebo"],
            notes=[
                "Texts of the first prompt. Target in logits, steered less base; placebo: a step "
                "as long, somewhere else. KL in nats; summary(metric) has intervals."
            ],
        )

    def to_dataframe(self) -> pd.DataFrame:
        """One row a prompt and condition.

        Columns: `kind` (`base`, `steered`, `random`, `placebo`), `layer`, `coefficient`, `draw` (of
        a placebo), `prompt` (its number), `target` (logits), `kl`, `nll` (nats), `perplexity`,
        `norm_ratio`, `repetition`, `text`, and what `scored` added.
        """
        return self.frame.copy()

    def metrics(self) -> list[str]:
        """The columns that can be averaged."""
        return [name for name in self.frame if name not in _CONDITION]

    def scored(self, name: str, score: Callable[[str], float]) -> SweepResult:
        """The same with one metric more.

        Args:
            name: what to call it.
            score: a number for a text; 1 or 0 for what a text has or lacks, so that the mean is the
                share of texts that have it.

        Raises:
            InputError: the name is taken.

        Examples:
            >>> result.scored("asks", lambda text: "?" in text).summary("asks")
        """
        if name in self.frame:
            raise InputError(f"there is a column {name!r} already: call the metric something else")
        values = [float(score(text)) for text in self.frame["text"]]
        return replace(self, frame=self.frame.assign(**{name: values}))

    def summary(self, metric: str = "target") -> pd.DataFrame:
        """Means over prompts with 95% bootstrap intervals, by layer and coefficient.

        Args:
            metric: one of `metrics`.

        Returns:
            Columns, each with `_low` and `_high`: `change`, steered less base; `over_random` and
            `over_placebo`: steered less the mean of the draws, paired by prompt (absent where none
            was drawn). In units of the metric.

        Raises:
            InputError: no such metric.
        """
        self._require(metric)
        kinds = dict(list(self.frame.groupby("kind")))
        base = kinds["base"].set_index("prompt")[metric]
        rows = []
        for (layer, coefficient), rows_at in kinds["steered"].groupby(["layer", "coefficient"]):
            steered = rows_at.set_index("prompt")[metric]
            row: dict[str, Any] = {"layer": layer, "coefficient": coefficient, "n": len(rows_at)}
            row |= self._with_interval("change", steered - base)
            for kind in ("random", "placebo"):
                if kind in kinds:
                    other = kinds[kind]
                    other = other[(other.layer == layer) & (other.coefficient == coefficient)]
                    mean = other.groupby("prompt")[metric].mean()
                    row |= self._with_interval(f"over_{kind}", steered - mean)
            rows.append(row)
        return pd.DataFrame(rows)

    def plot(
        self,
        metrics: Sequence[str] = ("target", "kl", "nll", "repetition"),
        *,
        layer: int | None = None,
        theme: Theme = LIGHT,
    ) -> Figure:
        """A panel for each metric: its mean over prompts at each strength, steered and placebos.

        Shaded: the steered mean's 95% bootstrap interval. Dashed: the base model. Strengths stand
        at equal distances, whatever they are.

        Args:
            metrics: what to draw.
            layer: which of several that were swept.

        Raises:
            InputError: no such metric or layer, or several layers and none chosen.
            MissingExtraError: matplotlib is not installed.
        """
        for metric in metrics:
            self._require(metric)
        swept = self.frame.loc[self.frame.kind == "steered", "layer"].unique().tolist()
        if layer is None and len(swept) == 1:
            layer = swept[0]
        if layer is None or layer not in swept:
            raise InputError(f"layer is {layer}: choose one of {', '.join(map(str, swept))}")
        figure, panels = new_figure(2.7 * len(metrics), 2.9, theme, len(metrics))
        for axes, metric in zip(panels, metrics, strict=True):
            self._panel(axes, metric, layer, theme)
        panels[0].legend(frameon=False, fontsize=8, labelcolor=theme.ink)
        return figure

    def _panel(self, axes: Axes, metric: str, layer: int, theme: Theme) -> None:
        rows = self.frame[(self.frame.layer == layer) & (self.frame.kind != "base")]
        strengths = sorted(rows.coefficient.unique())
        colours = {"steered": theme.positive, "placebo": theme.ink, "random": theme.muted}
        for kind, colour in colours.items():
            part = rows[rows.kind == kind]
            if part.empty:
                continue
            prompts = part.groupby(["coefficient", "prompt"])[metric].mean()
            means = np.array([bootstrap(prompts[c].to_numpy(), self.seed) for c in strengths])
            axes.plot(means[:, 0], color=colour, marker="o", markersize=3, label=kind)
            if kind == "steered":
                low, high = means[:, 1:].T
                axes.fill_between(range(len(means)), low, high, color=colour, alpha=0.18, lw=0)
        base = self.frame.loc[self.frame.kind == "base", metric].mean()
        axes.axhline(base, color=theme.muted, linestyle="--", linewidth=1, label="base model")
        axes.set_xticks(range(len(strengths)), [f"{c:g}" for c in strengths])
        axes.set_xlabel("strength", color=theme.ink, fontsize=9)
        axes.set_title(METRIC_LABELS.get(metric, metric), loc="left", color=theme.ink, fontsize=10)
        axes.grid(color=theme.muted, alpha=0.25)

    def _swept(self) -> str:
        first, *more = self.operations or ("operation without a name",)
        return first + (f" and {len(more)} more" if more else "")

    def _require(self, metric: str) -> None:
        if metric not in self.metrics():
            raise InputError(f"metric is {metric!r}, expected one of {', '.join(self.metrics())}")

    def _with_interval(self, name: str, values: pd.Series) -> dict[str, float]:
        mean, low, high = bootstrap(values.to_numpy(dtype=np.float64), self.seed)
        return {name: mean, f"{name}_low": low, f"{name}_high": high}
