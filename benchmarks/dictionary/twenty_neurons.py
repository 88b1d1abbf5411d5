"""Twenty neurons that mattered for twenty answers, with what a dictionary shows of each.

    python -m benchmarks.dictionary.twenty_neurons DICTIONARY

The choice is mechanical: in `facts.json`, in the order of the file, the first prompt of each of the
first twenty relations whose answer the model gives first; of each the neuron with the largest
relevance (AttnLRP, the answer's logit less the mean of the ten best other tokens', summed over
positions) that was not chosen before. What is printed of each is what
`docs/explanation/twenty_neurons.md` was judged by: what it writes and reads, and the best sentences
of ActMax, ActMin and RelMax; then the names that two providers give it from the sentences of the
sign that its activation has at its strongest position, with their scores on sentences that were
kept back.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

import lenslrp
from benchmarks.knowledge.scores import FACTS, OTHERS, read_prompts
from lenslrp import targets
from lenslrp.analysis import NeuronDictionary, Page
from lenslrp.analysis.dictionary.naming.names import NamingExample, name_unit
from lenslrp.analysis.dictionary.naming.providers import LanguageModel, TokenRule

COUNT = 20
SHOWN = 6
CRITERIA = ("actmax", "actmin", "relmax")


def main() -> None:
    d = NeuronDictionary.open(Path(sys.argv[1]))
    model = lenslrp.load("smollm2-135m", device="cpu")
    chosen: set[tuple[int, int]] = set()
    relations: set[str] = set()
    for relation, prompt, answer in read_prompts(FACTS):
        if relation in relations or len(relations) == COUNT:
            continue
        wanted = model.tokenizer.encode(f" {answer}", add_special_tokens=False)
        with torch.no_grad():
            best = int(model(prompt)[0, -1].argmax())
        if wanted != [best]:
            continue
        relations.add(relation)
        target = targets.Contrastive(best, top_k=OTHERS)
        _, R = lenslrp.run_with_relevance(model, prompt, target=target, ledger=False)
        top = R.top("mlp.hook_post", k=400)
        totals = top.groupby(["layer", "neuron"])["relevance"].sum().sort_values(ascending=False)
        layer, neuron = next(key for key in totals.index if key not in chosen)
        chosen.add((layer, neuron))
        rows = top[(top["layer"] == layer) & (top["neuron"] == neuron)]
        row = rows.loc[rows["relevance"].idxmax()]
        page = d["mlp.hook_post", layer, neuron]
        print(f"\n## {len(chosen)}. {page.name}: {prompt!r} -> {answer!r}")
        print(
            f"relevance {totals[layer, neuron]:+.2f}; "
            f"activation {row['activation']:+.1f} at {row['token']!r}"
        )
        _show(page)
        _name(page, model, 1 if row["activation"] > 0 else -1)


def _show(page: Page) -> None:
    vocabulary = page.vocabulary()
    for role in ("writes", "reads"):
        for (name, side), part in vocabulary[vocabulary["role"] == role].groupby(["name", "side"]):
            print(f"{role} {name} {side}: {' '.join(map(repr, part['token']))}")
    for criterion in CRITERIA:
        for example in page.examples(criterion).head(SHOWN).itertuples():
            hit = example.position - example.start
            text = "".join(f"[[{t}]]" if i == hit else t for i, t in enumerate(example.tokens))
            print(f"{criterion} {example.score:+.2f} -> {example.target!r} | {text!r}")


def _name(page: Page, model: object, sign: int) -> None:
    def examples(criterion: str) -> list[NamingExample]:
        return [
            NamingExample(tuple(e.tokens), tuple(sign * e.activations))
            for e in page.examples(criterion).itertuples()
        ]

    words = page.vocabulary()
    words = words[
        (words["role"] == "writes") & (words["side"] == ("top" if sign > 0 else "bottom"))
    ]
    best, others = examples("actmax" if sign > 0 else "actmin"), examples("random")
    for provider in (TokenRule(), LanguageModel(model)):
        name = name_unit(provider, best, others, writes=list(words["token"]))
        print(f"name by {name.provider}: {name.explanation!r}")
        print(f"  detection {name.detection}; fuzzing {name.fuzzing}")


if __name__ == "__main__":
    main()
