"""What an evaluation found: every number of every example, and the tables made of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from lenslrp.analysis.common.statistics import bootstrap
from lenslrp.errors import InputError
from lenslrp.files import whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

JOURNAL = "examples.jsonl"
PARQUET = "results.parquet"

REFERENCE = "attnlrp"
CURVES = ("morf", "lerf", "morf_probability", "lerf_probability")
POINTING = ("hit", "hit_at_3", "iou", "above_distractor")
"""Measures that no perturbation has a part in."""
METRICS = (
    "area", "deletion", "insertion", "comprehensiveness", "sufficiency", "naopc", *POINTING
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Results:
    """All examples of a run.

    Attributes:
        settings: the options it was made with.
        frame: one row an example, method and perturbation; see :meth:`to_dataframe`.
        skipped: names of input records that could not be read, and why.
        unfit: records that made no example: reason -> how many.
    """

    settings: dict[str, Any]
    frame: pd.DataFrame
    skipped: tuple[str, ...]
    unfit: dict[str, int]

    @classmethod
    def of(
        cls, settings: dict[str, Any], rows: Iterable[dict[str, Any]], skipped: Iterable[str]
    ) -> Results:
        """From the rows of a journal.

        Raises:
            InputError: no example among them.
        """
        unfit: dict[str, int] = {}
        flat = []
        for row in rows:
            if "unfit" in row:
                unfit[row["unfit"]] = unfit.get(row["unfit"], 0) + 1
                continue
            for way, methods in row["perturbed"].items():
                for method, scores in methods.items():
                    flat.append(_flat(row, way, method, scores))
        if not flat:
            reasons = ", ".join(f"{reason}: {n}" for reason, n in unfit.items()) or "no records"
            raise InputError(f"{settings['task']}: not one example ({reasons})")
        return cls(settings, pd.DataFrame(flat), tuple(skipped), unfit)

    def write(self, folder: Path) -> None:
        """One parquet file, what it was made with in its metadata."""
        frame = self.to_dataframe()
        frame.attrs = {
            "settings": self.settings, "skipped": list(self.skipped), "unfit": self.unfit
        }  # fmt: skip
        with whole(folder / PARQUET) as part:
            frame.to_parquet(part)

    @classmethod
    def read(cls, folder: str | Path) -> Results:
        """What :func:`~lenslrp.analysis.evaluation.harness.evaluate` left in its folder.

        Raises:
            InputError: no finished run there.
        """
        path = Path(folder) / PARQUET
        if not path.exists():
            raise InputError(f"{path} does not exist: no run was finished in this folder")
        frame = pd.read_parquet(path)
        told, frame.attrs = frame.attrs, {}
        if "settings" not in told:
            raise InputError(f"{path} does not say what it was made with: run evaluate again")
        return cls(told["settings"], frame, tuple(told["skipped"]), told["unfit"])

    @property
    def n(self) -> int:
        """Examples."""
        return int(self.frame["example"].nunique())

    def to_dataframe(self) -> pd.DataFrame:
        """One row an example, method and perturbation.

        Columns: ``example, target, value, features, perturbation, method``; the scores of
        `PerturbationCurve` (areas in units of the
        target); ``hit``, ``hit_at_3``, ``iou``, ``above_distractor`` where the answer is known;
        ``naopc`` where asked for; ``seconds``, ``cost`` (relative to a plain forward and backward
        pass of this example), ``forward``, ``backward`` (passes of one sequence); and the curves as
        lists.
        """
        return self.frame.copy()

    def metrics(self) -> list[str]:
        """The measures that these results have."""
        return [name for name in METRICS if name in self.frame]

    def table(self, metric: str = "area", against: str | None = None) -> pd.DataFrame:
        """Mean, 95% bootstrap interval and paired difference from a method, for each method.

        Args:
            metric: one of :meth:`metrics`.
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
        ways = self.settings["perturbations"]
        for way in ways[:1] if metric in POINTING else ways:
            part = self.frame[self.frame["perturbation"] == way]
            wide = part.pivot(index="example", columns="method", values=metric)
            for name in names:
                both = wide[[name]].assign(other=wide[other]).dropna().to_numpy()
                own = part[part["method"] == name]
                nothing = (np.nan,) * 3
                mean = bootstrap(both[:, 0], seed) if len(both) else nothing
                lead = nothing
                if len(both) and name != other:
                    lead = bootstrap(both[:, 0] - both[:, 1], seed)
                costs = [own["cost"].median(), own["forward"].mean(), own["backward"].mean()]
                shown = "none" if metric in POINTING else way
                rows.append([shown, name, len(both), *mean, *lead, *costs])
        columns = ["perturbation", "method", "n", "mean", "low", "high", "difference",
                   "difference_low", "difference_high", "cost", "forward", "backward"]  # fmt: skip
        return pd.DataFrame(rows, columns=columns)

    def plot(self, perturbation: str | None = None, probability: bool = False) -> Figure:
        """Mean curves of every method: the most relevant first (solid), the least (dashed).

        Args:
            perturbation: which; the first if not given.
            probability: the target's probability instead of its value.
        """
        from lenslrp.analysis.evaluation.figures import perturbation_curves

        way = perturbation or self.settings["perturbations"][0]
        if way not in self.settings["perturbations"]:
            raise InputError(
                f"no perturbation {way!r}; there are {', '.join(self.settings['perturbations'])}"
            )
        part = self.frame[self.frame["perturbation"] == way]
        grid = np.linspace(0, 1, self.settings["steps"] + 1)
        suffix = "_probability" if probability else ""
        means = {}
        for method in self.settings["methods"]:
            own = part[part["method"] == method]
            means[method] = [
                np.mean(
                    [
                        np.interp(grid, shares, curve)
                        for shares, curve in zip(own["shares"], own[way_ + suffix], strict=True)
                    ],
                    axis=0,
                )
                for way_ in ("morf", "lerf")
            ]
        unit = "probability of the target" if probability else "target (logits)"
        title = f"{self.settings['task']}, {way}, n = {self.n}"
        return perturbation_curves(grid, means, unit=unit, title=title)

    def __str__(self) -> str:
        """The tables as text, with what was left out."""
        lines = []
        for metric in ("area", "naopc", "hit", "iou"):
            if metric in self.metrics():
                lines += [metric, self.table(metric).round(3).to_string(index=False), ""]
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


def _flat(row: dict[str, Any], way: str, method: str, scores: dict[str, Any]) -> dict[str, Any]:
    told = row["methods"][method]
    return {
        **{name: row[name] for name in ("example", "target", "value", "features")},
        "perturbation": way,
        "method": method,
        **scores,
        **told,
        "cost": told["seconds"] / row["plain_seconds"],
    }
