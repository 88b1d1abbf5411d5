"""The results of an evaluation: every number of every example, and the tables made of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from lenslrp.analysis.common.statistics import bootstrap
from lenslrp.analysis.evaluation.spans import POINTING
from lenslrp.errors import InputError
from lenslrp.files import whole
from lenslrp.views.cards import Face, Shown

if TYPE_CHECKING:
    from matplotlib.figure import Figure

JOURNAL = "examples.jsonl"
PARQUET = "results.parquet"

REFERENCE = "attnlrp"
CURVES = ("morf", "lerf", "morf_probability", "lerf_probability")
EXAMPLE_COLUMNS = ("example", "target", "value", "features")
OTHER_COLUMNS = (
    *EXAMPLE_COLUMNS, "perturbation", "method", "shares", *CURVES, "seconds", "forward",
    "backward", "cost",
)  # fmt: skip
"""Columns that are no metrics."""

SHOWN_METRICS = {
    "area": "Area between the curves, least relevant first less most relevant first: in units of "
    "the target, the larger the more faithful.",
    "naopc": "Normalised AOPC: 1 is the best order of features, 0 the worst.",
    "hit": "Share of examples whose most relevant feature is the key.",
    "iou": "Overlap of the most relevant features with the key.",
}
"""What is shown of results, and what it means."""


@dataclass(frozen=True, eq=False, repr=False)
class Results(Shown):
    """All examples of a run.

    Attributes:
        settings: the options it was made with.
        frame: one row an example, method and perturbation; see `to_dataframe`.
        skipped: names of input records that could not be read, and why.
        unfit: records that make no example for this model: reason -> how many.

    Examples:
        ```python
        results = Results.read("results/next_word")  # what evaluate wrote there
        results.metrics()  # ["area", "deletion", "insertion", "comprehensiveness", "sufficiency"]
        results.table("area", against="random")  # mean, interval and paired difference of each
        ```
    """

    settings: dict[str, Any]
    frame: pd.DataFrame
    skipped: tuple[str, ...]
    unfit: dict[str, int]

    @classmethod
    def of(
        cls, settings: dict[str, Any], rows: Iterable[dict[str, Any]], skipped: Iterable[str]
    ) -> Results:
        """From the rows of a journal, as `evaluate` writes them.

        Raises:
            InputError: no example among them.
        """
        left_out: dict[str, int] = {}
        flat = []
        for row in rows:
            if "unfit" in row:
                left_out[row["unfit"]] = left_out.get(row["unfit"], 0) + 1
                continue
            for perturbation, methods in row["perturbed"].items():
                for method, scores in methods.items():
                    flat.append(_flat(row, perturbation, method, scores))
        if not flat:
            reasons = ", ".join(f"{reason}: {n}" for reason, n in left_out.items()) or "no records"
            raise InputError(f"{settings['task']}: not one example ({reasons})")
        return cls(settings, pd.DataFrame(flat), tuple(skipped), left_out)

    def write(self, folder: Path) -> None:
        """Write one parquet file into ``folder``, the settings in its metadata."""
        frame = self.to_dataframe()
        frame.attrs = {
            "settings": self.settings, "skipped": list(self.skipped), "unfit": self.unfit
        }  # fmt: skip
        with whole(folder / PARQUET) as part:
            frame.to_parquet(part)

    @classmethod
    def read(cls, folder: str | Path) -> Results:
        """The results that `evaluate` wrote.

        Args:
            folder: that of the run, or the parquet file in it.

        Raises:
            InputError: no finished run there.
        """
        path = Path(folder)
        path = path if path.suffix == ".parquet" else path / PARQUET
        if not path.exists():
            raise InputError(f"{path} does not exist: no run was finished in this folder")
        frame = pd.read_parquet(path)
        metadata, frame.attrs = frame.attrs, {}
        if "settings" not in metadata:
            raise InputError(f"{path} does not say what it was made with: run evaluate again")
        return cls(metadata["settings"], frame, tuple(metadata["skipped"]), metadata["unfit"])

    @property
    def n(self) -> int:
        """How many examples there are."""
        return int(self.frame["example"].nunique())

    def to_dataframe(self) -> pd.DataFrame:
        """One row an example, method and perturbation.

        Columns: ``example, target, value, features, perturbation, method``; the scores of
        `PerturbationCurve` (areas in units of the target); ``hit``, ``hit_at_3``, ``iou``,
        ``above_distractor`` where the answer is known; ``naopc`` with a beam; ``seconds``, ``cost``
        (relative to a plain forward and backward pass of this example), ``forward``, ``backward``
        (passes of one sequence); and the curves as lists.
        """
        return self.frame.copy()

    def metrics(self) -> list[str]:
        """The metrics that these results have: names for `table`."""
        return [name for name in self.frame if name not in OTHER_COLUMNS]

    def table(self, metric: str = "area", against: str | None = None) -> pd.DataFrame:
        """Mean, 95% bootstrap interval and paired difference from a method, for each method.

        Args:
            metric: one of `metrics`.
            against: the method that the others are compared with; ``attnlrp``, or the first.

        Returns:
            A row a perturbation (``"none"`` where a metric needs none) and method: ``n, mean, low,
            high``; ``difference, difference_low, difference_high`` (this method less the other;
            over the examples where both have a value, ``n``); ``cost`` (median, in plain forward
            and backward passes), ``forward``, ``backward``.

        Raises:
            InputError: no such metric or method.
        """
        if metric not in self.metrics():
            raise InputError(f"no metric {metric!r}; there are {', '.join(self.metrics())}")
        names = list(self.settings["methods"])
        other = against or (REFERENCE if REFERENCE in names else names[0])
        if other not in names:
            raise InputError(f"no method {other!r}; there are {', '.join(names)}")
        seed, rows = self.settings["seed"], []
        perturbations = self.settings["perturbations"]
        for perturbation in perturbations[:1] if metric in POINTING else perturbations:
            part = self.frame[self.frame["perturbation"] == perturbation]
            wide = part.pivot(index="example", columns="method", values=metric)
            for name in names:
                pairs = wide[[name]].assign(other=wide[other]).dropna().to_numpy()
                mean = difference = (np.nan,) * 3
                if len(pairs):
                    mean = bootstrap(pairs[:, 0], seed)
                if len(pairs) and name != other:
                    difference = bootstrap(pairs[:, 0] - pairs[:, 1], seed)
                costs = part.loc[part["method"] == name, ["cost", "forward", "backward"]]
                rows.append(
                    [
                        "none" if metric in POINTING else perturbation,
                        name,
                        len(pairs),
                        *mean,
                        *difference,
                        costs["cost"].median(),
                        costs["forward"].mean(),
                        costs["backward"].mean(),
                    ]
                )
        columns = ["perturbation", "method", "n", "mean", "low", "high", "difference",
                   "difference_low", "difference_high", "cost", "forward", "backward"]  # fmt: skip
        return pd.DataFrame(rows, columns=columns)

    def plot(self, perturbation: str | None = None, probability: bool = False) -> Figure:
        """Mean curves of every method: the most relevant first (solid), the least (dashed).

        Args:
            perturbation: which; the first if not given.
            probability: the target's probability instead of its value.

        Raises:
            InputError: no such perturbation.
            MissingExtraError: matplotlib is not installed.
        """
        from lenslrp.analysis.evaluation.figures import perturbation_curves

        perturbation = perturbation or self.settings["perturbations"][0]
        known = self.settings["perturbations"]
        if perturbation not in known:
            raise InputError(f"no perturbation {perturbation!r}; there are {', '.join(known)}")
        part = self.frame[self.frame["perturbation"] == perturbation]
        grid = np.linspace(0, 1, self.settings["steps"] + 1)
        suffix = "_probability" if probability else ""
        means = {}
        for method in self.settings["methods"]:
            of_method = part[part["method"] == method]
            means[method] = [
                np.mean(
                    [
                        np.interp(grid, shares, curve)
                        for shares, curve in zip(of_method["shares"], of_method[name], strict=True)
                    ],
                    axis=0,
                )
                for name in (f"morf{suffix}", f"lerf{suffix}")
            ]
        unit = "probability of the target" if probability else "target (logits)"
        title = f"{self.settings['task']}, {perturbation}, n = {self.n}"
        return perturbation_curves(grid, means, unit=unit, title=title)

    def face(self) -> Face:
        area, reference = self.table("area"), self._reference()
        frame, coloured = area[["perturbation", "method"]], list[str]()
        known = {name: text for name, text in SHOWN_METRICS.items() if name in self.metrics()}
        for metric in known:
            table, coloured = self.table(metric), [*coloured, f"Δ {metric}"]
            means = table[["mean", "low", "high"]].itertuples(index=False)
            part = table[["perturbation", "method"]].assign(**{
                metric: ["{:.3g} ({:.3g} to {:.3g})".format(*row) for row in means],
                coloured[-1]: table["difference"].where(table["method"] != reference, 0.0),
            })  # fmt: skip
            part = part.drop(columns="perturbation") if metric in POINTING else part
            frame = frame.merge(part)
        return Face(
            "Results of an evaluation",
            {"task": self.settings["task"], "examples": self.n,
             "methods": len(self.settings["methods"])},
            frame.assign(cost=area["cost"]),
            coloured,
            [*(f"{name}: {text}" for name, text in known.items()),
             f"Means with 95% bootstrap intervals; Δ: less {reference}; cost in plain passes; "
             "table(metric) has more."],
        )  # fmt: skip

    def __str__(self) -> str:
        """The tables as text, with what was left out."""
        lines = []
        for metric, meaning in SHOWN_METRICS.items():
            if metric in self.metrics():
                table = self.table(metric).round(3).to_string(index=False)
                lines += [f"{metric}: {meaning}", table, ""]
        lines.append(
            f"n = {self.n} examples; 95% bootstrap intervals, seed {self.settings['seed']}; "
            "difference: the method less " + self._reference()
        )
        lines += [f"left out: {count} {reason}" for reason, count in self.unfit.items()]
        if self.skipped:
            lines.append(f"skipped input lines: {len(self.skipped)}, such as {self.skipped[0]}")
        return "\n".join(lines)

    def _reference(self) -> str:
        names = list(self.settings["methods"])
        return REFERENCE if REFERENCE in names else str(names[0])


def _flat(
    row: dict[str, Any], perturbation: str, method: str, scores: dict[str, Any]
) -> dict[str, Any]:
    measures = row["methods"][method]
    return {
        **{name: row[name] for name in EXAMPLE_COLUMNS},
        "perturbation": perturbation,
        "method": method,
        **scores,
        **measures,
        "cost": measures["seconds"] / row["plain_seconds"],
    }
