"""Are the neurons that relevance finds for a fact the ones that hold it? Switched off and on.

    python -m benchmarks.knowledge.neurons [--cache FOLDER] [--limit N]

The AttnLRP paper shows three neurons and two prompts. Here: hand-written prompts with one-word
answers (`facts.json`, written before any relevance was looked at), those that the model gets right;
for each the neurons that twelve methods choose (`scores.py`).

* `own`: the chosen 1, 5, 20, 50 neurons switched off (scaled by 0) at all positions of the fact's
  prompt: change of the answer's logit and log-probability, its rank. `on`: scaled by 2 and 5, for
  the first of the facts.
* `other`: 20 neurons of a fact scaled by 0 in prompts of other facts (of the same relation with
  another answer, and of other relations): the collateral damage.
* `text`: the same in the first tokens of a paragraph of encyclopaedic text: change of the negative
  log-likelihood.
* `amplify`: neurons chosen for one answer (A) amplified in a prompt with another answer (B), as in
  'Arctic' -> 'candy store': scaled by 5 at all positions, or set at the last position to 1
  and 3 times their activation at the end of A's prompts. The placebo has the same layers and, where
  neurons are set, exactly the same norm of what is written.

Results are appended to files in `--cache` as they are made; an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformer_lens.model_bridge import TransformerBridge

import lenslrp
from benchmarks import DATA, RESULTS
from benchmarks.knowledge import tables
from benchmarks.knowledge.edits import Row, answers, scaled, set_to, surprise
from benchmarks.knowledge.scores import (
    FACTS,
    METHODS,
    RANDOM,
    Fact,
    Neurons,
    choices,
    chosen_facts,
    known_facts,
    matched,
    read_prompts,
    read_scores,
    score_all,
    through_final_gain,
    top_neurons,
    write_norms,
)
from lenslrp.analysis.common.journal import resumed

TEXTS = DATA / "wikipedia_paragraphs.jsonl"
CACHE = RESULTS / "knowledge_neurons"
SIZES = (1, 5, 20, 50)
AMPLIFIED_BY = (2.0, 5.0)
AMPLIFIED_FACTS = 40  # the first so many
COLLATERAL = 20  # neurons
OTHERS = 1  # prompts of the same relation, and of others, per fact
PARAGRAPHS, LENGTH = 100, 24
AMPLIFIED = (
    "AttnLRP", "AttnLRP, last", "AttnLRP, contrast", "grad x act, contrast", "direct, contrast",
    "activation", "weights", RANDOM,
)  # fmt: skip
GUIDE = "AttnLRP, last"  # whose neurons the placebo's are matched to
SET_TO = (1, 3)  # times the activation at the end of concept A's prompts
PAIRS = 30  # within a relation, and across relations
AMPLIFY_SIZES = (1, 5, 20)
READ = 5  # neurons of a fact whose writing is read
STAGES = ("facts", "own", "other", "text", "reading", "amplify", "on")


class Stage:
    """What is measured already, by job; a job may be measured in several parts."""

    def __init__(self, done: list[dict[str, Any]], append: Callable[[dict[str, Any]], None]):
        self.jobs: dict[str, Any] = {}
        self._append = append
        for part in done:
            self._keep(part)

    def _keep(self, part: dict[str, Any]) -> None:
        job = self.jobs.setdefault(part["job"], part)
        if job is not part:
            job["rows"] += part["rows"]

    def add(self, name: str, part: dict[str, Any]) -> None:
        entry = {"job": name, **part}
        self._append(entry)
        self._keep(json.loads(json.dumps(entry)))

    def missing(self, name: str, rows: list[Row]) -> list[Row]:
        """Those of a job's rows that are not measured yet."""
        labels = {tuple(label) for label, *_ in self.jobs.get(name, {"rows": []})["rows"]}
        return [row for row in rows if row.label not in labels]


@dataclass(frozen=True)
class Experiment:
    """What every stage works on."""

    model: TransformerBridge
    facts: list[Fact]
    scores: Callable[[int], Any]  # of a fact, by name
    chosen: list[dict[str, Neurons]]  # of every fact, by method
    seed: int


def own_rows(
    index: int, chosen: dict[str, Neurons], scales: tuple[float, ...] = (0.0,)
) -> list[Row]:
    return [
        scaled((method, k, scale, index), neurons[:k], scale)
        for method, neurons in chosen.items()
        for k in SIZES
        for scale in scales
    ]


def other_facts(facts: list[Fact], index: int, seed: int) -> list[tuple[int, str]]:
    """Facts on which the damage of fact `index`'s neurons is measured, none with its answer."""
    rng = np.random.default_rng([seed, 1, index])
    fact = facts[index]
    free = [i for i, other in enumerate(facts) if other.answer_id != fact.answer_id]
    kinds = {
        "same relation": [i for i in free if facts[i].relation == fact.relation],
        "other relation": [i for i in free if facts[i].relation != fact.relation],
    }
    return [
        (int(i), kind)
        for kind, some in kinds.items()
        for i in rng.choice(some, size=min(OTHERS, len(some)), replace=False)
    ]


def amplify_pairs(facts: list[Fact], seed: int) -> list[tuple[list[int], int, str]]:
    """(facts of concept A, fact B, kind): A is an answer, its facts all those that have it."""
    rng = np.random.default_rng([seed, 2])
    pairs: dict[str, list[tuple[list[int], int, str]]] = {"same relation": [], "other relation": []}
    for _ in range(100 * PAIRS):
        a, b = (int(i) for i in rng.choice(len(facts), size=2, replace=False))
        kind = "same relation" if facts[a].relation == facts[b].relation else "other relation"
        alike = [
            i
            for i, fact in enumerate(facts)
            if (fact.relation, fact.answer_id) == (facts[a].relation, facts[a].answer_id)
        ]
        entry = (alike, b, kind)
        if facts[a].answer_id != facts[b].answer_id and entry not in pairs[kind]:
            pairs[kind].append(entry)
    # Taken in turn, so that an unfinished run has as many of either kind.
    both = zip(*(some[:PAIRS] for some in pairs.values()), strict=False)
    return [entry for two in both for entry in two]


def amplify_rows(scores: Any, of_a: list[int], b: int, norms: Tensor, seed: list[int]) -> list[Row]:
    """Every method's neurons of concept A, scaled and set in B's prompt; placebos alike."""
    rng = np.random.default_rng(seed)
    every = [scores(i) for i in of_a]
    mean = {name: np.mean([score[name] for score in every], axis=0) for name in every[0]}
    target = scores(b)["norm"]
    size = norms.numpy()
    rows = []
    for method in AMPLIFIED:
        neurons = top_neurons(mean[GUIDE if method == RANDOM else method], max(AMPLIFY_SIZES))
        values = [float(mean["last value"][place]) for place in neurons]
        scaling = neurons
        if method == RANDOM:
            scaling = matched(neurons, target, rng)
            strangers = matched(neurons, size, rng, pool=size.shape[1] // 2)
            pairs = zip(values, neurons, strangers, strict=True)
            values = [v * float(size[old] / size[new]) for v, old, new in pairs]
            neurons = strangers
        for k in AMPLIFY_SIZES:
            rows.append(scaled((method, k, "scale 5"), scaling[:k], 5.0))
            for factor in SET_TO:
                some = [factor * v for v in values[:k]]
                rows.append(set_to((method, k, f"set {factor}"), neurons[:k], some))
    return rows


def reading(
    model: TransformerBridge, fact: Fact, related: set[str], chosen: dict[str, Neurons], values: Any
) -> dict[str, Any]:
    """What each method's five first neurons write: their direction, with the sign of their
    activation at the last position, through final gain and unembedding.

    A neuron's hits: the answer among its first 10 tokens, its first 50, and another answer of the
    relation among its first 10; in any case and with or without a space.
    """
    W_U = through_final_gain(model, slice(None))
    methods: dict[str, Any] = {}
    answer = fact.answer.lower()
    for method, neurons in chosen.items():
        rows = [model.blocks[n].mlp.W_out.detach()[i] for n, i in neurons[:READ]]
        signs = torch.tensor([float(np.sign(values[place])) for place in neurons[:READ]])
        best = (torch.stack(rows) * signs[:, None] @ W_U.T).topk(50).indices.tolist()
        text = [[model.tokenizer.decode([token]) for token in row] for row in best]
        plain = [[token.strip().lower() for token in row] for row in text]
        methods[method] = {
            "hits": [
                [answer in row[:10], answer in row, bool(related.intersection(row[:10]))]
                for row in plain
            ],
            "writes": [row[:6] for row in text],
            "layer": float(np.mean([layer for layer, _ in neurons[:20]])),
            "overlap": len({*neurons[:20]} & {*chosen["AttnLRP"][:20]}) / 20,
        }
    return {"methods": methods}


def measure_own(e: Experiment, stage: Stage, count: int, scales: tuple[float, ...]) -> None:
    """The facts' own prompts."""
    for i, fact in enumerate(tqdm(e.facts[:count], desc=f"own, scale {scales}", unit="fact")):
        if rows := stage.missing(str(i), own_rows(i, e.chosen[i], scales)):
            stage.add(str(i), answers(e.model, fact.ids, [fact.answer_id], rows))


def measure_others(e: Experiment, stage: Stage) -> None:
    """Every prompt with the neurons of the facts whose damage is measured on it."""
    asked_of: dict[int, list[tuple[int, str]]] = defaultdict(list)
    for i in range(len(e.facts)):
        for j, kind in other_facts(e.facts, i, e.seed):
            asked_of[j].append((i, kind))
    for j, sources in tqdm(asked_of.items(), desc="other facts", unit="prompt"):
        rows = [
            scaled((method, i, kind), neurons[:COLLATERAL], 0.0)
            for i, kind in sources
            for method, neurons in e.chosen[i].items()
        ]
        if rows := stage.missing(str(j), rows):
            stage.add(str(j), answers(e.model, e.facts[j].ids, [e.facts[j].answer_id], rows))


def measure_texts(e: Experiment, stage: Stage, path: Path) -> None:
    """Paragraphs, each with the neurons of every hundredth fact."""
    lines = path.read_text(encoding="utf-8").splitlines()
    order = np.random.default_rng([e.seed, 4]).permutation(len(lines))
    encoded = (e.model.tokenizer.encode(json.loads(lines[n])["text"]) for n in order)
    long = [ids[:LENGTH] for ids in encoded if len(ids) >= LENGTH][:PARAGRAPHS]
    for p, ids in enumerate(tqdm(long, desc="paragraphs", unit="text")):
        rows = [
            scaled((method, i), neurons[:COLLATERAL], 0.0)
            for i in range(p, len(e.facts), len(long))
            for method, neurons in e.chosen[i].items()
        ]
        if rows := stage.missing(str(p), rows):
            stage.add(str(p), surprise(e.model, ids, rows))


def measure_reading(e: Experiment, stage: Stage) -> None:
    """What the chosen neurons write."""
    words: dict[str, set[str]] = defaultdict(set)
    for relation, _, answer in read_prompts(FACTS):
        words[relation].add(answer.lower())
    for i, fact in enumerate(tqdm(e.facts, desc="reading", unit="fact")):
        if str(i) not in stage.jobs:
            related = words[fact.relation] - {fact.answer.lower()}
            values = e.scores(i)["last value"]
            stage.add(str(i), reading(e.model, fact, related, e.chosen[i], values))


def measure_amplify(e: Experiment, stage: Stage) -> list[tuple[list[int], int, str]]:
    """One concept's neurons in another's prompts; the pairs."""
    norms = write_norms(e.model)
    pairs = amplify_pairs(e.facts, e.seed)
    for n, (of_a, b, _) in enumerate(tqdm(pairs, desc="amplify", unit="pair")):
        if str(n) not in stage.jobs:
            rows = amplify_rows(e.scores, of_a, b, norms, [e.seed, 3, n])
            wanted = [e.facts[of_a[0]].answer_id, e.facts[b].answer_id]
            stage.add(str(n), answers(e.model, e.facts[b].ids, wanted, rows))
    return pairs


def settings_of(options: argparse.Namespace) -> dict[str, Any]:
    """What results must have in common to be put together."""
    return {
        "model": options.model, "seed": options.seed, "methods": METHODS, "sizes": SIZES,
        "scales": AMPLIFIED_BY, "per relation": options.per_relation,
        "per answer": options.per_answer, "limit": options.limit, "pairs": PAIRS,
        "facts": hashlib.sha256(FACTS.read_bytes()).hexdigest(), "paragraph tokens": LENGTH,
        "amplified": AMPLIFIED, "set to": SET_TO,
    }  # fmt: skip


def run(options: argparse.Namespace) -> tuple[list[Fact], dict[str, Any]]:
    """All that is not measured yet; the facts used, and every stage's results."""
    cache: Path = options.cache
    with ExitStack() as files:
        stages = {
            name: Stage(
                *files.enter_context(resumed(cache / f"{name}.jsonl", settings_of(options)))
            )
            for name in STAGES
        }
        model = lenslrp.load(options.model, dtype=torch.float32, device="cpu")
        if "known" not in stages["facts"].jobs:
            right, asked = known_facts(model, FACTS)
            stages["facts"].add(
                "known", {"facts": [asdict(fact) for fact in right], "asked": asked}
            )
        known = stages["facts"].jobs["known"]
        right = [Fact(**{**entry, "ids": tuple(entry["ids"])}) for entry in known["facts"]]
        facts = chosen_facts(right, options.seed, options.per_relation, options.per_answer)
        facts = facts[: options.limit]
        score_all(model, facts, cache / "scores")

        def scores(index: int) -> Any:
            return read_scores(cache / "scores", index)

        seed = options.seed
        chosen = [choices(scores(i), max(SIZES), [seed, 0, i]) for i in range(len(facts))]
        e = Experiment(model, facts, scores, chosen, seed)
        measure_own(e, stages["own"], len(facts), (0.0,))
        measure_others(e, stages["other"])
        if options.texts.exists():
            measure_texts(e, stages["text"], options.texts)
        else:
            print(f"{options.texts} does not exist: perplexity is left out")
        measure_reading(e, stages["reading"])
        pairs = measure_amplify(e, stages["amplify"])
        measure_own(e, stages["on"], AMPLIFIED_FACTS, AMPLIFIED_BY)
    jobs = {name: stage.jobs for name, stage in stages.items()}
    return facts, {**jobs, "known": known, "chosen": chosen, "pairs": pairs}


def main() -> None:
    """Measure what is missing, and print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m", help="a gated or plain MLP, RMS norms")
    parser.add_argument("--cache", type=Path, default=CACHE, help="where results are kept")
    parser.add_argument("--texts", type=Path, default=TEXTS, help="jsonl with a text per line")
    parser.add_argument("--per-relation", type=int, default=7, help="facts used, at most")
    parser.add_argument("--per-answer", type=int, default=2, help="the same within a relation")
    parser.add_argument("--limit", type=int, help="only so many facts")
    parser.add_argument("--seed", type=int, default=0, help="of samples and bootstrap")
    options = parser.parse_args()
    start = time.perf_counter()
    facts, results = run(options)
    print(f"{options.model}, seed {options.seed}, {time.perf_counter() - start:.0f} s this time\n")
    tables.print_all(facts, results, options.seed)


if __name__ == "__main__":
    main()
