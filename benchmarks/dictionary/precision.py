"""Does `find` return units of the concept? Twenty concepts, judged on held-out paragraphs.

    python -m benchmarks.dictionary.precision FOLDER [--documents 400]

A dictionary of the neurons of five layers of SmolLM2-135M is built in FOLDER over the even
paragraphs of the corpus (and opened again if it is there). The first units that `find` returns for
each concept of `concepts.json` are then run over the odd paragraphs, which no dictionary has seen.
The rule by which a unit is right stands in that file, which was written before any unit was looked
at. Judged by the same rule: as many units of the same layers drawn at random, and, without a
dictionary's `find`, the units with the concept's asked words in their vocabulary list.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from pathlib import Path
from typing import Any

import torch

import lenslrp
from benchmarks import DATA
from lenslrp.analysis import NeuronDictionary
from lenslrp.analysis.dictionary.text_search import occurrences

CORPUS = DATA / "wikipedia_paragraphs.jsonl"
CONCEPTS = Path(__file__).parent / "concepts.json"
LAYERS = (5, 10, 15, 20, 25)
FIRST = 5
BEST = 10
AROUND = 10
RARE = 0.01

Unit = tuple[int, int]


def paragraphs(rest: int, count: int) -> list[str]:
    """Every other paragraph: the dictionary's (0) or those held out (1)."""
    lines = CORPUS.read_text().splitlines()[rest::2]
    return [json.loads(line)["text"] for line in lines[:count]]


def opened(model: Any, folder: Path, count: int) -> NeuronDictionary:
    if not (folder / "manifest.json").exists():
        sites = [f"blocks.{layer}.mlp.hook_post" for layer in LAYERS]
        criteria = ("actmax",)
        NeuronDictionary.build(
            model, paragraphs(0, count), folder, sites=sites, criteria=criteria, k=20
        ).close()
    return NeuronDictionary.open(folder)


class HeldOut:
    """For each unit that is asked about, its strongest token in each held-out paragraph."""

    def __init__(self, model: Any, units: set[Unit], count: int) -> None:
        self.units = sorted(units)
        self.strengths = torch.zeros(len(self.units), count)
        self.windows: list[list[str]] = [[] for _ in self.units]
        self.chance: list[str] = []
        names = {f"blocks.{layer}.mlp.hook_post" for layer, _ in self.units}
        draw = random.Random(0)
        for n, text in enumerate(paragraphs(1, count)):
            with torch.no_grad():
                _, cache = model.run_with_cache(text, names_filter=lambda name: name in names)
            ids = model.to_tokens(text)[0, : cache[next(iter(names))].shape[1]]
            for row, (layer, index) in enumerate(self.units):
                values = cache[f"blocks.{layer}.mlp.hook_post"][0, :, index]
                at = int(values[1:].argmax()) + 1
                self.strengths[row, n] = values[at]
                self.windows[row].append(_window(model, ids, at))
            self.chance.append(_window(model, ids, draw.randrange(1, len(ids))))

    def best(self, unit: Unit) -> list[str]:
        row = self.units.index(unit)
        return [self.windows[row][i] for i in self.strengths[row].topk(BEST).indices.tolist()]


def _window(model: Any, ids: torch.Tensor, at: int) -> str:
    text: str = model.tokenizer.decode(ids[max(0, at - AROUND) : at + AROUND + 1])
    return text


def holding(windows: list[str], words: list[str]) -> int:
    return sum(any(occurrences(window, words)) for window in windows)


def right(held: HeldOut, unit: Unit, others: list[str]) -> bool:
    """Whether so many windows hold a word with a probability below `RARE` by chance."""
    share = max(1, holding(held.chance, others)) / len(held.chance)
    found = holding(held.best(unit), others)
    tail = sum(
        math.comb(BEST, n) * share**n * (1 - share) ** (BEST - n) for n in range(found, BEST + 1)
    )
    return tail < RARE


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--documents", type=int, default=400)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model = lenslrp.load("smollm2-135m", device="cpu")
    d = opened(model, arguments.folder, arguments.documents)
    concepts = json.loads(CONCEPTS.read_text())["concepts"]
    ways = {name: chosen(d, concepts) for name, chosen in WAYS.items()}
    asked = {unit for way in ways.values() for units in way.values() for unit in units}
    held = HeldOut(model, asked, arguments.documents)
    total: dict[str, list[bool]] = {name: [] for name in ways}
    for concept, words in concepts.items():
        line = []
        for name, units in ways.items():
            judged = [right(held, unit, words["others"]) for unit in units[concept]]
            total[name] += judged
            line.append(f"{name} {sum(judged)} of {len(judged)}")
        share = holding(held.chance, words["others"]) / len(held.chance)
        print(f"{concept:20} {', '.join(line)}; by chance {share:.1%} of windows")
    for name, judged in total.items():
        print(f"{name}: {sum(judged)} of {len(judged)} right, {sum(judged) / len(judged):.0%}")


def by_examples(d: NeuronDictionary, concepts: dict[str, Any]) -> dict[str, list[Unit]]:
    chosen = {}
    for concept, words in concepts.items():
        units = d.find(*words["asked"], limit=FIRST).units
        chosen[concept] = [
            (_layer(hook), int(i)) for hook, i in zip(units["hook"], units["index"], strict=True)
        ]
    return chosen


def at_random(d: NeuronDictionary, concepts: dict[str, Any]) -> dict[str, list[Unit]]:
    draw, size = random.Random(0), d.plan.places[0].size
    return {
        concept: [(draw.choice(LAYERS), draw.randrange(size)) for _ in range(FIRST)]
        for concept in concepts
    }


def _layer(hook: str) -> int:
    return int(hook.split(".")[1])


WAYS = {"examples": by_examples, "random": at_random}


if __name__ == "__main__":
    main()
