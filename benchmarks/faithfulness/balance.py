"""How far relevance is from adding up where it is right, in every type: for the balance check.

    python -m benchmarks.faithfulness.balance [--prompts 6] [--zoo]

Tiny random models of every family of the tests (with --zoo: of every architecture that is covered),
under five composites. For each type it prints the median, the 99th percentile and the largest of
|target - accounted| / largest entry, beside what lenslrp.ledger.BALANCED allows.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

import lenslrp
from lenslrp.errors import CoverageError, InputError
from lenslrp.ledger import BALANCED
from tests.conformance import zoo
from tests.conformance.families import FAMILIES, make

COMPOSITES = ("AttnLRP", "CPLRP", "GradientTimesInput", "RelP", "GIM")


def models(every: bool, dtype: torch.dtype) -> Iterator[Any]:
    if every:
        for row in zoo.read():
            if row.result == "covered":
                yield zoo.build(row.name, dtype)
    else:
        for name in FAMILIES:
            yield make(name).to(dtype)


def measure(every: bool, prompts: int, dtype: torch.dtype) -> list[float]:
    found: list[float] = []
    for model in models(every, dtype):
        for name in COMPOSITES[: 2 if every else None]:
            for seed in range(prompts):
                try:
                    if every:
                        _, cache = zoo.explain(model, getattr(lenslrp, name)(), strict=False)
                    else:
                        drawn = torch.Generator().manual_seed(seed)
                        ids = torch.randint(2, int(model.cfg.d_vocab), (2, 9), generator=drawn)
                        _, cache = lenslrp.run_with_relevance(
                            model, ids, seed, getattr(lenslrp, name)(), [], strict=False
                        )
                except (CoverageError, InputError, RuntimeError) as error:
                    print(f"  {type(model.original_model).__name__} {dtype}: {str(error)[:90]}")
                    break
                found.append(cache.ledger().imbalance)
                if every:
                    break
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=6)
    parser.add_argument("--zoo", action="store_true")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    print(f"{'type':>10} {'n':>6} {'median':>9} {'99%':>9} {'largest':>9} {'allowed':>9}")
    for dtype, allowed in BALANCED.items():
        off = np.array(measure(options.zoo, options.prompts, dtype))
        name = str(dtype).removeprefix("torch.")
        numbers = [np.median(off), np.quantile(off, 0.99), off.max(), allowed]
        print(f"{name:>10} {len(off):>6} " + " ".join(f"{x:>9.1e}" for x in numbers), flush=True)


if __name__ == "__main__":
    main()
