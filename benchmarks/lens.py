"""Logit lens, relevance lens and ridge lens on held-out text: which reads a layer best?

Lenses are fitted on paragraphs of some articles and measured on those of others: KL divergence
of the lens' next-token distribution from the model's, and how often the most likely token agrees.
The text is ``wikipedia_paragraphs.jsonl`` or any file of JSON lines with ``text``.

    python benchmarks/lens.py ../shared/data/wikipedia_paragraphs.jsonl

prints the table of ``benchmarks/README.md``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pandas as pd
import torch
from transformer_lens.model_bridge import TransformerBridge

import lenslrp
from lenslrp.analysis import Lens, compare_lenses, fit_relevance_lens, fit_ridge_lens

HELD_OUT = 0.2  # the last share of the file: other articles, as neighbours share theirs


def paragraphs(path: Path, model: TransformerBridge, length: int) -> list[list[torch.Tensor]]:
    """Token rows of exactly ``length`` tokens for fitting, and for measuring: other articles."""
    lines = path.read_text(encoding="utf-8").splitlines()
    rows = [model.to_tokens(json.loads(line)["text"])[0, :length] for line in lines]
    cut = round((1 - HELD_OUT) * len(rows))
    parts = rows[:cut], rows[cut:]
    return [[row for row in part if len(row) == length] for part in parts]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--length", type=int, default=64, help="tokens a paragraph")
    parser.add_argument("--fit", type=int, default=256, help="paragraphs to fit on")
    parser.add_argument("--held-out", type=int, default=24, help="paragraphs to measure on")
    parser.add_argument("--every", type=int, default=3, help="measure every so many layers")
    parser.add_argument("--composites", nargs="*", default=["AttnLRP", "GradientTimesInput"])
    parser.add_argument("--save", type=Path, help="folder for the fitted lenses")
    given = parser.parse_args()

    model = lenslrp.load(given.model)
    fit, held_out = paragraphs(given.corpus, model, given.length)
    fit, held_out = fit[: given.fit], held_out[: given.held_out]
    print(f"{len(fit)} paragraphs to fit on, {len(held_out)} of other articles to measure on")
    rows, unseen = torch.stack(fit), torch.stack(held_out)
    lenses: dict[str, Lens | None] = {"logit": None}
    for name in given.composites:
        composite = getattr(lenslrp, name)()
        lenses[name] = fit_relevance_lens(model, rows, composite=composite, progress=True)
    lenses["ridge"] = fit_ridge_lens(model, rows, progress=True)
    for name, lens in lenses.items():
        if lens is not None and given.save:
            lens.save(given.save / f"{given.model}-{name}.safetensors")
    layers = [*range(0, len(model.blocks) - 1, given.every)]
    if layers[-1] != len(model.blocks) - 2:
        layers.append(len(model.blocks) - 2)
    for bias in (True, False):
        table = compare_lenses(model, unseen, lenses, layers=layers, bias=bias)
        wide = table.pivot(index="layer", columns="lens", values=["kl", "top1"])
        wide = wide.reindex(columns=[(m, name) for m in ("kl", "top1") for name in lenses])
        print(f"\nbias {'on' if bias else 'off'}, {table['positions'].iloc[0]} positions")
        print(wide.round(3).to_string())
    noise = pd.DataFrame({n: x.noise for n, x in lenses.items() if x is not None})
    print("\nstandard error of the matrices, relative")
    print(noise.loc[layers].round(3).to_string())


if __name__ == "__main__":
    main()
