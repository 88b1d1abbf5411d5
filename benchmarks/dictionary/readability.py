"""Is what a unit writes readable? A reader's judgement of 60 lists, and how a score agrees with it.

    python -m benchmarks.dictionary.readability sample

`sample` prints the lists that were judged, two neurons of each layer of SmolLM2-135M, drawn with a
fixed seed: the ten tokens that each raises most, by weights. The judgements lie in
`readability_judged.json`, made from what `sample` prints, before a score existed.
"""

from __future__ import annotations

import argparse
import random

import lenslrp
from lenslrp.analysis import Neuron, writes

SEED = 0
PER_LAYER = 2
TOKENS = 10


def sampled(model: object, seed: int = SEED) -> list[Neuron]:
    """Two neurons of each layer, in the order of layers."""
    draw = random.Random(seed)
    cfg = model.cfg  # type: ignore[attr-defined]
    return [
        Neuron(layer, index)
        for layer in range(cfg.n_layers)
        for index in sorted(draw.sample(range(cfg.d_mlp), PER_LAYER))
    ]


def sample(arguments: argparse.Namespace) -> None:
    model = lenslrp.load("smollm2-135m", device="cpu")
    for neuron in sampled(model, arguments.seed):
        print(f"{neuron}: {' '.join(map(repr, writes(model, neuron).top(TOKENS)['token']))}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    commands = parser.add_subparsers(required=True)
    for name, act in (("sample", sample),):
        command = commands.add_parser(name)
        command.set_defaults(act=act)
        command.add_argument("--seed", type=int, default=SEED)
    arguments = parser.parse_args()
    arguments.act(arguments)


if __name__ == "__main__":
    main()
