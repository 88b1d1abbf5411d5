"""Tables and pictures of ``docs/reference/results/`` from the runs of ``results.py``.

    python -m benchmarks.faithfulness.results_page

What stands between ``<!-- begin NAME -->`` and ``<!-- end NAME -->`` in a page there is written
here; the rest is prose. A number in a table is a mean over examples and its 95% bootstrap interval.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import pandas as pd

from benchmarks import ROOT
from benchmarks.faithfulness.results import RUNS, RUNS_OF, SEED
from lenslrp.analysis.attribution.methods import METHODS
from lenslrp.analysis.evaluation.results import PARQUET, Results
from lenslrp.analysis.views.drawing import LIGHT, new_figure

IMAGES = ROOT / "docs" / "images"
PAGES = ROOT / "docs" / "reference" / "results"
"""The pages, and what other scripts measured: a JSON file each, table -> ``{"rows": [...]}``."""

TASKS: Mapping[str, tuple[str, str, str]] = {
    "next_word": ("next word", "area", "zero+first"),
    "sentiment": ("sentiment", "area", "zero"),
    "squad": ("SQuAD", "iou", "none"),
    "squad_all": ("SQuAD, any length", "iou", "none"),
    "squad_smollm2": ("SQuAD, SmolLM2", "iou", "none"),
    "images": ("images", "area", "zero"),
    "indirect_object": ("indirect object", "hit", "none"),
    "agreement": ("agreement", "hit", "none"),
}
"""Run -> its name in tables, and the measure and perturbation that the summary takes."""

POOLED = ("indirect_object", "agreement")
"""Two runs that the summary also takes as one task."""

NAMES = {**{task: name for task, (name, _, _) in TASKS.items()}, "known": "these two as one"}

REFERENCE = {"images": "attnlrp_gamma"}
"""The method that others are compared with: AttnLRP, for images its gamma composite."""

COMPARED = (
    "gradient_x_input", "integrated_gradients", "smoothgrad", "attention_rollout",
    "gradient_x_attention_rollout", "atman",
)  # fmt: skip
SHOWN = ("attnlrp", "cp_lrp", "relp", "gradient_x_attention_rollout", "atman",
         "integrated_gradients", "gradient_x_input", "random")  # fmt: skip


def runs_of(task: str) -> list[Results]:
    """The run of a task and, where there is one, that of the slow methods."""
    folders = [RUNS / name for name in (task, f"{task}-slow") if (RUNS / name / PARQUET).exists()]
    return [Results.read(folder) for folder in folders]


def _number(row: Mapping[str, Any], prefix: str = "", sign: str = "") -> str:
    mean = row[prefix or "mean"]
    if np.isnan(mean):
        return ""
    low, high = ((row[f"{prefix}_{end}"] if prefix else row[end]) for end in ("low", "high"))
    return f"{mean:{sign}.2f} ({low:{sign}.2f} to {high:{sign}.2f})"


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def task_table(task: str) -> str:
    """A row a method: each perturbation's area and its difference from the reference, pointing."""
    reference = REFERENCE.get(task, "attnlrp")
    rows: dict[str, dict[str, str]] = {}
    for results in runs_of(task):
        known = set(rows)
        for metric in ("area", "hit", "iou", "above_distractor"):
            if metric not in results.metrics():
                continue
            for _, row in results.table(metric, reference).iterrows():
                if row["method"] in known:
                    continue
                name = metric if row["perturbation"] == "none" else f"area, {row['perturbation']}"
                cells = rows.setdefault(row["method"], {"n": str(row["n"])})
                cells[name] = _number(row)
                if metric != "above_distractor":
                    cells[f"less {reference}" + f" ({name})"] = _number(row, "difference", "+")
    columns = list(dict.fromkeys(name for cells in rows.values() for name in cells))
    return markdown(
        ["method", *columns],
        (
            [f"`{method}`", *(cells.get(name, "") for name in columns)]
            for method, cells in rows.items()
        ),
    )


def pooled() -> Results:
    """The runs of ``POOLED`` as one; their examples have different names."""
    parts = [results for task in POOLED for results in runs_of(task)]
    frame = pd.concat([part.frame for part in parts], ignore_index=True)
    return Results({**parts[0].settings, "task": "known"}, frame, (), {})


def leads(runs: Sequence[Results], metric: str, way: str, reference: str) -> pd.DataFrame:
    """What the reference has more than each other method: ``method, n, mean, low, high``."""
    frames = []
    for results in runs:
        table = results.table(metric, reference)
        table = table[table["perturbation"].isin([way, "none"]) & (table["method"] != reference)]
        lead = pd.DataFrame({"method": table["method"], "n": table["n"]})
        lead["mean"] = -table["difference"]
        lead["low"], lead["high"] = -table["difference_high"], -table["difference_low"]
        frames.append(lead)
    return pd.concat(frames).drop_duplicates("method").set_index("method")


def summary(every: Mapping[str, pd.DataFrame]) -> str:
    """A row a method, a column a task: the reference's lead, bold where its interval is above 0."""

    def cell(task: str, method: str) -> str:
        if method not in every[task].index:
            return ""
        row = every[task].loc[method]
        text = f"{row['mean']:+.2f} ({row['low']:+.2f} to {row['high']:+.2f})"
        return f"**{text}**" if row["low"] > 0 else text

    names = [name for name in METHODS if any(name in table.index for table in every.values())]
    rows = [[f"`{name}`", *(cell(task, name) for task in every)] for name in names]
    won = [
        str(sum(bool(table.loc[m, "low"] > 0) for m in COMPARED if m in table.index))
        + f" of {sum(m in table.index for m in COMPARED)}"
        for table in every.values()
    ]
    return markdown(
        ["method", *(f"{NAMES[t]}, n = {int(every[t]['n'].max())}" for t in every)],
        [*rows, ["gradient- and attention-based ones behind", *won]],
    )


SEARCHED = (
    ("next_word", "area", "zero+first"),
    ("sentiment", "area", "zero"),
    ("indirect_object", "hit", "none"),
    ("indirect_object", "area", "zero+first"),
    ("agreement", "hit", "none"),
    ("agreement", "area", "zero+first"),
)


def search(half: str) -> str:
    """What ``settings.py`` found on a half: each candidate less AttnLRP, bold where ahead."""
    cells: dict[str, dict[str, str]] = {}
    for task, metric, way in SEARCHED:
        for folder in sorted(RUNS.glob(f"{task}-{half}-*")):
            table = Results.read(folder).table(metric)
            for _, row in table[table["perturbation"] == way].iterrows():
                text = _number(row, "difference", "+")
                row_of = cells.setdefault(row["method"], {})
                name = f"{NAMES[task]}, {metric}, n = {row['n']}"
                row_of[name] = f"**{text}**" if row["difference_low"] > 0 else text
    cells.pop("attnlrp", None)
    columns = list(dict.fromkeys(name for row_of in cells.values() for name in row_of))
    rows = [[name, *(row_of.get(c, "") for c in columns)] for name, row_of in cells.items()]
    return markdown(["less AttnLRP", *columns], rows)


def costs() -> str:
    """Median cost in plain forward and backward passes, a column a task that was timed."""
    tables = {}
    for task in TASKS:
        folder = RUNS / f"{task}-cost"
        if (folder / PARQUET).exists():
            table = Results.read(folder).table("area")
            tables[task] = table.drop_duplicates("method").set_index("method")
    rows = []
    for name in METHODS:
        timed = [t.loc[name] if name in t.index else None for t in tables.values()]
        present = [row for row in timed if row is not None]
        if present:
            passes = f"{present[0]['forward']:.0f}, {present[0]['backward']:.0f}"
            rows.append(
                [f"`{name}`", passes, *("" if r is None else f"{r['cost']:.1f}" for r in timed)]
            )
    return markdown(["method", "forward, backward", *(NAMES[t] for t in tables)], rows)


def measured() -> dict[str, str]:
    """Every table of the other scripts' files, as ``file table``."""
    tables = {}
    for path in sorted(PAGES.glob("*.json")):
        for name, table in json.loads(path.read_text(encoding="utf-8")).items():
            rows = [_joined(row) for row in table["rows"]]
            columns = list(dict.fromkeys(key for row in rows for key in row))
            shown = ([row.get(column, "") for column in columns] for row in rows)
            tables[f"{path.stem} {name}"] = markdown(columns, shown)
    return tables


def _joined(row: Mapping[str, Any]) -> dict[str, str]:
    """A row as text, with a mean and its interval in one cell."""
    cells = {}
    for name, value in row.items():
        stem, _, last = name.rpartition("_")
        prefix = f"{stem}_" if stem else ""
        if last == "mean" and f"{prefix}low" in row:
            low, high = row[f"{prefix}low"], row[f"{prefix}high"]
            cells[stem.replace("_", " ") or "mean"] = f"{value:.3g} ({low:.3g} to {high:.3g})"
        elif last not in ("low", "high") or f"{prefix}mean" not in row:
            cells[name.replace("_", " ")] = (
                f"{value:.3g}" if isinstance(value, float) else str(value)
            )
    return cells


def draw_leads(every: Mapping[str, pd.DataFrame]) -> None:
    """The summary as a picture: a panel a task, a bar an interval."""
    names = [name for name in METHODS if any(name in table.index for table in every.values())]
    figure, panels = new_figure(2.1 * len(every) + 1.6, 4.6, LIGHT, len(every))
    for place, (axes, (task, table)) in enumerate(zip(panels, every.items(), strict=True)):
        for y, name in enumerate(reversed(names)):
            if name in table.index:
                row = table.loc[name]
                colour = (
                    "#c0392b" if row["low"] > 0 else "#2c5f9e" if row["high"] < 0 else "#888888"
                )
                axes.plot([row["low"], row["high"]], [y, y], color=colour, linewidth=2)
                axes.plot([row["mean"]], [y], "o", color=colour, markersize=4)
        axes.axvline(0, color=LIGHT.muted, linewidth=0.8)
        axes.set_title(NAMES[task], fontsize=9, color=LIGHT.ink)
        labels = list(reversed(names)) if place == 0 else [""] * len(names)
        axes.set_yticks(range(len(names)), labels, fontsize=7)
        axes.tick_params(axis="x", labelsize=7, colors=LIGHT.ink)
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="y", color=LIGHT.muted, linewidth=0.3, alpha=0.5)
    figure.supxlabel(
        "AttnLRP's lead with its 95% interval (red: ahead, blue: behind, grey: neither): area in "
        "logits; overlap on SQuAD; hit rate where the answer is known",
        fontsize=8,
    )
    figure.savefig(IMAGES / "results.png", dpi=110, bbox_inches="tight")


def draw_curves() -> None:
    """Curves of the next-word task, for a few methods."""
    results = runs_of("next_word")[0]
    shown = [name for name in SHOWN if name in results.settings["methods"]]
    frame = results.frame[results.frame["method"].isin(shown)]
    few = Results({**results.settings, "methods": shown}, frame, results.skipped, results.unfit)
    figure = few.plot("zero+first")
    figure.savefig(IMAGES / "curves.png", dpi=90, bbox_inches="tight")


def first_steps(task: str, way: str) -> str:
    """Mean curves: the target at the start, and after the first step in either order."""
    frame = pd.concat([results.frame for results in runs_of(task)])
    part = frame[frame["perturbation"] == way].drop_duplicates(["example", "method"])
    rows = []
    for name, curves in part.groupby("method", sort=False):
        steps = [
            [curve[i] for curve in curves[way]]
            for way, i in (("morf", 0), ("morf", 1), ("lerf", 1))
        ]
        means = (f"{np.mean(values):.2f}" for values in steps)
        rows.append([f"`{name}`", str(len(curves)), *means])
    return markdown(["method", "n", "whole", "most relevant gone", "least relevant gone"], rows)


def settings_table() -> str:
    rows = []
    for task in TASKS:
        for results in runs_of(task):
            s, run = results.settings, RUNS_OF[task]
            unfit = ", ".join(f"{n} {reason}" for reason, n in results.unfit.items()) or "none"
            cells = [run.model, s["model"]["dtype"], results.n, s["steps"]]
            size = f"{results.frame['features'].mean():.0f}"
            cells += [size, s["half"] or "all", unfit, len(results.skipped)]
            rows.append([NAMES[task], *map(str, cells)])
    return markdown(
        ["task", "model", "dtype", "n", "steps", "features, mean", "half of the texts", "left out",
         "damaged lines"], rows,
    )  # fmt: skip


def main() -> None:
    every = {
        task: leads(runs_of(task), metric, way, REFERENCE.get(task, "attnlrp"))
        for task, (_, metric, way) in TASKS.items()
        if runs_of(task)
    }
    if all(task in every for task in POOLED):
        every["known"] = leads([pooled()], "hit", "none", "attnlrp")
    blocks: dict[str, Callable[[], str]] = {
        "settings": settings_table,
        "summary": partial(summary, every),
        "costs": costs,
        "search": partial(search, "development"),
        "held-out": partial(search, "held-out"),
        "first steps": partial(first_steps, "indirect_object", "zero+first"),
        "first steps sentiment": partial(first_steps, "sentiment", "zero"),
        **{task: partial(task_table, task) for task in every if task in TASKS},
    }
    pages = {path: path.read_text(encoding="utf-8") for path in sorted(PAGES.glob("*.md"))}
    written = {**{name: made() for name, made in blocks.items()}, **measured()}
    for name, table in written.items():
        begin, end = f"<!-- begin {name} -->\n", f"<!-- end {name} -->"
        page = next((path for path, text in pages.items() if begin in text and end in text), None)
        if page is None:
            print(f"no page has a place for {name}")
            continue
        before, rest = pages[page].split(begin, 1)
        pages[page] = f"{before}{begin}\n{table}\n\n{end}{rest.split(end, 1)[1]}"
    for path, text in pages.items():
        path.write_text(text, encoding="utf-8")
    draw_leads(every)
    draw_curves()
    print(f"seed {SEED}; written: {PAGES.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
