"""Does tracing hop by hop find the chain that an answer took through the model's own thought?

    python -m benchmarks.faithfulness.hops [--n 100] [--results FILE] [--flashtrace]

A prompt holds two chains, name to animal to city, after one that is worked out:

    Sara: fox
    Ben: goat
    goat: Madrid
    fox: London
    Sara:

SmolLM2-135M continues ` fox\\nfox: London`. An example counts as solved if the model's top token is
right for the animal and for the city (a rule made after two examples of an earlier form had been
looked at). Decided before the relevance of these examples was looked at:

- the answer is the city's token, the thought what was written before it;
- the chain's tokens in the prompt are the five words of the asked chain (name, animal; animal,
  city; the name in the question); its first link are name and animal in their line, and the name in
  the question; the other chain's four words are distractors;
- the measures are shares of positive relevance at the prompt's tokens: on the chain, on its first
  link, and of the chain in chain and distractors (chance: the share of the tokens).

The hops are at most three. `--flashtrace` adds the package of that name (0.1.1), where it is
installed: one hop and three, its answer span and reasoning span set to the answer and the thought.
Each example is appended to `--results` (a file that git ignores; FlashTrace's to one beside it)
when it is done, so an interrupted run goes on where it was. 95% bootstrap intervals over examples;
leads are paired.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformer_lens.model_bridge import TransformerBridge

import lenslrp
from benchmarks import RESULTS
from lenslrp.analysis import attribute, explain_hops
from lenslrp.analysis.common.journal import resumed
from lenslrp.analysis.common.statistics import RESAMPLES, interval
from lenslrp.analysis.evaluation.spans import overlap

NAMES = ("Lea", "Tom", "Anna", "Max", "Paul", "Sara", "Ben", "Eva", "Jack", "Emma")
ANIMALS = ("cat", "dog", "horse", "rabbit", "fox", "goat")
CITIES = ("Paris", "Rome", "London", "Berlin", "Madrid", "Vienna", "Tokyo", "Moscow")
HOPS = 3
BASE = "AttnLRP, one hop"


@dataclass(frozen=True)
class Chain:
    """One prompt, its continuation, and where the words are."""

    prompt: str
    thought: str  # with the space before it, up to the answer
    answer: str
    words: dict[str, list[tuple[int, int]]]  # part -> characters of the prompt


def table(rng: random.Random) -> tuple[str, list[tuple[str, str, str]]]:
    """Two chains in the lines of one text, links of names before links of animals."""
    chains = list(
        zip(rng.sample(NAMES, 2), rng.sample(ANIMALS, 2), rng.sample(CITIES, 2), strict=True)
    )
    owners = [f"{name}: {animal}\n" for name, animal, _ in chains]
    homes = [f"{animal}: {city}\n" for _, animal, city in chains]
    rng.shuffle(owners)
    rng.shuffle(homes)
    return "".join(owners + homes), chains


def example(number: int) -> Chain:
    """The prompt of a number: a chain worked out, then two of which one is asked for."""
    rng = random.Random(number)
    shown, [(name, animal, city), _] = table(rng)
    demonstration = f"{shown}{name}: {animal}\n{animal}: {city}\n\n"
    lines, chains = table(rng)
    (name, animal, city), other = chains
    prompt = f"{demonstration}{lines}{name}:"

    def words_of(line: tuple[str, str]) -> list[tuple[int, int]]:
        begin = prompt.index(f"{line[0]}: {line[1]}\n", len(demonstration))
        second = begin + len(line[0]) + 2
        return [(begin, begin + len(line[0])), (second, second + len(line[1]))]

    asks = (len(prompt) - len(name) - 1, len(prompt) - 1)
    first = [*words_of((name, animal)), asks]
    words = {
        "chain": [*first, *words_of((animal, city))],
        "first link": first,
        "distractors": [*words_of(other[:2]), *words_of(other[1:])],
    }
    return Chain(prompt, f" {animal}\n{animal}:", f" {city}", words)


def solved(model: TransformerBridge, first: int) -> Iterator[tuple[int, Chain]]:
    """Numbers from ``first`` of which the model gets both words of the chain right."""
    for number in itertools.count(first):
        chain = example(number)
        ids, start = (
            model.tokenizer(text)["input_ids"]
            for text in (chain.prompt + chain.thought + chain.answer, chain.prompt)
        )
        with torch.no_grad():
            best = model(torch.tensor([ids])).argmax(dim=-1)[0].tolist()
        if all(best[at - 1] == ids[at] for at in (len(start), len(ids) - 1)):
            yield number, chain


Relevances = dict[str, list[float]]


def explain(model: TransformerBridge, chain: Chain) -> Relevances:
    """Method -> relevance of the prompt's tokens, for the answer."""
    tokenizer = model.tokenizer
    prompt = tokenizer(chain.prompt)["input_ids"]
    thought, answer = (tokenizer(text)["input_ids"] for text in (chain.thought, chain.answer))
    whole, written = torch.tensor([prompt + thought]), thought + answer
    found: dict[str, Any] = {}
    for name, composite in (("AttnLRP", lenslrp.AttnLRP()), ("CP-LRP", lenslrp.CPLRP())):
        hops = explain_hops(
            model, prompt, (len(thought), len(written)), text=written, max_hops=HOPS, until=0.0,
            composite=composite,
        )  # fmt: skip
        by_hop = hops.relevance[:, : hops.start]
        found[f"{name}, one hop"] = by_hop[0]
        found[f"{name}, {HOPS} hops"] = by_hop.sum(dim=0)
        for later in range(1, len(by_hop)):
            found[f"{name}, hop {later + 1} alone"] = by_hop[later]
    for method in ("gradient_x_input", "attention_rollout"):
        found[method] = attribute(method, model, whole, answer[0]).tokens[0, : len(prompt)]
    return {name: [float(f"{v:.6g}") for v in values.tolist()] for name, values in found.items()}


def flashtrace(model: TransformerBridge) -> Callable[[Chain], Relevances]:
    """The package's own trace, on the checkpoint's own class with the bridge's weights."""
    from flashtrace import FlashTrace
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(model.original_model.config)
    config._attn_implementation = "eager"
    theirs = AutoModelForCausalLM.from_config(config).eval()
    state = {
        name.replace("._original_component", ""): value
        for name, value in model.original_model.state_dict().items()
    }
    theirs.load_state_dict({name: state[name] for name in theirs.state_dict()})
    tracer = FlashTrace(theirs, model.tokenizer)

    def run(chain: Chain) -> Relevances:
        thought = len(model.tokenizer(chain.thought)["input_ids"])
        found = {}
        for hops in (1, HOPS):
            trace = tracer.trace(
                prompt=chain.prompt, target=chain.thought + chain.answer, hops=hops,
                output_span=(thought, thought), reasoning_span=(0, thought - 1),
            )  # fmt: skip
            found[f"FlashTrace, {hops} hop{'s' * (hops > 1)}"] = list(map(float, trace.scores))
        return found

    return run


def shares(model: TransformerBridge, chain: Chain, relevance: Relevances) -> dict[str, Any]:
    """Method -> the three measures, of one example."""
    encoded = model.tokenizer(chain.prompt, return_offsets_mapping=True)
    parts = {k: overlap(encoded["offset_mapping"], spans) for k, spans in chain.words.items()}
    chance = {"chance": [1.0] * len(encoded["input_ids"])}
    return {
        name: measures(np.maximum(np.array(values), 0.0), parts)
        for name, values in {**relevance, **chance}.items()
    }


def measures(values: NDArray[Any], parts: dict[str, NDArray[Any]]) -> dict[str, float]:
    """Shares of positive relevance; of none at all, what chance has."""
    values = values if values.any() else np.ones_like(values)
    chain, others = values[parts["chain"]].sum(), values[parts["distractors"]].sum()
    return {
        "chain": chain / values.sum(),
        "first link": values[parts["first link"]].sum() / values.sum(),
        "chain against distractors": chain / (chain + others) if chain + others else 0.5,
    }


def main() -> None:
    """Find what is solved, explain it, print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--n", type=int, default=100, help="solved examples")
    parser.add_argument("--results", type=Path, default=RESULTS / "hops.jsonl")
    parser.add_argument("--flashtrace", action="store_true", help="also run that package")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = lenslrp.load("smollm2-135m", dtype=torch.float32, device="cpu")
    rows: dict[int, Relevances] = {}
    with resumed(options.results, {"hops": HOPS}) as (before, append):
        rows |= {row["number"]: row["relevance"] for row in before[: options.n]}
        first = max(rows, default=-1) + 1
        for number, chain in itertools.islice(solved(model, first), options.n - len(rows)):
            rows[number] = explain(model, chain)
            append({"number": number, "relevance": rows[number]})
            print(f"{len(rows)} of {options.n} (prompt {number})", flush=True)
    if options.flashtrace:
        other = options.results.with_suffix(".flashtrace.jsonl")
        with resumed(other, {"hops": HOPS}) as (before, append):
            done = {row["number"]: row["relevance"] for row in before}
            trace = flashtrace(model)
            for number in rows:
                if number not in done:
                    done[number] = trace(example(number))
                    append({"number": number, "relevance": done[number]})
        rows = {number: {**row, **done[number]} for number, row in rows.items()}
    judged = [shares(model, example(number), row) for number, row in rows.items()]
    print(
        f"{len(rows)} solved examples; shares of positive relevance at the prompt's tokens, 95% "
        f"bootstrap intervals, {RESAMPLES} resamples, seed {options.seed}\n"
    )
    names = list(judged[0]["chance"])
    print("| method | " + " | ".join(names) + " | lead over one hop (chain) |")
    print("|---" * (len(names) + 2) + "|")
    for method in judged[0]:
        columns = {n: np.array([item[method][n] for item in judged]) for n in names}
        cells = [interval(columns[n], options.seed) for n in names]
        lead = columns["chain"] - np.array([item[BASE]["chain"] for item in judged])
        cells.append("" if method == BASE else interval(lead, options.seed, "+"))
        print(f"| {method} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
