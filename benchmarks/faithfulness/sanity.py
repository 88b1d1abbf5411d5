"""Six checks of AttnLRP beside its variants on SmolLM2: docs/reference/results/sanity.json.

    python -m benchmarks.faithfulness.sanity next_word naopc lowest sensitivity randomisation

`next_word` (the examples of `lenslrp evaluate next_word --seed 0`, 64 tokens, top logit):
the first token's share of all absolute relevance, for CP-LRP and AttnLRP (100 prompts); and the two
rules for the softmax that AttnLRP's paper rejects (`analysis/attribution/softmax_ablations.py`):
the sum of absolute relevance over the target's absolute value, and the area between the
perturbation curves (40).
`naopc`: agreement sentences of at most 8 tokens, where the bounds over all orders are exact.
`lowest`: indirect objects, which token has the lowest relevance (the first token left out).
`sensitivity`: the facts of `facts.json` after one irrelevant sentence and after another; counted
where the model's top token is the answer after both.
`randomisation`: rank correlation of relevance with the original, as blocks are shuffled: from the
last one down to a block, and that block alone. Attention rollout, which has no gradient and sees
nothing but patterns, is there as a control.

The model is in bfloat16 unless `--dtype float32` is given; each table says which it was.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch

import lenslrp
from benchmarks import DATA, ROOT
from benchmarks.faithfulness.examples import PARAGRAPHS, Numbers, examples, keep, relevance, spread
from benchmarks.knowledge.scores import FACTS
from lenslrp.analysis.evaluation.faithfulness import aopc, aopc_bounds, curves, normalised_aopc
from lenslrp.analysis.evaluation.features import Features, Masks, token_values, tokens_of
from lenslrp.analysis.evaluation.sanity import MODES, randomisation, sensitivity
from lenslrp.analysis.passes.prompts import ExplainedPrompt, Values, as_prompt

MODEL = "smollm2-135m"
METHODS = ("attnlrp", "cp_lrp", "gradient_x_input", "attention_rollout")
REJECTED = ("attnlrp_softmax_identity", "attnlrp_softmax_distributed")
ORDERED = ("attnlrp", "cp_lrp", "gradient_x_input", "random")
LAYERS = (29, 22, 15, 7, 0)
STEPS = 4
SHORT = 8
SENTENCES = (
    "It rained all day.",
    "My cat likes milk.",
    "The bus was late again.",
    "She closed the window.",
    "We had soup for lunch.",
    "He painted the fence green.",
)


def values_of(model: Any, prompts: list[ExplainedPrompt]) -> Numbers:
    """The target of each prompt, with nothing taken away."""
    nothing = [np.zeros((1, prompt.length), dtype=bool) for prompt in prompts]
    return np.concatenate([values.value for values in token_values(model, prompts, nothing)])


def leads(columns: dict[str, Numbers], seed: int, prefix: str = "") -> list[dict[str, Any]]:
    """A row a method: mean and interval, and its paired difference from AttnLRP."""
    rows = []
    for name, values in columns.items():
        row: dict[str, Any] = {"method": name, "n": len(values), **spread(values, seed, prefix)}
        if name != "attnlrp":
            row |= spread(
                values - columns["attnlrp"][: len(values)], seed, f"{prefix}less_attnlrp_"
            )
        rows.append(row)
    return rows


def next_word(model: Any, options: argparse.Namespace) -> None:
    """The first token's share, and what the rejected rules for the softmax do."""
    count, seed = max(1, round(0.4 * options.n)), options.seed
    drawn = examples("next_word", model, options.n, data=options.data / PARAGRAPHS, seed=seed)
    prompts = [example.prompt for example in drawn]
    few = prompts[:count]
    relevances = {name: relevance(name, model, prompts) for name in ("attnlrp", "cp_lrp")}
    shares = {
        name: np.array([abs(tokens[0]) / np.abs(tokens).sum() for tokens in rows])
        for name, rows in relevances.items()
    }
    command = f"sanity next_word --n {options.n}"
    about = {"model": MODEL, "tokens": prompts[0].length, "seed": seed, "dtype": options.dtype}
    keep(options.results, "first_token", leads(shares, seed), command, **about)
    relevances |= {name: relevance(name, model, few) for name in REJECTED}
    targets = np.abs(values_of(model, few))
    sums = {
        name: np.array([np.abs(tokens).sum() for tokens in rows[:count]]) / targets
        for name, rows in relevances.items()
    }
    rows = []
    for name, ratio in sums.items():
        low, median, high = np.percentile(ratio, [25, 50, 75]).tolist()
        rows.append(
            {"method": name, "n": count, "quartile_1": low, "median": median, "quartile_3": high}
        )
    keep(options.results, "softmax_magnitude", rows, command, **about)
    areas: dict[str, list[float]] = {name: [] for name in relevances}
    for i, prompt in enumerate(few):
        orders = {name: tokens[i] for name, tokens in relevances.items()}
        for name, curve in curves(tokens_of(model, prompt), orders, steps=STEPS).items():
            areas[name].append(curve.area)
    table = leads({name: np.array(values) for name, values in areas.items()}, seed)
    keep(options.results, "softmax_area", table, command, **about, baseline="zero", steps=STEPS)


def every_set(model: Any, prompts: list[ExplainedPrompt]) -> list[Features]:
    """The tokens of short prompts as features; all sets of all prompts are asked for at once."""
    sets = [np.array([*product((False, True), repeat=prompt.length)]) for prompt in prompts]
    return [
        Features(np.arange(len(masks[0])), partial(_known, masks, values))
        for masks, values in zip(sets, token_values(model, prompts, sets), strict=True)
    ]


def _known(sets: Masks, known: Values, masks: Masks) -> Values:
    """The values of the sets that are asked for: their places are their numbers in binary."""
    rows = masks @ (1 << np.arange(sets.shape[1])[::-1])
    return Values(known.value[rows], known.probability[rows])


def naopc(model: Any, options: argparse.Namespace) -> None:
    """The area over the MoRF curve, between the lowest and the highest of all orders."""
    count = max(1, round(0.4 * options.n))
    drawn = examples(
        "agreement", model, count, seed=options.seed, fits=lambda e: e.prompt.length <= SHORT
    )
    prompts = [example.prompt for example in drawn]
    relevances = {name: relevance(name, model, prompts, options.seed) for name in ORDERED}
    scores: dict[str, list[float]] = {name: [] for name in ORDERED}
    for i, features in enumerate(every_set(model, prompts)):
        bounds = aopc_bounds(features)
        for name, rows in relevances.items():
            scores[name].append(normalised_aopc(aopc(features, rows[i]), bounds))
    table = leads({name: np.array(values) for name, values in scores.items()}, options.seed)
    command = f"sanity naopc --n {options.n}"
    keep(options.results, "naopc", table, command, model=MODEL, task="agreement",
         tokens=f"at most {SHORT}", bounds="exact", baseline="zero", seed=options.seed,
         dtype=options.dtype)  # fmt: skip


def lowest(model: Any, options: argparse.Namespace) -> None:
    """Which token of an indirect-object sentence speaks against the answer most."""
    count = max(1, round(0.3 * options.n))
    drawn = examples("indirect_object", model, count, seed=options.seed)
    relevances = relevance("attnlrp", model, [example.prompt for example in drawn])
    places = {"first mention of the rival": 0, "second mention": 0, "another token": 0}
    for example, tokens in zip(drawn, relevances, strict=True):
        assert example.distractor is not None
        first, *later = np.flatnonzero(example.distractor).tolist()
        at = int(tokens[1:].argmin()) + 1
        kind = "first mention of the rival" if at == first else "second mention"
        places[kind if at in (first, *later) else "another token"] += 1
    rows = [{"lowest relevance": kind, "sentences": n} for kind, n in places.items()]
    keep(options.results, "lowest", rows, f"sanity lowest --n {options.n}", model=MODEL,
         method="attnlrp", n=count, seed=options.seed, dtype=options.dtype)  # fmt: skip


def known_facts(model: Any, count: int, seed: int) -> list[dict[str, ExplainedPrompt]]:
    """Pairs of texts that differ in an irrelevant sentence, with the answer on top after both."""
    relations = json.loads(FACTS.read_text(encoding="utf-8"))["relations"].values()
    facts = [
        (one["template"].format(subject), end) for one in relations for subject, end in one["facts"]
    ]
    pairs: list[dict[str, ExplainedPrompt]] = []
    for i in np.random.default_rng(seed).permutation(len(facts)).tolist():
        question, end = facts[i]
        both = [f"{SENTENCES[(i + k) % len(SENTENCES)]} {question}" for k in (0, 1)]
        answer = model.tokenizer.encode(f" {end}", add_special_tokens=False)
        prompts = {text: as_prompt(model, text) for text in both}
        if all([prompt.target.token] == answer for prompt in prompts.values()):
            pairs.append(prompts)
        if len(pairs) == count:
            break
    return pairs


def irrelevant(model: Any, options: argparse.Namespace) -> None:
    """What exchanging an irrelevant sentence does to the relevance of the rest."""
    pairs = known_facts(model, options.n, options.seed)
    texts = [text for pair in pairs for text in pair]
    prompts = [prompt for pair in pairs for prompt in pair.values()]
    values = values_of(model, prompts).tolist()
    ids = [prompt.tokens.tolist() for prompt in prompts]
    measures = ("spearman", "change", "inside")
    columns: dict[str, dict[str, Numbers]] = {measure: {} for measure in measures}
    for name in METHODS:
        results = zip(ids, relevance(name, model, prompts), values, strict=True)
        answers = dict(zip(texts, results, strict=True))
        judged = [sensitivity(answers.__getitem__, *pair) for pair in pairs]
        for measure in measures:
            columns[measure][name] = np.array([getattr(one, measure) for one in judged])
    moved = np.abs([one.target_change for one in judged])
    tables = [leads(columns[measure], options.seed, f"{measure}_") for measure in measures]
    table = [dict(a | b | c) for a, b, c in zip(*tables, strict=True)]
    command = f"sanity sensitivity --n {options.n}"
    keep(options.results, "sensitivity", table, command, model=MODEL,
         target_moved_by=round(float(moved.mean()), 3), seed=options.seed,
         dtype=options.dtype)  # fmt: skip


def randomised(model: Any, options: argparse.Namespace) -> None:
    """Rank correlation with the original relevance as blocks are shuffled."""
    count, seed = max(1, options.n // 5), options.seed
    drawn = examples("next_word", model, count, data=options.data / PARAGRAPHS, seed=seed,
                     length=32)  # fmt: skip
    prompts = [example.prompt for example in drawn]

    def now() -> dict[tuple[str, int], Numbers]:
        return {
            (name, i): tokens
            for name in METHODS
            for i, tokens in enumerate(relevance(name, model, prompts))
        }

    rows = []
    for mode in MODES:
        frame = randomisation(model, now, mode=mode, layers=LAYERS, seed=seed)
        frame["method"] = [name for name, _ in frame["name"]]
        for (method, layer), part in frame.groupby(["method", "layer"], sort=False):
            row = {"mode": mode, "method": method, "layer": int(layer), "n": len(part)}
            for measure in ("spearman", "spearman_abs"):
                row |= spread(part[measure].to_numpy(), seed, f"{measure}_")
            rows.append(row)
    keep(options.results, "randomisation", rows, f"sanity randomisation --n {options.n}",
         model=MODEL, tokens=32, blocks=len(model.blocks), seed=seed,
         dtype=options.dtype)  # fmt: skip


TABLES: dict[str, Callable[[Any, argparse.Namespace], None]] = {
    "next_word": next_word,
    "naopc": naopc,
    "lowest": lowest,
    "sensitivity": irrelevant,
    "randomisation": randomised,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("tables", nargs="+", choices=TABLES)
    parser.add_argument("--data", type=Path, default=DATA, help="the folder of the texts")
    parser.add_argument("--n", type=int, default=100, help="prompts (fewer where told)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default="bfloat16", help="the model's")
    parser.add_argument("--results", type=Path, default=ROOT / "docs/reference/results/sanity.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = lenslrp.load(MODEL, dtype=getattr(torch, options.dtype), device="cpu")
    for name in options.tables:
        TABLES[name](model, options)


if __name__ == "__main__":
    main()
