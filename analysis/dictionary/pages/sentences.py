"""A unit's sentences as markup: each token coloured by what the unit did there.

One symmetric scale for each quantity over the whole page, so that a decile is as pale as it is weak
beside the best hits; beyond its ends the colour is full, and titles have the numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from lenslrp.analysis.dictionary.plan import TOP_CRITERIA
from lenslrp.analysis.dictionary.text_search import inside_word
from lenslrp.text.visible_text import running, visible
from lenslrp.views.heatmap import rgba, signed

if TYPE_CHECKING:
    from lenslrp.analysis.dictionary.unit import Page

ALIKE = 0.95
"""Cosine of two rows of values from which on one of them is shown."""

COLUMNS = {"activation": "activations", "relevance": "relevances", "attribution": "attributions"}

TITLES: Mapping[str, tuple[str, str]] = {
    "actmax": ("ActMax", "the documents in which it is most active."),
    "actmin": ("ActMin", "the documents in which it is least active, or most negative."),
    "relmax": ("RelMax", "the documents in which it mattered most for the target."),
    "relmin": (
        "RelMin",
        "the documents in which it was the strongest negative evidence for the target.",
    ),
    "deciles": (
        "Deciles",
        "ten documents at the deciles of its largest activations over a sample, lowest first.",
    ),
    "random": ("Random", "ten documents drawn at random, the same for every unit."),
}


@dataclass(frozen=True)
class Scales:
    """What gets the full colour, of each quantity: one symmetric scale for the whole page."""

    limits: Mapping[str, float]

    @classmethod
    def of(cls, frames: Mapping[str, pd.DataFrame], first: int) -> Scales:
        """The median of the examples' largest sizes, of the extreme criterion where it is largest.

        So one hit does not fade all others. Positions before `first` were not searched and do
        not count.
        """
        extreme = [frame for name, frame in frames.items() if name in TOP_CRITERIA]
        limits = {}
        for kind, column in COLUMNS.items():
            sizes = [
                [
                    _largest(row, first - start)
                    for row, start in zip(f[column], f["start"], strict=True)
                ]
                for f in extreme or frames.values()
                if column in f
            ]
            if any(sizes):
                middle = max(float(np.median(some)) for some in sizes if some)
                limits[kind] = middle or max(max(some, default=0.0) for some in sizes)
        return cls(limits)

    def fraction(self, kind: str, value: float) -> float:
        limit = self.limits[kind]
        if limit == 0 or not math.isfinite(value):
            return 0.0
        return max(-1.0, min(1.0, value / limit))

    def legend(self) -> list[dict[str, Any]]:
        return [
            {
                "name": name,
                "low": f"≤ {signed(-limit, limit)}",
                "high": f"≥ {signed(limit, limit)}",
                "left": rgba(-1.0),
                "right": rgba(1.0),
            }
            for name, limit in self.limits.items()
        ]


def _largest(row: NDArray[np.float32], skipped: int) -> float:
    sizes = np.abs(row[max(0, skipped) :])
    return float(np.nan_to_num(sizes, posinf=0).max(initial=0))


def stronger_first(frames: Mapping[str, pd.DataFrame]) -> dict[str, pd.DataFrame]:
    """Examples by criterion: a lowest end that is larger in size than the highest comes before it.

    A neuron may say what it does where it is negative.
    """
    order = list(frames)
    for high, low in (("actmax", "actmin"), ("relmax", "relmin")):
        if high in frames and low in frames:
            sizes = [frames[name]["score"].abs().max() for name in (high, low)]
            if sizes[1] > sizes[0]:
                a, b = order.index(high), order.index(low)
                order[a], order[b] = low, high
    return {name: frames[name] for name in order}


def sentences(
    page: Page, frames: Mapping[str, pd.DataFrame], totals: Mapping[str, int]
) -> dict[str, Any]:
    """What the template shows of the examples in `frames`, of `totals` there are."""
    plan = page.dictionary.plan
    scales = Scales.of(frames, int(plan.skip_first))
    frames = {name: _cut_at_words(page, frame) for name, frame in frames.items()}
    tabs = []
    for name, frame in frames.items():
        title, what = TITLES[name]
        relevant = name.startswith("rel")
        kinds = [kind for kind in ("relevance", "activation", "attribution")
                 if COLUMNS[kind] in frame and (kind != "relevance" or relevant)]  # fmt: skip
        aim = "logit " if plan.target in ("next", "argmax") else ""
        examples = [_example(row, kinds, scales, aim) for row in frame.to_dict("records")]
        more = totals[name] - len(frame)
        note = f"{more} more in the dictionary." if more > 0 else ""
        tabs.append(
            {
                "title": title,
                "what": what,
                "examples": examples,
                "more": note,
                "alone": len(kinds) == 1,
            }
        )
    what = "Red where it is active or matters, blue where it is negative."
    if "attribution" in scales.limits:
        what += (
            " Attribution: which tokens made it fire at the hit, as relevance for its activation"
            " there; left out where it is spread as the activation is."
        )
    if plan.relevance:
        what += f" Relevance is for the target {plan.target!r}, at one position a document."
    return {
        "what": what,
        "scales": scales.legend(),
        "tabs": tabs,
        "aims": plan.relevance,
    }


def _cut_at_words(page: Page, frame: pd.DataFrame) -> pd.DataFrame:
    """The windows without the parts of words at their ends; the hit stays."""
    documents = page.dictionary.texts.referenced(frame["doc"])
    rows = []
    for row in frame.to_dict("records"):
        document = documents[row["doc"]]
        starts, stops = document.spans.T.tolist()
        first, stop = row["start"], row["start"] + len(row["tokens"])
        while first < row["position"] and inside_word(document.text, starts[first]):
            first += 1
        while stop > row["position"] + 1 and inside_word(document.text, stops[stop - 1]):
            stop -= 1
        kept = slice(first - row["start"], stop - row["start"])
        values = {name: row[name][kept] for name in ("tokens", *COLUMNS.values()) if name in row}
        rows.append({**row, **values, "start": first})
    return pd.DataFrame(rows, columns=frame.columns)


def _differs(row: Mapping[str, Any]) -> bool:
    """Whether attribution says more than activation: up to the hit, after which it is 0."""
    a, b = (row[COLUMNS[kind]][: row["position"] - row["start"] + 1].astype(np.float64)
            for kind in ("attribution", "activation"))  # fmt: skip
    lengths = np.linalg.norm(a) * np.linalg.norm(b)
    return bool(lengths == 0 or a @ b < ALIKE * lengths)


def _example(row: Mapping[str, Any], kinds: list[str], scales: Scales, aim: str) -> dict[str, Any]:
    from markupsafe import Markup

    offset = row["target_position"] - row["position"]
    where = (
        "at the hit"
        if offset == 0
        else f"{abs(offset)} tokens {'later' if offset > 0 else 'earlier'}"
    )
    relevant = kinds[0] == "relevance"
    target = row["target"] if relevant else None
    return {
        "score": f"{kinds[0]} {signed(row['score'], abs(row['score']))}",
        "about": f" · document {row['doc']}, token {row['position']}",
        "target": None if target is None else visible(target),
        "aim": f" ({aim}{row['target_value']:+.2f}), predicted {where}",
        "lines": [
            {"name": kind, "tokens": Markup(_line(row, kind, scales))}
            for kind in kinds
            if len(row[COLUMNS[kind]]) and (kind != "attribution" or _differs(row))
        ],
    }


def _line(row: Mapping[str, Any], kind: str, scales: Scales) -> str:
    """The tokens of one window, coloured by one quantity; all quantities in their titles."""
    shown = []
    values = {k: row[c] for k, c in COLUMNS.items() if c in row and len(row[c])}
    for i, token in enumerate(row["tokens"]):
        position = row["start"] + i
        numbers = " · ".join(f"{k} {values[k][i]:+.3g}" for k in values)
        fraction = scales.fraction(kind, float(values[kind][i]))
        look = f' style="background:{rgba(fraction)}"' if abs(fraction) >= 0.02 else ""
        marks, text = "t", escape(running(token))
        if position == row["position"]:
            marks, text = (
                "t hit",
                f"<b>{escape(visible(token) if token == ' ' else running(token))}</b>",
            )
        if position == row["target_position"]:
            marks += " aim"
        title = escape(f"{position} · {numbers}")
        shown.append(f'<bdi class="{marks}" title="{title}"{look}>{text}</bdi>')
    return "".join(shown)
