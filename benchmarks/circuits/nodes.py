"""Do estimates of node effects agree with exact patching, and do they find circuits?

    python -m benchmarks.circuits.nodes correlate  # exact patching: resumable, an hour
    python -m benchmarks.circuits.nodes table      # what it found; --first 1: from layer 1
    python -m benchmarks.circuits.nodes circuit    # circuits of 5%: ten minutes
    python -m benchmarks.circuits.nodes found      # what they keep
    python -m benchmarks.circuits.nodes cost       # of scoring all heads and neurons

Pairs whose clean prompt is answered right and whose corrupted one is answered the other way, on
SmolLM2: indirect object and subject-verb agreement, denoising. Residual stream, attention and MLP
outputs are nodes of one layer and one position; heads and neurons are patched at all positions. The
neurons are a sample: the 50 largest by each estimate, and 100 at random.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file, save_file

import lenslrp
from benchmarks import RESULTS
from lenslrp.analysis.circuits.curves import faithfulness_curve
from lenslrp.analysis.circuits.measured_pairs import batch_of, metric_values
from lenslrp.analysis.circuits.nodes import Node, place_components
from lenslrp.analysis.circuits.pairs import TEMPLATES, Pairs, template_pairs
from lenslrp.analysis.circuits.pruning import (
    completeness,
    minimality,
    prune,
    verify,
)
from lenslrp.analysis.circuits.scores import NodeScores, score_nodes
from lenslrp.analysis.common.statistics import RESAMPLES, bootstrap, spearman
from lenslrp.files import whole
from lenslrp.hooks.structure import layer_of

KEPT = RESULTS / "circuits"
N, CHUNK, SEED = 60, 12, 0
LAYERS = 30  # of SmolLM2-135M
BY_POSITION = ("residual", "attention", "mlp")
WHOLE = ("heads", "neurons")
ESTIMATES: Mapping[str, dict[str, Any]] = {
    "RelP": {"method": "relevance"},
    "AttnLRP": {"method": "relevance", "composite": lenslrp.AttnLRP()},
    "CP-LRP": {"method": "relevance", "composite": lenslrp.CPLRP()},
    "GIM": {"method": "relevance", "composite": lenslrp.GIM()},
    "gradient": {"method": "attribution"},
    "integrated": {"method": "integrated", "steps": 5},
    "gradient, midpoint": {"method": "integrated", "steps": 1},
    "RelP, midpoint": {"method": "integrated", "steps": 1, "composite": lenslrp.RelP()},
}
FIND, HELD, SHARE, SEEDS = 40, 50, 0.05, 5
CIRCUITS = ("RelP, midpoint", "RelP", "gradient", "integrated")
"""What circuits are found by; the first is compared with the others."""
CURVES = ("RelP, midpoint", "RelP, midpoint, by size", "gradient")
Interval = tuple[float, float, float]
PAPER = {"residual": (0.968, 0.753), "attention": (0.962, 0.979), "mlp": (0.992, 0.195)}
"""RelP and attribution patching on GPT-2 small, indirect object (2508.21258)."""


def answered(model: Any, pairs: Pairs) -> Pairs:
    """The pairs whose two prompts are both answered as they should be."""
    return pairs[pairs.correct(model, both=True)]


def _parts(pairs: Pairs) -> list[Pairs]:
    return [pairs[i : i + CHUNK] for i in range(0, len(pairs), CHUNK)]


def drawn(model: Any, task: str, n: int = N, seed: int = SEED) -> Pairs:
    """``n`` answered pairs, the shorter ones first, so that a chunk has little padding."""
    pairs = answered(model, template_pairs(model, task, 2 * n, seed=seed))[:n]
    order = pairs.mask.sum(dim=1).argsort(stable=True)
    print(f"{task}: {len(pairs)} of {2 * n} pairs drawn are answered right", flush=True)
    return pairs[order]


def sampled(estimates: Mapping[str, NodeScores], seed: int) -> list[Node]:
    """The largest neurons by each estimate, over the chunk, and as many at random again."""
    nodes: set[Node] = set()
    for scores in estimates.values():
        top = scores.top(50, component="neurons")
        nodes |= {Node(h, u) for h, u in zip(top["hook"], top["unit"], strict=True)}
    every = [
        (hook, unit)
        for hook, name in scores.components.items()
        if name == "neurons"
        for unit in range(scores.values[hook].shape[1])
    ]
    return sorted(nodes | {Node(*place) for place in random.Random(seed).sample(every, 100)})


def correlate(model: Any, task: str, n: int, every: int) -> None:
    """Scores of every chunk of pairs in a file of its own; what a file lacks is added to it."""
    for index, part in enumerate(_parts(drawn(model, task)[:n])):
        path = KEPT / f"{task}-{index}.safetensors"
        stored = load_file(path) if path.exists() else {}
        before = len(stored)
        for names, by_position in ((BY_POSITION, True), (WHOLE, False)):
            options: dict[str, Any] = {"components": names, "by_position": by_position}
            added = {
                name: score_nodes(model, part, **method_options, **options)
                for name, method_options in ESTIMATES.items()
                if f"{name}/{names[0]}" not in stored
            }
            if f"exact/{names[0]}" not in stored:
                only = nodes(model, names, part, by_position, every)
                only += [] if by_position else sampled(added, index)
                added["exact"] = score_nodes(model, part, method="exact", **options, only=only)
                stored["gap"] = (added["exact"].clean - added["exact"].corrupt).contiguous()
            for name, scores in added.items():
                for component in names:
                    stored[f"{name}/{component}"] = scores.of(component).contiguous()
            print(task, index, names, "added:", ", ".join(added), flush=True)
        if len(stored) > before:
            path.parent.mkdir(parents=True, exist_ok=True)
            with whole(path) as temporary:
                save_file(stored, temporary)


def nodes(
    model: Any, names: Sequence[str], pairs: Pairs, by_position: bool, every: int
) -> list[Node]:
    """All nodes but neurons, of every so many layers."""
    places = range(pairs.mask.shape[1]) if by_position else (None,)
    return [
        Node(hook, unit, place)
        for hook, name in place_components(model, names).items()
        if name != "neurons" and (layer_of(hook) or 0) % every == 0
        for unit in range(model.cfg.n_heads if name == "heads" else 1)
        for place in places
    ]


def pearson(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.corrcoef(a, b)[0, 1])


def table(first: int) -> None:
    """Mean over pairs of the correlation over nodes, with bootstrap intervals over pairs.

    Args:
        first: the lowest layer whose nodes count.
    """
    measures: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
        "Pearson": pearson,
        "Spearman": spearman,
    }
    for task in TEMPLATES:
        files = [load_file(path) for path in sorted(KEPT.glob(f"{task}-*.safetensors"))]
        if not files:
            continue
        rows = []
        for component in (*BY_POSITION, *WHOLE):
            for name in ESTIMATES:
                values: dict[str, list[float]] = {measure: [] for measure in measures}
                for chunk in files:
                    if f"{name}/{component}" not in chunk:
                        continue
                    exact, estimate = (
                        chunk[f"{of}/{component}"].double().unflatten(1, (LAYERS, -1))[:, first:]
                        .flatten(1).numpy()
                        for of in ("exact", name)
                    )  # fmt: skip
                    for a, b in zip(estimate, exact, strict=True):
                        scored = ~np.isnan(b)
                        for measure, of in measures.items():
                            values[measure].append(of(a[scored], b[scored]))
                if not values["Pearson"]:
                    continue
                row: dict[str, Any] = {"component": component, "method": name}
                for measure, each in values.items():
                    mean, low, high = bootstrap(np.array(each), SEED)
                    row[measure] = f"{mean:.3f} ({low:.3f} to {high:.3f})"
                row["n"] = len(each)
                paper = {"RelP": 0, "gradient": 1}.get(name)
                known = component in PAPER and paper is not None and task == "indirect_object"
                row["paper, GPT-2"] = PAPER[component][paper] if known else ""
                rows.append(row)
        print(f"\n{task}")
        print(pd.DataFrame(rows).to_string(index=False))
        layers = [f["exact/mlp"].nan_to_num().abs().unflatten(1, (LAYERS, -1)) for f in files]
        ratios = torch.cat([x[:, 0].amax(1) / x[:, 1:].amax((1, 2)) for x in layers])
        low, middle, high = np.percentile(ratios.numpy(), [25, 50, 75])
        told = f"{middle:.1f} ({low:.1f} to {high:.1f})"
        above = f"above 1 in {int((ratios > 1).sum())} of {len(ratios)} pairs"
        print(f"largest effect of an MLP, layer 0 over all others: {told}, {above}")


def circuit(model: Any, task: str) -> None:
    """Found on some pairs, reported on others: each method's best 5% of heads and of neurons."""
    pairs = answered(model, template_pairs(model, task, 140, seed=1))
    find, held = pairs[:FIND], pairs[FIND : FIND + HELD]
    print(f"{task}: found on {len(find)} pairs, reported on {len(held)} others", flush=True)
    options: dict[str, Any] = {"chunk": 25}
    scores = {name: score_nodes(model, find, **ESTIMATES[name], **options) for name in CIRCUITS}
    first, *_ = scores.values()
    ranked = {name: (scored, {"by": "score"}) for name, scored in scores.items()}
    ranked[f"{CIRCUITS[0]}, by size"] = (first, {"by": "size"})
    ranked |= {f"random {seed}": (first, {"by": "random", "seed": seed}) for seed in range(SEEDS)}
    circuits = {name: prune(scored, SHARE, **how) for name, (scored, how) in ranked.items()}
    print("scored", flush=True)
    result: dict[str, Any] = {"sizes": circuits[CIRCUITS[0]].sizes(), "kept": {}, "curves": {}}
    for ablation in ("corrupt", "mean"):
        over = {"ablation": ablation, "reference": find if ablation == "mean" else None}
        verdict = verify(model, held, list(circuits.values()), **over, **options)
        whole_gap = (verdict.clean - verdict.floor).tolist()
        kept = [[(gaps - verdict.floor).tolist(), whole_gap] for gaps in verdict.gaps]
        result["kept"][ablation] = dict(zip(circuits, kept, strict=True))
        for name, parts in result["kept"][ablation].items():
            print(task, ablation, name, f"{_share(parts)[0]:.3f}", flush=True)
    best = circuits[CIRCUITS[0]]
    result["completeness"] = completeness(model, held, best, **options)
    result["minimality"] = minimality(model, held, best, **options).to_dict("list")
    for name in CURVES:
        scored, how = ranked[name]
        curve = faithfulness_curve(model, held, scored, **how, **options)
        summary = {"table": curve.table.to_dict("list"), "CPR": curve.cpr, "CMD": curve.cmd}
        result["curves"][name] = summary
        print(task, name, f"CPR {curve.cpr:.2f}, CMD {curve.cmd:.2f}", flush=True)
    RESULTS.mkdir(parents=True, exist_ok=True)
    with whole(RESULTS / f"circuit-{task}.json") as temporary:
        temporary.write_text(json.dumps(result))


def _share(parts: list[list[float]], less: list[list[float]] | None = None) -> Interval:
    """Kept over whole gap, means over pairs, with its bootstrap interval; or what that is more than
    ``less``'s, on the same pairs."""
    values = np.array([*parts, *(less or ())])  # [kept, whole, ...; pair]
    picks = np.random.default_rng(SEED).integers(0, values.shape[1], (RESAMPLES, values.shape[1]))
    of = np.concatenate([values.mean(axis=1)[:, None], values[:, picks].mean(axis=2)], axis=1)
    ratios = of[0] / of[1] - (of[2] / of[3] if less else 0)
    low, high = np.percentile(ratios[1:], [2.5, 97.5])
    return float(ratios[0]), float(low), float(high)


def print_circuits() -> None:
    """The circuits of ``circuit``: what they keep, and by how much the first is ahead."""
    for task in TEMPLATES:
        path = KEPT / f"circuit-{task}.json"
        if not path.exists():
            continue
        result = json.loads(path.read_text())
        kept = result["kept"]
        first = kept["corrupt"][CIRCUITS[0]]
        print(f"\n{task}: {result['sizes']}, {len(first[0])} held-out pairs")
        rows = []
        for name, values_of in kept["corrupt"].items():
            values = [_share(values_of), _share(kept["mean"][name]), _share(first, values_of)]
            texts = ["{:.2f} ({:.2f} to {:.2f})".format(*value) for value in values]
            rows.append([name, *texts])
        columns = ["nodes by", "corrupt", "mean", "first less this, corrupt"]
        print(pd.DataFrame(rows, columns=columns).to_string(index=False))
        for name, curve in result["curves"].items():
            print(f"\n{name}: CPR {curve['CPR']:.2f}, CMD {curve['CMD']:.2f}")
            print(pd.DataFrame(curve["table"]).round(3).to_string(index=False))
        print(f"\ncompleteness {result['completeness']:.2f}; what each head adds:")
        print(pd.DataFrame(result["minimality"]).round(3).to_string(index=False))


def cost(model: Any, rounds: int) -> None:
    """All heads and neurons scored, against two forward passes and one backward pass."""
    pairs = template_pairs(model, "indirect_object", 40, seed=1)
    length = int(pairs.mask.sum(dim=1).mode().values)
    part = pairs[pairs.mask.sum(dim=1) == length][:8]
    print(f"{len(part)} pairs of {length} tokens, median and quartiles of {rounds} rounds")
    timed: dict[str, Callable[[], Any]] = {
        "two forwards, one backward": lambda: plain(model, part),
        **{name: partial(score_nodes, model, part, **ESTIMATES[name])
           for name in ("RelP", "gradient", "RelP, midpoint")},
    }  # fmt: skip
    seconds: dict[str, list[float]] = {name: [] for name in timed}
    for round_ in range(-1, rounds):  # the first is not counted
        for name in random.Random(round_).sample(list(timed), len(timed)):
            start = time.process_time()
            timed[name]()
            if round_ >= 0:
                seconds[name].append(time.process_time() - start)
    base = np.array(seconds.pop("two forwards, one backward"))
    print(f"two forwards, one backward: {np.median(base):.2f} s of CPU time")
    for name, each in seconds.items():
        low, middle, high = np.percentile(np.array(each) / base, [25, 50, 75])
        print(f"{name}: {middle:.3f} ({low:.3f} to {high:.3f})")


def plain(model: Any, pairs: Pairs) -> torch.Tensor:
    """What any method needs: the other run, and the base run with gradients at its embeddings; no
    rules, nothing read, unembedded at the last token only."""
    kept: list[torch.Tensor] = []

    def leaf(_: Any, out: torch.Tensor) -> torch.Tensor:
        kept.append(out.detach().requires_grad_())
        return kept[-1]

    clean, corrupted = (batch_of(model, side, pairs) for side in (pairs.clean, pairs.corrupt))
    metric_values(model, clean, pairs)
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        gap = metric_values(model, corrupted, pairs, embed=leaf, gradients=True)
        (gradient,) = torch.autograd.grad(gap.sum(), kept)
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
    return gradient


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["correlate", "table", "circuit", "found", "cost"])
    parser.add_argument("--tasks", nargs="+", default=list(TEMPLATES), choices=list(TEMPLATES))
    parser.add_argument("--n", type=int, default=N, help="how many of the pairs drawn")
    parser.add_argument("--first", type=int, default=0, help="the lowest layer in the table")
    parser.add_argument("--every", type=int, default=1, help="patch every so many layers")
    parser.add_argument("--rounds", type=int, default=11)
    options = parser.parse_args()
    if options.what in ("table", "found"):
        table(options.first) if options.what == "table" else print_circuits()
        return
    torch.set_num_threads(1)
    model = lenslrp.load("smollm2-135m", dtype=torch.float32, device="cpu")
    if options.what == "cost":
        cost(model, options.rounds)
        return
    for task in options.tasks:
        if options.what == "correlate":
            correlate(model, task, options.n, options.every)
        else:
            circuit(model, task)


if __name__ == "__main__":
    main()
