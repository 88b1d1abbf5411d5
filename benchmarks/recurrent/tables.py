"""What `rules.py` prints of its rows: leads, every method, maps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np

from lenslrp.analysis.common.journal import Row
from lenslrp.analysis.common.statistics import Numbers, bootstrap, interval

Score = Callable[..., Numbers]
SEED = 0
"""Of the bootstrap."""

WINDOW = 4
"""How many positions, up to its own, the short convolution reads: of all three mixers."""


def hits(row: Row, method: str, at: str = "source") -> Numbers:
    """[n] 1 where the most relevant token is the source of the answer (or its key), else 0."""
    return (np.array(row["first"][method]) == np.array(row[at], dtype=float)).astype(float)


def areas(row: Row, method: str) -> Numbers:
    """[n] between LeRF and MoRF, in logits."""
    return np.array(row["area"][method])


def map_hits(row: Row, hook: str, near: str) -> Numbers:
    """[n] 1 where a layer's map is largest at the source of the answer or its key, or within reach.

    Args:
        near: ``"source"``, ``"key"``, ``"either"`` of them, or ``"reach"``: at a position whose
            short convolution reads the source.
    """
    found = np.array(row["map"][hook])
    source, key = (np.array(row[at], dtype=float) for at in ("source", "key"))
    return {
        "source": found == source,
        "key": found == key,
        "either": (found == source) | (found == key),
        "reach": (found >= source) & (found < source + WINDOW),
    }[near].astype(float)


def map_chance(row: Row, near: str) -> Numbers:
    """[n] `map_hits` of a map whose largest entry is anywhere."""
    before = np.array(row["end"]) - 1
    if near == "reach":
        return np.minimum(WINDOW, before - np.array(row["source"])) / before
    return (2 if near == "either" and row["key"][0] is not None else 1) / before


def map_at_best(row: Row, near: str) -> Numbers:
    """[n] `map_hits` of the layer that has most of them on the other half of the prompts."""
    by_layer = np.stack([map_hits(row, hook, near) for hook in sorted(row["map"])])
    halves = np.array_split(np.arange(by_layer.shape[1]), 2)
    return np.concatenate([
        by_layer[by_layer[:, other].mean(axis=1).argmax(), half]
        for half, other in zip(halves, halves[::-1], strict=True)
    ])  # fmt: skip


def joined(rows: Sequence[Row], score: Score, *given: str) -> Numbers:
    """A score of the prompts of all seeds."""
    return np.concatenate([score(row, *given) for row in rows])


def lead(rows: Sequence[Row], score: Score, first: str, second: str) -> Numbers:
    """Paired: of the second method over the first."""
    return joined(rows, score, second) - joined(rows, score, first)


def verdict(groups: Iterable[Sequence[Row]], score: Score, first: str, second: str) -> list[int]:
    """How often the second's lead over the first is above 0, and below, with its whole interval."""
    intervals = [bootstrap(lead(rows, score, first, second), SEED)[1:] for rows in groups]
    return [sum(low > 0 for low, _ in intervals), sum(high < 0 for _, high in intervals)]


def print_table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> None:
    print("| " + " | ".join(head) + " |\n|" + "---|" * len(head))
    for line in lines:
        print("| " + " | ".join(line) + " |")
    print(flush=True)


Groups = dict[tuple[str, str], list[Row]]


def by_model_and_task(rows: Iterable[Row]) -> Groups:
    groups: Groups = {}
    for row in rows:
        groups.setdefault((row["model"], row["task"]), []).append(row)
    return groups


def leads(groups: Groups, first: str, second: str) -> None:
    """The two, hit and area, and the second's lead: over all prompts, and for each seed."""
    head = ["model", "task", "n"]
    for name in ("hits", "area"):
        head += [f"{name}: {first}", second, "lead", "of each seed"]
    lines = []
    for (model, task), rows in groups.items():
        cells = [model, task, str(len(joined(rows, areas, first)))]
        for score in (hits, areas):
            if score is hits and rows[0]["source"][0] is None:
                cells += ["-"] * 4
                continue
            cells += [f"{joined(rows, score, way).mean():.2f}" for way in (first, second)]
            cells.append(interval(lead(rows, score, first, second), SEED, "+"))
            cells.append(
                ", ".join(f"{lead([row], score, first, second).mean():+.2f}" for row in rows)
            )
        lines.append(cells)
    print_table(head, lines)


def methods(groups: Groups, names: Sequence[str], score: Score, *at: str) -> None:
    """A score of every method, with its interval, of the tasks where ``at`` is known."""
    lines = []
    for (model, task), rows in groups.items():
        if any(rows[0][mark][0] is None for mark in at):
            continue
        scores = [interval(joined(rows, score, name, *at), SEED) for name in names]
        lines.append([model, task, *scores])
    print_table(["model", "task", *names], lines)


def maps(groups: Groups) -> None:
    """How often the map points at the source or its key, at the best layer, and at each."""
    lines = []
    for (model, task), rows in groups.items():
        if not rows[0]["map"]:
            continue
        cells = [model, task]
        for near in ("either", "reach"):
            cells.append(interval(joined(rows, map_at_best, near), SEED))
            cells.append(f"{joined(rows, map_chance, near).mean():.2f}")
        for near in ("source", "key", "reach"):
            means = [joined(rows, map_hits, hook, near).mean() for hook in sorted(rows[0]["map"])]
            cells.append(", ".join(f"{mean:.2f}" for mean in means))
        lines.append(cells)
    print_table(
        ["model", "task", "source or key, best layer", "chance", "reads the source, best layer",
         "chance", "source, each layer", "key", "reads the source"],
        lines,
    )  # fmt: skip
