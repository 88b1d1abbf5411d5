"""Is the key word among the most relevant tokens? 50 fixed prompts, four methods, intervals.

    python -m benchmarks.faithfulness.keywords [--model smollm2-135m] [--seed 0] [--per-prompt]

`keyword_prompts.json` holds the prompts, their key words and the protocol; it was written before
any relevance was looked at. For each prompt and method: relevance of every token for the logit of
the target, tokens ranked by signed relevance, and a hit at k if one of the k first overlaps a key
word (by characters). "Random" is no sample but the exact expectation of a random ranking.

Intervals are 95% percentile bootstrap intervals over prompts (10,000 resamples; the same resamples
for every method, so differences are paired). How robust one prompt is, is its margin: largest
relevance on a key word minus largest relevance elsewhere, divided by the largest absolute relevance
of the prompt; positive means a hit at 1.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from transformer_lens.model_bridge import TransformerBridge

import lenslrp
from benchmarks.faithfulness.examples import METHODS, RANDOM
from lenslrp.analysis.common.statistics import RESAMPLES, interval
from lenslrp.analysis.evaluation.spans import overlap, token_spans
from lenslrp.text.spelling import Spans

PROMPTS = Path(__file__).with_name("keyword_prompts.json")


@dataclass(frozen=True)
class Prompt:
    """One entry of the list. A hit is a token that overlaps one of `keywords`."""

    kind: str
    prompt: str
    target: str
    keywords: tuple[str, ...]

    def keyword_spans(self) -> Spans:
        """Where key words stand, in characters, as whole words; ValueError if one is absent."""
        spans: Spans = []
        for word in self.keywords:
            found = [m.span() for m in re.finditer(rf"\b{re.escape(word)}\b", self.prompt)]
            if not found:
                raise ValueError(f"key word {word!r} does not occur in {self.prompt!r}")
            spans += found
        return spans


@dataclass(frozen=True)
class Outcome:
    """What one method did on one prompt. Hits are 0 or 1 (for random: probabilities)."""

    top1: float
    top3: float
    first_token: float
    last_token: float
    first_share: float
    margin: float
    best: str


def read_prompts(path: Path = PROMPTS) -> list[Prompt]:
    """The fixed list."""
    entries = json.loads(path.read_text(encoding="utf-8"))["prompts"]
    return [Prompt(e["kind"], e["prompt"], e["target"], tuple(e["keywords"])) for e in entries]


def judge(relevance: NDArray[np.float64], key: NDArray[np.bool_], words: list[str]) -> Outcome:
    """The outcome of one relevance vector [pos] (in logits) given the key tokens [pos]."""
    order = np.argsort(-relevance, kind="stable")
    margin = (relevance[key].max() - relevance[~key].max()) / np.abs(relevance).max()
    return Outcome(
        top1=float(key[order[0]]),
        top3=float(key[order[:3]].any()),
        first_token=float(order[0] == 0),
        last_token=float(order[0] == len(relevance) - 1),
        first_share=float(np.abs(relevance[0]) / np.abs(relevance).sum()),
        margin=float(margin),
        best=words[order[0]],
    )


def judge_random(key: NDArray[np.bool_]) -> Outcome:
    """The expectation of `judge` when all orders of the tokens are equally likely."""
    count, hits = len(key), int(key.sum())
    miss = math.comb(count - hits, 3) / math.comb(count, 3)
    return Outcome(hits / count, 1 - miss, 1 / count, 1 / count, 1 / count, math.nan, "")


def outcomes_of(model: TransformerBridge, prompts: Iterable[Prompt]) -> dict[str, list[Outcome]]:
    """Outcomes per method, in the order of the prompts. One forward and backward pass each."""
    outcomes: dict[str, list[Outcome]] = {name: [] for name in (*METHODS, RANDOM)}
    for prompt in prompts:
        for name, composite in METHODS.items():
            _, relevance = lenslrp.run_with_relevance(
                model,
                prompt.prompt,
                target=prompt.target,
                composite=composite(),
                names_filter=[],
            )
            spans = token_spans(model.tokenizer, prompt.prompt, relevance.token_ids[0].tolist())
            key = overlap(spans, prompt.keyword_spans())
            values = relevance.tokens[0].double().numpy()
            outcomes[name].append(judge(values, key, relevance.str_tokens[0]))
        outcomes[RANDOM].append(judge_random(key))
    return outcomes


def column(outcomes: list[Outcome], field: str) -> NDArray[np.float64]:
    """One field of all outcomes, [n]."""
    return np.array([getattr(outcome, field) for outcome in outcomes])


def print_rates(outcomes: dict[str, list[Outcome]], seed: int) -> None:
    """Hit rates over all prompts, the first and last token's part, AttnLRP's paired lead."""
    print(
        "| method | top-1 | top-3 | first token is most relevant "
        "| its mean share of absolute relevance | last token is most relevant "
        "| AttnLRP's lead at top-1 | at top-3 |\n|---|---|---|---|---|---|---|---|"
    )
    ours = outcomes["AttnLRP"]
    for name, theirs in outcomes.items():
        leads = [
            interval(column(ours, field) - column(theirs, field), seed, "+")
            if name != "AttnLRP"
            else "-"
            for field in ("top1", "top3")
        ]
        print(
            f"| {name} | {interval(column(theirs, 'top1'), seed)} "
            f"| {interval(column(theirs, 'top3'), seed)} "
            f"| {interval(column(theirs, 'first_token'), seed)} "
            f"| {column(theirs, 'first_share').mean():.2f} "
            f"| {interval(column(theirs, 'last_token'), seed)} | {leads[0]} | {leads[1]} |"
        )
    print()


def print_kinds(outcomes: dict[str, list[Outcome]], prompts: list[Prompt], seed: int) -> None:
    """Hit rates by kind of prompt: top-1, then top-3."""
    kinds = list(dict.fromkeys(prompt.kind for prompt in prompts))
    counts = {kind: sum(prompt.kind == kind for prompt in prompts) for kind in kinds}
    print("| method | at | " + " | ".join(f"{k} (n={counts[k]})" for k in kinds) + " |")
    print("|---|---|" + "---|" * len(kinds))
    for name, results in outcomes.items():
        for field, label in (("top1", "top-1"), ("top3", "top-3")):
            cells = [
                interval(
                    column(
                        [o for o, p in zip(results, prompts, strict=True) if p.kind == k], field
                    ),
                    seed,
                )
                for k in kinds
            ]
            print(f"| {name} | {label} | " + " | ".join(cells) + " |")
    print()


def print_prompts(outcomes: dict[str, list[Outcome]], prompts: list[Prompt]) -> None:
    """Every prompt, most robust under AttnLRP first."""
    names = list(METHODS)
    print(
        "| # | kind | prompt | target | " + " | ".join(f"{n}: margin, best" for n in names) + " |"
    )
    print("|---|---|---|---|" + "---|" * len(names))
    order = sorted(range(len(prompts)), key=lambda i: -outcomes["AttnLRP"][i].margin)
    for index in order:
        prompt = prompts[index]
        cells = [f"{outcomes[n][index].margin:+.2f} `{outcomes[n][index].best}`" for n in names]
        print(
            f"| {index} | {prompt.kind} | {prompt.prompt} | `{prompt.target}` | "
            + " | ".join(cells)
            + " |"
        )


def main() -> None:
    """Explain the 50 prompts and print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m", help="as in lenslrp.load")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap (default 0)")
    parser.add_argument("--per-prompt", action="store_true", help="also list every prompt")
    options = parser.parse_args()
    prompts = read_prompts()
    outcomes = outcomes_of(lenslrp.load(options.model), prompts)
    print(
        f"{options.model}; n = {len(prompts)} prompts; 95% bootstrap intervals, "
        f"{RESAMPLES} resamples, seed {options.seed}\n"
    )
    print_rates(outcomes, options.seed)
    print_kinds(outcomes, prompts, options.seed)
    if options.per_prompt:
        print_prompts(outcomes, prompts)


if __name__ == "__main__":
    main()
