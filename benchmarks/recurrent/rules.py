"""Should a scan's operator be constant or get half? Small models, tasks with a known source.

    python -m benchmarks.recurrent.rules [--n 80] [--seeds 0 1 2]
    python -m benchmarks.recurrent.rules --look Mamba2               # maps of four prompts

A Mamba2, a gated delta net beside attention (Qwen3.5), an RG-LRU beside attention (RecurrentGemma)
and a transformer (Llama), three layers of width 64, are each trained from nothing on all tasks of
`tasks.py` at once, once a seed. Weights and results are kept in `benchmarks/results/recurrent/`,
and an interrupted run goes on where it was.

What is explained is the logit of the model's top token after the question. Of recall and copying
only right answers are explained, and a model counts as evidence on a task if at least 90% of its
answers are right. Measured for each method:

* hit: of the tokens before the question, the most relevant is the source of the answer;
* hit at the key: it is the key beside the source (recall);
* area between LeRF and MoRF of the tokens before the question, zero embeddings, eight steps.

Decided before measuring: "uniform" becomes the default of ``AttnLRP(recurrence=)`` if, over the
recurrent models and tasks that count, its paired lead over "constant" is above 0 (the whole 95%
interval over prompts) more often than below 0, in hits and in areas both. Otherwise "constant"
stays.

Of each recurrent layer's `hook_scan_map` under the constant rule, summed over heads: where the
largest entry of the question's row off the diagonal is. The best layer is chosen on one half of a
model's prompts and counted on the other, both ways.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

import lenslrp
from benchmarks import DATA
from benchmarks.faithfulness.examples import PARAGRAPHS, Numbers, batches, relevance
from benchmarks.recurrent import tables
from benchmarks.recurrent.models import FOLDER, MODELS, STEPS, answered, trained
from benchmarks.recurrent.tasks import (
    Sequence,
    Task,
    read_corpus,
    recall,
    shown,
    tasks,
    training,
)
from lenslrp.analysis.attribution.methods import METHODS, Method, as_method
from lenslrp.analysis.common.journal import Row, resumed
from lenslrp.analysis.evaluation.faithfulness import curves
from lenslrp.analysis.evaluation.features import tokens_of
from lenslrp.analysis.passes.prompts import ExplainedPrompt, as_prompt
from lenslrp.hooks import Composite
from lenslrp.targets import Logit

CONSTANT, UNIFORM = "AttnLRP, constant", "AttnLRP, uniform"
COMPARED: dict[str, Method] = {
    CONSTANT: as_method(Composite(CONSTANT, lenslrp.AttnLRP(recurrence="constant").rules)),
    UNIFORM: as_method(Composite(UNIFORM, lenslrp.AttnLRP(recurrence="uniform").rules)),
    "CP-LRP": METHODS["cp_lrp"],
    "Gradient x Input": METHODS["gradient_x_input"],
    "Integrated Gradients": METHODS["integrated_gradients"],
    "occlusion": METHODS["occlusion"],
    "random": METHODS["random"],
}
DRAWN, SOLVED, CURVE_STEPS = 400, 0.9, 8


def explained(
    model: Any, bridge: Any, task: Task, seed: int, n: int
) -> tuple[list[Sequence], list[ExplainedPrompt], float]:
    """``n`` sequences, their prompts, and the share of right answers among all that were drawn."""
    rng = np.random.default_rng([seed, 1])
    drawn = [task(rng) for _ in range(DRAWN)]
    top = answered(model, drawn)
    right = [s.tokens[s.end] == t for s, t in zip(drawn, top, strict=True)]
    kept = [i for i, s in enumerate(drawn) if right[i] or s.source is None][:n]
    prompts = [
        as_prompt(bridge, torch.tensor(drawn[i].tokens[: drawn[i].end]), Logit(top[i]))
        for i in kept
    ]
    return [drawn[i] for i in kept], prompts, float(np.mean(right))


def map_rows(bridge: Any, prompts: list[ExplainedPrompt]) -> dict[str, dict[int, Numbers]]:
    """Each recurrent layer's map: for each prompt, the row of the question [pos before it]."""
    found: dict[str, dict[int, Numbers]] = {}
    for batch, tokens, target in batches(prompts):
        _, R = lenslrp.run_with_relevance(
            bridge,
            tokens,
            target,
            lenslrp.AttnLRP(recurrence="constant"),
            lambda name: name.endswith("hook_scan_map"),
        )
        for name in R:
            rows = R[name][:, :, -1, :-1].sum(dim=1).double().numpy()
            found.setdefault(name, {}).update(zip(batch, rows, strict=True))
    return found


def measured(model: Any, bridge: Any, task: Task, seed: int, n: int) -> Row:
    """Everything about one model and one task: for each prompt, where relevance is largest."""
    sequences, prompts, accuracy = explained(model, bridge, task, seed, n)
    found = {name: relevance(way, bridge, prompts, seed) for name, way in COMPARED.items()}
    areas: dict[str, list[float]] = {name: [] for name in COMPARED}
    for i, (sequence, prompt) in enumerate(zip(sequences, prompts, strict=True)):
        features = tokens_of(bridge, prompt, keep=range(sequence.context, prompt.length))
        by_name = {name: features.of(rows[i]) for name, rows in found.items()}
        for name, curve in curves(features, by_name, steps=CURVE_STEPS).items():
            areas[name].append(curve.area)
    known = all(s.source is not None for s in sequences)
    return {
        "accuracy": accuracy,
        "end": [s.end for s in sequences],
        "source": [s.source for s in sequences],
        "key": [s.key for s in sequences],
        "area": areas,
        "first": {
            name: [int(row[: s.context].argmax()) for row, s in zip(rows, sequences, strict=True)]
            for name, rows in found.items()
        },
        "map": {
            name: [int(rows[i].argmax()) for i in range(len(prompts))]
            for name, rows in (map_rows(bridge, prompts) if known else {}).items()
        },
    }


def all_rows(
    known: dict[str, Task], easier: dict[str, Task], seeds: list[int], n: int
) -> list[Row]:
    """A row for each model, task and seed; from the file where they are done already."""
    settings = {"n": n, "steps": STEPS, "tasks": list(known), "methods": list(COMPARED)}
    with resumed(FOLDER / f"rules-{n}.jsonl", settings) as (done, append):
        found = {(row["model"], row["task"], row["seed"]): row for row in done}
        for seed in seeds:
            for name in MODELS:
                missing = [task for task in known if (name, task, seed) not in found]
                if not missing:
                    continue
                model = trained(name, seed, easier)
                bridge = lenslrp.load(model, device="cpu")
                for task in tqdm(missing, desc=f"{name} {seed}, measured"):
                    row = {"model": name, "task": task, "seed": seed}
                    row |= measured(model, bridge, known[task], seed, n)
                    append(row)
                    found[name, task, seed] = row
    return [found[name, task, seed] for name in MODELS for task in known for seed in seeds]


def report(rows: list[Row]) -> None:
    """Print all tables, and what was decided beforehand to count."""
    print(f"Right answers of each seed, of {DRAWN} (text: the next character)\n")
    lines = [
        [*group, ", ".join(f"{row['accuracy']:.2f}" for row in some)]
        for group, some in tables.by_model_and_task(rows).items()
    ]
    tables.print_table(["model", "task", "seeds"], lines)
    counted = tables.by_model_and_task(
        row for row in rows if row["task"] == "text" or row["accuracy"] >= SOLVED
    )
    tables.leads(counted, CONSTANT, UNIFORM)
    recurrent = {group: some for group, some in counted.items() if group[0] != "Llama"}
    pointing = [some for (_, task), some in recurrent.items() if task != "text"]
    for name, score, groups in (
        ("hits", tables.hits, pointing),
        ("areas", tables.areas, [*recurrent.values()]),
    ):
        above, below = tables.verdict(groups, score, CONSTANT, UNIFORM)
        print(f"{name}: uniform is better in {above} and worse in {below} of {len(groups)}")
    print("\nHits at the source")
    tables.methods(counted, list(COMPARED), tables.hits, "source")
    print("Hits at the key")
    tables.methods(counted, list(COMPARED), tables.hits, "key")
    print("Areas, logits")
    tables.methods(counted, list(COMPARED), tables.areas)
    print("Where the map is largest in the row of the question")
    tables.maps(counted)


def look(model: Any, n: int) -> None:
    """Print the row of the question of each layer's map, of some prompts of recall."""
    bridge = lenslrp.load(model, device="cpu")
    sequences, prompts, _ = explained(model, bridge, recall, 0, n)
    found = map_rows(bridge, prompts)
    for i, sequence in enumerate(sequences):
        print(f"source {sequence.source}, key {sequence.key}")
        rows = [[hook, *(f"{x:.2f}" for x in found[hook][i])] for hook in sorted(found)]
        tables.print_table(["map", *map(shown, sequence.tokens[: sequence.end - 1])], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, default=DATA / PARAGRAPHS, help="paragraphs of text")
    parser.add_argument("--n", type=int, default=80, help="prompts of each model, task and seed")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--look", choices=MODELS, help="print maps of a model of the first seed")
    options = parser.parse_args()
    torch.set_num_threads(1)
    texts: tuple[str | None, str | None] = None, None
    if options.data.exists():
        texts = read_corpus(options.data)
    else:
        print(f"Without the task text: {options.data} does not exist.\n")
    easier = training(texts[0])
    if options.look:
        look(trained(options.look, options.seeds[0], easier), 4)
    else:
        report(all_rows(tasks(texts[1]), easier, options.seeds, options.n))


if __name__ == "__main__":
    main()
