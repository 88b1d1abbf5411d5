"""Methods of attribution: cost, whether integrated gradients add up, which are stable.

    python -m benchmarks.faithfulness.baselines cost|complete|stable [--data DIR] [--count 40]

SmolLM2-135M in float32; the first 64 tokens of encyclopaedic paragraphs (the first of each of the
first documents), the top logit after them. `cost`: passes and seconds of one explanation, relative
to one plain forward and backward pass, interleaved, medians. `complete`: what of
`f(x) - f(baseline)` the sum of integrated gradients misses, by steps and baseline. `stable`, for
AttnLRP, its variants and the two rejected rules for the softmax: the sum of |relevance| relative to
the target (how much cancels), the first token's share of it, and how far relevance moves (relative,
in the Euclidean norm) when every embedding gets Gaussian noise of a thousandth of its own length.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

import lenslrp
from lenslrp.analysis.attribution.methods import METHODS, attribute
from lenslrp.analysis.common.statistics import interval
from lenslrp.analysis.passes.problems import PassCount, resolve

LENGTH = 64
STABLE = (
    "attnlrp", "attnlrp_softmax_identity", "attnlrp_softmax_distributed", "cp_lrp", "gim",
    "gradient_x_input",
)  # fmt: skip
NOISE = 1e-3


def prompts(model: Any, data: Path, count: int) -> list[torch.Tensor]:
    """Token rows [1, 64]."""
    rows, seen = [], set()
    with (data / "wikipedia_paragraphs.jsonl").open(encoding="utf-8") as lines:
        for line in map(json.loads, lines):
            tokens = model.to_tokens(line["text"], prepend_bos=False)[:, :LENGTH]
            if line["doc"] not in seen and tokens.shape[1] == LENGTH:
                seen.add(line["doc"])
                rows.append(tokens)
            if len(rows) == count:
                break
    return rows


def cost(model: Any, rows: list[torch.Tensor], seed: int) -> None:
    """One table: method, passes, seconds relative to a plain forward and backward pass."""

    def plain() -> PassCount:
        question = resolve(model, rows[0])
        start = time.perf_counter()
        question.gradients(question.inputs[None])
        times["plain"].append(time.perf_counter() - start)
        return PassCount()

    def one(name: str) -> Callable[[], PassCount]:
        def run() -> PassCount:
            start = time.perf_counter()
            attribution = attribute(name, model, rows[0])
            times[name].append(time.perf_counter() - start)
            return attribution.passes

        return run

    times: dict[str, list[float]] = {"plain": [], **{name: [] for name in METHODS}}
    passes: dict[str, PassCount] = {}
    runs = {"plain": plain, **{name: one(name) for name in METHODS}}
    for round_ in range(4):
        for name, run in runs.items():
            if round_ < 2 or METHODS.get(name) is None or passes[name].forward <= 2:
                passes[name] = run()
    base = float(np.median(times["plain"][1:]))
    print(f"one plain forward and backward pass of {LENGTH} tokens: {base:.2f} s")
    print("| method | forward | backward | relative time |\n|---|---|---|---|")
    for name in METHODS:
        relative = float(np.median(times[name][1:])) / base
        print(f"| {name} | {passes[name].forward} | {passes[name].backward} | {relative:.1f} |")


def complete(model: Any, rows: list[torch.Tensor], seed: int) -> None:
    """One table: baseline, steps, relative error of the sum."""
    print("| baseline | steps | error of the sum, relative |\n|---|---|---|")
    for baseline in ("mean", "zero"):
        for steps in (8, 32, 128):
            errors = []
            for row in rows:
                attribution = attribute(
                    "integrated_gradients", model, row, steps=steps, baseline=baseline
                )
                question = resolve(model, row)
                nothing = torch.zeros(1, 1, LENGTH, dtype=torch.bool)
                low = question.ablated(nothing, question.baseline(baseline))
                difference = float(attribution.target.value - low)
                errors.append(abs(float(attribution.tokens.sum()) - difference) / abs(difference))
            print(f"| {baseline} | {steps} | {interval(np.array(errors), seed)} |", flush=True)


def stable(model: Any, rows: list[torch.Tensor], seed: int) -> None:
    """One table: method, cancellation, the first token's share, sensitivity to noise."""
    ratios: dict[str, list[tuple[float, float, float]]] = {name: [] for name in STABLE}
    for row in tqdm(rows, desc="prompts", unit="prompt"):
        embeds = model.embed(row).detach()
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(embeds.shape, generator=generator)
        noise *= NOISE * embeds.norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True)
        target = int(model(row)[0, -1].argmax())
        for name in STABLE:
            answers = [
                attribute(name, model, inputs_embeds=x, target=target)
                for x in (embeds, embeds + noise)
            ]
            one, other = (answer.tokens[0].double() for answer in answers)
            value = float(answers[0].target.value)
            ratios[name].append(
                (
                    float(one.abs().sum()) / abs(value),
                    float(one[0].abs() / one.abs().sum()),
                    float((one - other).norm() / one.norm()),
                )
            )
    print("| method | sum of magnitudes / target | first token's share | moved by noise |")
    print("|---|---|---|---|")
    for name, values in ratios.items():
        cells = [interval(np.array(column), seed) for column in zip(*values, strict=True)]
        print(f"| {name} | " + " | ".join(cells) + " |")


def main() -> None:
    """Load, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    tables = {"cost": cost, "complete": complete, "stable": stable}
    parser.add_argument("table", choices=tables)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--count", type=int, default=40, help="paragraphs")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if not (options.data / "wikipedia_paragraphs.jsonl").exists():
        parser.error(f"no wikipedia_paragraphs.jsonl in {options.data}; give --data")
    model = lenslrp.load("smollm2-135m", dtype=torch.float32, device="cpu")
    rows = prompts(model, options.data, options.count)
    print(f"{len(rows)} prompts of {LENGTH} tokens")
    tables[options.table](model, rows, options.seed)


if __name__ == "__main__":
    main()
