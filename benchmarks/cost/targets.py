"""What k targets of one prompt cost: one forward pass and k backward passes, against k runs.

    python -m benchmarks.cost.targets [--k 8] [--repeats 5] [--tokens 128] [--threads N] [--rows 32]

SmolLM2-135M on random tokens, interleaved in one process; the ratio of CPU time is formed within a
round.
Bound: less than 0.75 for k = 8. With `--rows`, the k targets are the tokens of a continuation
(`lenslrp.explain_generation`), and the single runs are of growing prefixes; bound: 0.5 for 32.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

import lenslrp


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--k", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--rows", type=int, help="of a generation after --tokens, in place of k")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    model = lenslrp.load("smollm2-135m", dtype=torch.float32, device="cpu")
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, model.cfg.d_vocab, (1, options.tokens), generator=generator)
    count = options.rows or options.k
    targets = list(range(100, 100 + count))

    def together() -> None:
        if options.rows:
            lenslrp.explain_generation(model, tokens, text=targets)
        else:
            lenslrp.relevance_for_targets(model, tokens, targets=targets, names_filter=[])

    def one_by_one() -> None:
        for row, target in enumerate(targets):
            before = targets[:row] if options.rows else []
            read = torch.cat([tokens, torch.tensor([before], dtype=torch.long)], dim=1)
            lenslrp.run_with_relevance(model, read, target=target, names_filter=[])

    together()
    ratios = []
    for _ in range(options.repeats):
        start = time.process_time()
        together()
        middle = time.process_time()
        one_by_one()
        ratios.append((middle - start) / (time.process_time() - middle))
    ratios.sort()
    print(f"seed 0, k = {count}, {options.tokens} tokens, {torch.get_num_threads()} thread(s)")
    print(f"together / one by one: median {statistics.median(ratios):.3f}, ", end="")
    print(f"from {ratios[0]:.3f} to {ratios[-1]:.3f} over {len(ratios)} rounds")


if __name__ == "__main__":
    main()
