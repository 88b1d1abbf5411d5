"""The tables of `neurons.py`: means, 95% bootstrap intervals, paired differences.

A *drop* is how far a log-probability (or logit) of the right answer falls, in nats (logits).
Intervals resample facts (10,000 times, the same resamples for every method: differences are
paired). `d` is the paired effect size: mean difference over its standard deviation. Facts of one
relation resemble each other, so the paired differences also come with an interval that resamples
whole relations.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.knowledge.scores import METHODS, RANDOM, Fact
from lenslrp.analysis.common.statistics import RESAMPLES, bootstrap, interval

Values = NDArray[np.float64]
LOGIT, LOG_PROB, RANK = 0, 1, 2
REFERENCES = ("AttnLRP", "AttnLRP, last", "AttnLRP, contrast")
CONTROLS = tuple(name for name in METHODS if name not in REFERENCES)
EXAMPLES = 10
MANY = 20  # neurons of the collateral measurements


def clustered(values: Values, clusters: list[str], seed: int) -> tuple[float, float]:
    """95% interval of the mean when whole clusters are resampled."""
    names = list(dict.fromkeys(clusters))
    sums = np.array([values[[c == n for c in clusters]].sum() for n in names])
    counts = np.array([clusters.count(n) for n in names])
    picks = np.random.default_rng(seed).integers(0, len(names), (RESAMPLES, len(names)))
    low, high = np.percentile(sums[picks].sum(axis=1) / counts[picks].sum(axis=1), [2.5, 97.5])
    return float(low), float(high)


def table(title: str, head: Iterable[str], rows: Iterable[Iterable[str]]) -> None:
    """One Markdown table."""
    columns = list(head)
    print(f"\n### {title}\n")
    print("| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
    for row in rows:
        print("| " + " | ".join(row) + " |")


def ratio(a: Values, b: Values, seed: int) -> str:
    """Mean of a over mean of b with its interval; both resampled together."""
    kept = ~np.isnan(a + b)
    a, b = a[kept], b[kept]
    picks = np.random.default_rng(seed).integers(0, len(a), (RESAMPLES, len(a)))
    low, high = np.percentile(a[picks].mean(axis=1) / b[picks].mean(axis=1), [2.5, 97.5])
    return f"{a.mean() / b.mean():.1f} ({low:.1f} to {high:.1f})"


def share(values: Values, seed: int) -> str:
    mean, low, high = bootstrap(values, seed)
    return f"{mean:.2f} ({low:.2f} to {high:.2f})"


def effect(values: Values) -> float:
    deviation = values.std(ddof=1)
    return float(values.mean() / deviation) if deviation else 0.0


def own_changes(results: dict[str, Any], n: int) -> dict[tuple[str, int, float], Values]:
    """(method, k, scale) -> changes of the answer [fact, (logit, log-probability, rank)]; NaN
    where it was not measured."""
    changes: dict[tuple[str, int, float], Values] = {}
    for index in range(n):
        for job in (results[stage].get(str(index)) for stage in ("own", "on")):
            for (method, k, scale, _), (answer,), _ in job["rows"] if job else ():
                key = (method, int(k), float(scale))
                change = changes.setdefault(key, np.full((n, 3), np.nan))
                change[index] = np.array(answer) - np.array(job["plain"][0][0])
    return changes


def collateral(results: dict[str, Any], n: int) -> dict[tuple[str, str], Values]:
    """(method, kind) -> mean drop of other facts' log-probability [fact]; NaN where none.

    With `kind` and " kept": the share of those facts whose answer is still first.
    """
    drops: dict[tuple[str, str, int], list[float]] = defaultdict(list)
    for job in results["other"].values():
        plain = job["plain"][0][0]
        for (method, index, kind), (answer,), _ in job["rows"]:
            drops[method, kind, index].append(plain[LOG_PROB] - answer[LOG_PROB])
            drops[method, f"{kind} kept", index].append(float(answer[RANK] == 1))
    means: dict[tuple[str, str], Values] = {}
    for (method, kind, index), values in drops.items():
        means.setdefault((method, kind), np.full(n, np.nan))[index] = np.mean(values)
    return means


def text_damage(results: dict[str, Any], n: int) -> dict[str, Values]:
    """Method -> rise of the negative log-likelihood of a paragraph [fact]."""
    rises: dict[str, Values] = {}
    for job in results["text"].values():
        for (method, index), loss in job["rows"]:
            rises.setdefault(method, np.full(n, np.nan))[index] = loss - job["plain"]
    return rises


def print_facts(facts: list[Fact], known: dict[str, Any]) -> None:
    right = Counter(fact["relation"] for fact in known["facts"])
    used = Counter(fact.relation for fact in facts)
    asked = known["asked"]
    rows = [(r, str(asked[r]), str(right[r]), str(used[r])) for r in asked]
    rows.append(("all", str(sum(asked.values())), str(sum(right.values())), str(len(facts))))
    table("Facts", ("relation", "asked", "right", "used"), rows)


def measured_scales(changes: dict[tuple[str, int, float], Values]) -> list[float]:
    """Scales at which every method was measured."""
    every = {scale for _, _, scale in changes}
    sizes = {k for _, k, _ in changes}
    return sorted(s for s in every if all((m, k, s) in changes for m in METHODS for k in sizes))


def print_own(changes: dict[tuple[str, int, float], Values], seed: int) -> None:
    sizes = sorted({k for _, k, _ in changes})
    head = ("method", *(f"k = {k}" for k in sizes))

    def values(method: str, k: int, scale: float, column: int) -> Values:
        change = changes[method, k, scale][:, column]
        return change[~np.isnan(change)]

    for scale in measured_scales(changes):
        n = len(values(METHODS[0], sizes[0], scale, RANK))
        for column, name in ((LOG_PROB, "log-probability"), (LOGIT, "logit")):
            rows = [
                (m, *(interval(values(m, k, scale, column), seed, "+") for k in sizes))
                for m in METHODS
            ]
            table(f"Scale {scale:g}: change of the answer's {name} (n = {n})", head, rows)
        rows = [
            (m, *(share((values(m, k, scale, RANK) > 0).astype(float), seed) for k in sizes))
            for m in METHODS
        ]
        table(f"Scale {scale:g}: share of facts whose answer is no longer first", head, rows)
        rows = [
            (m, *(f"{np.median(values(m, k, scale, RANK)) + 1:.0f}" for k in sizes))
            for m in METHODS
        ]
        table(f"Scale {scale:g}: median rank of the answer", head, rows)


def paired(a: Values, b: Values, relations: list[str], seed: int) -> str:
    """Mean of a - b with its interval, the interval over relations, and d."""
    kept = ~np.isnan(a - b)
    difference = (a - b)[kept]
    low, high = clustered(difference, [r for r, k in zip(relations, kept, strict=True) if k], seed)
    mean = interval(difference, seed, "+")
    return f"{mean}; relations {low:+.2f} to {high:+.2f}; d {effect(difference):+.2f}"


def print_paired(
    changes: dict[tuple[str, int, float], Values], relations: list[str], seed: int
) -> None:
    sizes = sorted({k for _, k, _ in changes})
    for scale in measured_scales(changes):
        sign, name = (-1.0, "drop") if scale < 1 else (1.0, "rise")
        for reference in REFERENCES:
            rows = []
            for control in CONTROLS:
                cells = []
                for k in sizes:
                    a, b = (sign * changes[m, k, scale][:, LOG_PROB] for m in (reference, control))
                    cells.append(paired(a, b, relations, seed))
                rows.append((control, *cells))
            table(
                f"Scale {scale:g}: {name} of the log-probability, {reference} minus each control",
                ("control", *(f"k = {k}" for k in sizes)),
                rows,
            )


def print_damage(
    changes: dict[tuple[str, int, float], Values],
    others: dict[tuple[str, str], Values],
    text: dict[str, Values],
    relations: list[str],
    seed: int,
) -> None:
    """Own drop beside the damage elsewhere, and what is left of it."""
    selectivity: dict[str, dict[str, Values]] = defaultdict(dict)
    rows = []
    for method in METHODS:
        drop = -changes[method, MANY, 0.0][:, LOG_PROB]
        same, other = (others[method, kind] for kind in ("same relation", "other relation"))
        selectivity["same relation"][method] = drop - same
        selectivity["other relation"][method] = drop - other
        damages = [drop, same, other]
        if text:
            selectivity["text"][method] = drop - text[method]
            damages.append(text[method])
        rows.append((method, *(interval(v[~np.isnan(v)], seed, "+") for v in damages)))
    head = ("method", "own fact", "same relation", "other relations", "text, nats per token")
    table(f"k = {MANY}, scale 0: drop of the log-probability", head[: len(rows[0])], rows)
    rows = [
        (m, *(interval(v[m][~np.isnan(v[m])], seed, "+") for v in selectivity.values()))
        for m in METHODS
    ]
    names = [f"own less {kind}" for kind in selectivity]
    kinds = [kind for kind in selectivity if kind != "text"]
    ratios = []
    for method in METHODS:
        lost = (changes[method, MANY, 0.0][:, RANK] > 0).astype(float)
        drop = -changes[method, MANY, 0.0][:, LOG_PROB]
        cells = [ratio(drop, others[method, kind], seed) for kind in kinds]
        clean = [lost * others[method, f"{kind} kept"] for kind in kinds]
        ratios.append((method, *cells, *(share(v[~np.isnan(v)], seed) for v in clean)))
    head = [f"own drop / {kind}" for kind in kinds]
    head += [f"own answer lost, {kind} kept" for kind in kinds]
    table("Ratios, and how often only the fact itself is lost", ("method", *head), ratios)
    table("Selectivity: own drop less the damage", ("method", *names), rows)
    for reference in REFERENCES:
        rows = []
        for control in CONTROLS:
            cells = [
                paired(values[reference], values[control], relations, seed)
                for values in selectivity.values()
            ]
            rows.append((control, *cells))
        table(f"Selectivity: {reference} minus each control", ("control", *names), rows)


def print_reading(results: dict[str, Any], n: int, seed: int) -> None:
    """Do the chosen neurons write the answer?"""
    by_fact = [results["reading"][str(i)]["methods"] for i in range(n)]
    rows = []
    for method in METHODS:
        hits = np.array(
            [picks[method]["hits"] for picks in by_fact], dtype=float
        )  # fact, neuron, kind
        rows.append(
            (
                method,
                share(hits[:, :, 0].mean(axis=1), seed),
                share(hits[:, :, 0].max(axis=1), seed),
                share(hits[:, :, 1].max(axis=1), seed),
                share(hits[:, :, 2].mean(axis=1), seed),
                f"{np.mean([picks[method]['layer'] for picks in by_fact]):.1f}",
                f"{np.mean([picks[method]['overlap'] for picks in by_fact]):.2f}",
            )
        )
    head = (
        "method", "answer in a neuron's top 10", "in one of the five's top 10", "top 50",
        "another answer of the relation in its top 10", "mean layer", "of AttnLRP's 20",
    )  # fmt: skip
    table("What the five first neurons write", head, rows)


def print_sharing(chosen: list[dict[str, Any]]) -> None:
    """Are the neurons a fact's own, or everybody's?"""
    rows = []
    for method in METHODS:
        used = Counter(neuron for picks in chosen for neuron in picks[method][:MANY])
        common = ", ".join(f"L{a}/{b} in {count}" for (a, b), count in used.most_common(3))
        rows.append((method, str(len(used)), common))
    title = f"The {MANY} neurons of all {len(chosen)} facts"
    table(title, ("method", "different ones", "commonest, and in how many facts"), rows)


def print_amplify(results: dict[str, Any], seed: int) -> None:
    """Concept A's neurons in prompts of B."""
    names = {"A": 0, "B": 1}
    changes: dict[tuple[str, int, str], dict[str, list[float]]] = {}
    kinds, jobs = [], [k for k in range(len(results["pairs"])) if str(k) in results["amplify"]]
    for job in jobs:
        result = results["amplify"][str(job)]
        kinds.append(results["pairs"][job][2])
        for (method, k, mode), answer, _ in result["rows"]:
            change = changes.setdefault((method, k, mode), defaultdict(list))
            for name, place in names.items():
                change[name].append(answer[place][LOG_PROB] - result["plain"][0][place][LOG_PROB])
                change[f"{name} first"].append(float(answer[place][RANK] == 1))
    array = {key: {f: np.array(v) for f, v in change.items()} for key, change in changes.items()}
    for kind in dict.fromkeys(kinds):
        kept = np.array([k == kind for k in kinds])
        rows = []
        for (method, k, mode), change in sorted(array.items(), key=lambda e: (e[0][2], e[0][1])):
            placebo = array[RANDOM, k, mode]
            rows.append(
                (
                    mode, str(k), method, interval(change["A"][kept], seed, "+"),
                    interval(change["B"][kept], seed, "+"), share(change["A first"][kept], seed),
                    share(change["B first"][kept], seed),
                    interval((change["A"] - placebo["A"])[kept], seed, "+"),
                    f"{effect((change['A'] - placebo['A'])[kept]):+.2f}",
                )
            )  # fmt: skip
        table(
            f"Amplified in prompts of another answer ({kind}, {kept.sum()} pairs)",
            ("mode", "k", "method", "change of A's log-probability", "of B's", "A is first",
             "B is first", "A: less the placebo", "d"),
            rows,
        )  # fmt: skip


def print_examples(facts: list[Fact], results: dict[str, Any], changes: Any) -> None:
    """The first facts of the (random) order, one a relation."""
    seen: set[str] = set()
    rows = []
    for index, fact in enumerate(facts):
        if fact.relation in seen or len(seen) == EXAMPLES:
            continue
        seen.add(fact.relation)
        for method in ("AttnLRP", "AttnLRP, contrast"):
            writes = results["reading"][str(index)]["methods"][method]["writes"][:3]
            neurons = results["chosen"][index][method][:3]
            read = "; ".join(
                f"L{layer}/{neuron} {' '.join(repr(t) for t in tokens)}"
                for (layer, neuron), tokens in zip(neurons, writes, strict=True)
            )
            cells = [f"{changes[method, k, 0.0][index, LOG_PROB]:+.1f}" for k in (1, 5, 20)]
            rows.append((fact.prompt, fact.answer, method, read.replace("|", "\\|"), *cells))
    head = ("prompt", "answer", "method", "neurons and what they write", "k = 1", "5", "20")
    table("Ten prompts", head, rows)


def print_all(facts: list[Fact], results: dict[str, Any], seed: int) -> None:
    """Every table."""
    n = len(facts)
    relations = [fact.relation for fact in facts]
    print(f"n = {n} facts; 95% bootstrap intervals, {RESAMPLES} resamples, seed {seed}")
    changes = own_changes(results, n)
    print_facts(facts, results["known"])
    print_own(changes, seed)
    print_paired(changes, relations, seed)
    print_damage(changes, collateral(results, n), text_damage(results, n), relations, seed)
    print_reading(results, n, seed)
    print_sharing(results["chosen"])
    print_amplify(results, seed)
    print_examples(facts, results, changes)
