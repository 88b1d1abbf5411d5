"""Is what a unit writes readable? A reader's judgement of 180 lists, and how the score agrees.

    python -m benchmarks.dictionary.readability sample --seed 2
    python -m benchmarks.dictionary.readability agree

`sample` prints the lists that were judged, two neurons of each layer of SmolLM2-135M, drawn with a
fixed seed: the ten tokens that each raises most, by weights. The judgements lie in
`readability_judged.json`, each made from what `sample` prints before the score was run on it. Seed
1 served to choose the score. Its first form called two unrelated pairs a meaning, which seed 0
showed, so that both are spent; seed 2 was judged before the form in use was written, and nothing
was changed after it.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

import torch

import lenslrp
from lenslrp.analysis import Neuron, parse_unit, writes
from lenslrp.analysis.units.projection import project
from lenslrp.analysis.units.readability import TokenRelations

JUDGED = Path(__file__).parent / "readability_judged.json"
USED = {"1": "chosen by it", "0": "seen before the last change", "2": "kept back"}
PER_LAYER = 2
TOKENS = 10
DIRECTIONS = 2000


def sampled(model: Any, seed: int) -> list[Neuron]:
    """Two neurons of each layer, in the order of layers."""
    draw, cfg = random.Random(seed), model.cfg
    return [
        Neuron(layer, index)
        for layer in range(cfg.n_layers)
        for index in sorted(draw.sample(range(cfg.d_mlp), PER_LAYER))
    ]


def sample(model: Any, seed: int) -> None:
    for neuron in sampled(model, seed):
        print(f"{neuron}: {' '.join(map(repr, writes(model, neuron).top(TOKENS)['token']))}")


def agree(model: Any, _: int) -> None:
    relations = TokenRelations.of(model)
    samples = json.loads(JUDGED.read_text())["samples"]
    for seed, role in USED.items():
        units = samples[seed]
        best = [writes(model, parse_unit(unit["unit"])).top(TOKENS) for unit in units]
        judged = relations.judged(torch.tensor([top["id"].tolist() for top in best]))
        reader = torch.tensor([unit["readable"] for unit in units])
        same, both = judged.readable == reader, judged.readable & reader
        print(
            f"seed {seed} ({role}): {int(same.sum())} of {len(units)} agree; of "
            f"{int(reader.sum())} that the reader reads {int(both.sum())} found, "
            f"{int((judged.readable & ~reader).sum())} false alarms"
        )
        for unit, fits, said in zip(units, same.tolist(), judged.readable.tolist(), strict=True):
            if not fits:
                name = "false alarm" if said else f"missed ({unit['what']})"
                print(f"  {name}: {unit['unit']} {unit['tokens']}")
    draw = torch.Generator().manual_seed(0)
    directions = torch.randn(DIRECTIONS, model.cfg.d_model, generator=draw)
    best_ids = project(model, directions).topk(TOKENS).indices
    share = relations.judged(best_ids).readable.float().mean()
    print(f"of {DIRECTIONS} random directions {share:.1%} have a readable list")
    random_lists = torch.randint(int(model.cfg.d_vocab), (DIRECTIONS, TOKENS), generator=draw)
    share = relations.judged(random_lists).readable.float().mean()
    print(f"of {DIRECTIONS} lists of random tokens {share:.1%} are readable")
    print(f"{int(relations.junk.sum())} of {len(relations.junk)} tokens are junk")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    commands = parser.add_subparsers(required=True)
    for act in (sample, agree):
        command = commands.add_parser(act.__name__)
        command.set_defaults(act=act)
        command.add_argument("--seed", type=int, default=2, help="of sample")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.act(lenslrp.load("smollm2-135m", device="cpu"), arguments.seed)


if __name__ == "__main__":
    main()
