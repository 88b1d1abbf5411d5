"""CPR and CMD of selections of nodes at MIB's ten circuit sizes: scores, learned masks, chance.

    python -m benchmarks.circuits.mib run    # resumable, one row a selection
    python -m benchmarks.circuits.mib table  # what it found

All heads and MLP layers of SmolLM2-135M (300 nodes), pooled, as in MIB's node track (Mueller et al.
2025), with embeddings kept. Selections are made on one half of the pairs and reported on the other,
with nodes outside as in the corrupted run; intervals are bootstraps over the reported pairs.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import pandas as pd
import torch

import lenslrp
from benchmarks import RESULTS
from lenslrp.analysis.circuits.curves import SHARES, FaithfulnessCurve, faithfulness_curve
from lenslrp.analysis.circuits.ensembles import ensemble
from lenslrp.analysis.circuits.masks import learn_masks
from lenslrp.analysis.circuits.pairs import Pairs, template_pairs
from lenslrp.analysis.circuits.pruning import Verdict, between
from lenslrp.analysis.circuits.scores import NodeScores, score_nodes
from lenslrp.analysis.common.journal import resumed
from lenslrp.analysis.common.templates import FIRST_NAMES, INDIRECT_OBJECT

SEED, CHUNK, STEPS, RANDOM = 0, 8, 40, 2
SURNAMES = ("Smith", "Brown", "Clark", "Lewis", "Wilson", "Moore")
NODES = {"components": ("heads", "mlp"), "chunk": CHUNK}
SIZES = SHARES[1:]
SCORES: Mapping[str, dict[str, Any]] = {
    "RelP": {"method": "relevance"},
    "AttnLRP": {"method": "relevance", "composite": lenslrp.AttnLRP()},
    "RelP, midpoint": {"method": "integrated", "steps": 1, "composite": lenslrp.RelP()},
    "gradient": {"method": "attribution"},
    "integrated, 5 steps": {"method": "integrated", "steps": 5},
    "integrated, 10 steps": {"method": "integrated", "steps": 10},
    "integrated, 20 steps": {"method": "integrated", "steps": 20},
}
TOGETHER = ("RelP", "integrated, 5 steps")
"""What the ensemble is of."""
OBJECTIVES = {"cmd": "size", "cpr": "score"}
"""What masks are trained for -> how their initial scores rank."""
COMPARED = [
    (f"masks from RelP, {objective}", f"masks from gradient, {objective}")
    for objective in OBJECTIVES
]


def full_names(model: Any, n: int) -> Pairs:
    """The indirect object with first and last names, so that answers are two tokens.

    Everybody of a sentence has another surname; the corrupted run repeats the other name.
    """
    draw = random.Random(SEED)
    clean, corrupt, people = [], [], []
    for _ in range(n):
        first, last = draw.sample(FIRST_NAMES, 2), draw.sample(SURNAMES, 2)
        a, b = (f"{one} {other}" for one, other in zip(first, last, strict=True))
        answer, giver = draw.sample([a, b], 2)
        text = draw.choice(INDIRECT_OBJECT)
        clean.append(text.format(a=a, b=b, s=giver))
        corrupt.append(text.format(a=a, b=b, s=answer))
        people.append((f" {answer}", f" {giver}"))
    answers, rivals = zip(*people, strict=True)
    return Pairs.from_texts(model, clean, corrupt, answers, rivals, several_tokens=True)


TASKS: Mapping[str, tuple[Callable[[Any, int], Pairs], int]] = {
    "indirect_object": (
        lambda model, n: template_pairs(model, "indirect_object", n, seed=SEED),
        100,
    ),
    "agreement": (lambda model, n: template_pairs(model, "agreement", n, seed=SEED), 60),
    "full_names": (full_names, 60),
}
"""What draws the pairs, and how many are used: half to find, half to report."""


def run(model: Any, task: str, *, masks: bool) -> None:
    """Every selection of a task that the results lack, by scores or by learned masks."""
    draw, n = TASKS[task]
    drawn = draw(model, 2 * n)
    pairs = drawn[drawn.correct(model, both=True)][:n]
    find, held = pairs[::2], pairs[1::2]
    settings = {
        "task": task, "pairs": [len(find), len(held)], "seed": SEED, "steps": STEPS,
        "chunk": CHUNK,
    }  # fmt: skip
    scores: dict[str, NodeScores] = {}

    def scored(name: str) -> NodeScores:
        if name not in scores:
            scores[name] = score_nodes(model, find, **NODES, **SCORES[name])
        return scores[name]

    def learned(init: str | None, objective: str) -> NodeScores:
        start = {} if init is None else {"init": scored(init), "by": OBJECTIVES[objective]}
        return learn_masks(model, find, objective=objective, pooled=True, steps=STEPS, seed=SEED,
                           **{**NODES, **start})  # fmt: skip

    def together() -> NodeScores:
        return ensemble([scored(name) for name in TOGETHER])

    made_by = {name: partial(scored, name) for name in SCORES} | {" and ".join(TOGETHER): together}
    tried: dict[str, tuple[Callable[[], NodeScores], dict[str, Any]]] = {}
    if masks:
        for objective in OBJECTIVES:
            for init in ("RelP", "gradient", None):
                name = f"masks from {init or 'nothing'}, {objective}"
                tried[name] = partial(learned, init, objective), {}
    else:
        for name, make in made_by.items():
            tried |= {f"{name}, by {by}": (make, {"by": by}) for by in ("score", "size")}
        for seed in range(RANDOM):
            tried[f"random {seed}"] = made_by["RelP"], {"by": "random", "seed": seed}
    with resumed(RESULTS / f"mib-{task}.jsonl", settings) as (rows, append):
        done = {row["selection"] for row in rows}
        for name, (make, how) in tried.items():
            if name in done:
                continue
            made = make()
            curve = faithfulness_curve(
                model, held, made, shares=SIZES, pooled=True, chunk=CHUNK, **how
            )
            append({"selection": name, **_record(curve, made)})
            print(task, name, f"CPR {curve.cpr:.3f}, CMD {curve.cmd:.3f}", flush=True)


def _record(curve: FaithfulnessCurve, made: NodeScores) -> dict[str, Any]:
    verdict = {name: getattr(curve.verdict, name).tolist() for name in ("clean", "floor", "gaps")}
    n, passes = len(made.clean), made.passes
    found = {"found on": n, "passes": (passes.forward + passes.backward) / n}
    return {"table": curve.table.to_dict("list"), "verdict": verdict, **found}


def table() -> None:
    """Both areas of every selection, the cost of making it, and the curves."""
    for task in TASKS:
        path = RESULTS / f"mib-{task}.jsonl"
        if not path.exists():
            continue
        head, *rows = [json.loads(line) for line in path.read_text().splitlines()]
        print(f"\n{task}: {head}")
        curves = {row["selection"]: _curve(row) for row in rows}
        frame = pd.DataFrame(
            {
                measure.upper(): ["{:.3f} ({:.3f} to {:.3f})".format(*c.interval(measure))
                                  for c in curves.values()]
                for measure in ("cpr", "cmd")
            },
            index=list(curves),
        )  # fmt: skip
        frame["found on"] = [row["found on"] for row in rows]
        frame["passes of a pair"] = [round(row["passes"]) for row in rows]
        for index, share in enumerate(SIZES):
            frame[f"{share:.1%}"] = [f"{c.table['faithfulness'][index]:.2f}"
                                     for c in curves.values()]  # fmt: skip
        print(frame.to_string())
        for one, other in COMPARED:
            if {one, other} <= set(curves):
                for measure in ("cpr", "cmd"):
                    less = curves[one].resampled(measure) - curves[other].resampled(measure)
                    told = "{:+.3f} ({:+.3f} to {:+.3f})".format(*between(less))
                    print(f"{measure.upper()}, {one} less {other}: {told}")


def _curve(row: Mapping[str, Any]) -> FaithfulnessCurve:
    values = {name: torch.tensor(each) for name, each in row["verdict"].items()}
    verdict = Verdict(**values, correct=values["clean"] > 0)
    return FaithfulnessCurve(pd.DataFrame(row["table"]), verdict)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["run", "table"])
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    options = parser.parse_args()
    if options.what == "table":
        table()
        return
    torch.set_num_threads(1)
    model = lenslrp.load("smollm2-135m", dtype=torch.float32, device="cpu")
    for masks in (False, True):
        for task in options.tasks:
            run(model, task, masks=masks)


if __name__ == "__main__":
    main()
