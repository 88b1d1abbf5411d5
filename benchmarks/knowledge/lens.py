"""Logit lens, relevance lens and ridge lens on held-out text: which reads a layer best?

Lenses are fitted on paragraphs of some articles and measured on those of others: KL divergence
of the lens' next-token distribution from the model's, and how often the most likely token agrees.
The text is ``wikipedia_paragraphs.jsonl`` or any file of JSON lines with ``text``.

    python -m benchmarks.knowledge.lens TEXTS --save lenses
    python -m benchmarks.knowledge.lens TEXTS --load lenses --units 48

prints the tables of ``benchmarks/README.md``. With ``--units``, lenses read neurons instead of
states: a neuron that contributes much at some position is switched off there, and the change of all
logits is correlated with what the neuron writes through each lens.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pandas as pd
import torch
from transformer_lens.model_bridge import TransformerBridge

import lenslrp
from lenslrp.analysis import (
    Lens,
    Neuron,
    compare_lenses,
    fit_relevance_lens,
    fit_ridge_lens,
    writes,
)
from lenslrp.analysis.common.statistics import bootstrap

HELD_OUT = 0.2  # the last share of the file: other articles, as neighbours share theirs


def paragraphs(path: Path, model: TransformerBridge, length: int) -> list[list[torch.Tensor]]:
    """Token rows of exactly ``length`` tokens for fitting, and for measuring: other articles."""
    lines = path.read_text(encoding="utf-8").splitlines()
    rows = [model.to_tokens(json.loads(line)["text"])[0, :length] for line in lines]
    cut = round((1 - HELD_OUT) * len(rows))
    parts = rows[:cut], rows[cut:]
    return [[row for row in part if len(row) == length] for part in parts]


def contribution(model: TransformerBridge, layer: int, post: torch.Tensor) -> torch.Tensor:
    """How much each neuron moves the residual stream: |activation| times the length of its row."""
    return post.abs() * model.blocks[layer].mlp.W_out.norm(dim=1)


@torch.no_grad()
def unit_effects(
    model: TransformerBridge,
    rows: torch.Tensor,
    lenses: dict[str, Lens | None],
    layers: list[int],
    units: int,
    batch: int = 8,
) -> pd.DataFrame:
    """Correlation over the vocabulary of what neurons write with what switching them off takes.

    One neuron a row, drawn from the 20 that contribute most at a position drawn from the later
    half; the change is read at that position.
    """
    generator = torch.Generator().manual_seed(0)
    records = []
    for layer in layers:
        hook = f"blocks.{layer}.mlp.hook_post"
        for start in range(0, units, batch):
            count = min(batch, units - start)
            tokens = rows[torch.randint(len(rows), (count,), generator=generator)]
            places = torch.randint(rows.shape[1] // 2, rows.shape[1], (count,), generator=generator)
            at, chosen = torch.arange(count), torch.randint(20, (count,), generator=generator)
            _, cache = model.run_with_cache(tokens, names_filter=hook)
            post = cache[hook][at, places]
            neurons = contribution(model, layer, post).topk(20).indices[at, chosen]
            signs = post[at, neurons].sign()

            def switch_off(x, hook, at=at, places=places, neurons=neurons):
                x = x.clone()
                x[at, places, neurons] = 0
                return x

            base = model(tokens)
            off = model.run_with_hooks(tokens, fwd_hooks=[(hook, switch_off)])
            change = (base - off)[at, places]
            for row in range(count):
                neuron = Neuron(layer, int(neurons[row]))
                for name, lens in lenses.items():
                    scores = writes(model, neuron, lens=lens).scores * signs[row]
                    pair = torch.corrcoef(torch.stack([scores, change[row]]))
                    records.append((layer, name, start + row, float(pair[0, 1])))
    return pd.DataFrame(records, columns=["layer", "lens", "unit", "correlation"])


def print_unit_effects(table: pd.DataFrame) -> None:
    """Mean correlations by layer, and the paired difference from the logit lens with intervals."""
    names = list(dict.fromkeys(table["lens"]))
    wide = table.pivot_table(index=["layer", "unit"], columns="lens", values="correlation")[names]
    print(wide.groupby("layer").mean().round(3).to_string())
    print("all", wide.mean().round(3).to_dict())
    for name in names[1:]:
        mean, low, high = bootstrap((wide[name] - wide[names[0]]).to_numpy(), seed=0)
        print(f"{name} less {names[0]}: {mean:+.3f} ({low:+.3f} to {high:+.3f})")


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
    parser.add_argument("--load", type=Path, help="folder to take fitted lenses from")
    parser.add_argument("--units", type=int, default=0, help="neurons a layer; no states then")
    options = parser.parse_args()

    model = lenslrp.load(options.model)
    fit, held_out = paragraphs(options.corpus, model, options.length)
    fit, held_out = fit[: options.fit], held_out[: options.held_out]
    print(f"{len(fit)} paragraphs to fit on, {len(held_out)} of other articles to measure on")
    rows, unseen = torch.stack(fit), torch.stack(held_out)
    lenses: dict[str, Lens | None] = {"logit": None}
    for name in (*options.composites, "ridge"):
        if options.load:
            lenses[name] = Lens.load(options.load / f"{options.model}-{name}.safetensors", model)
        elif name == "ridge":
            lenses[name] = fit_ridge_lens(model, rows, progress=True)
        else:
            composite = getattr(lenslrp, name)()
            lenses[name] = fit_relevance_lens(model, rows, composite=composite, progress=True)
    for name, lens in lenses.items():
        if lens is not None and options.save:
            lens.save(options.save / f"{options.model}-{name}.safetensors")
    layers = [*range(0, len(model.blocks) - 1, options.every)]
    if layers[-1] != len(model.blocks) - 2:
        layers.append(len(model.blocks) - 2)
    if options.units:
        print_unit_effects(unit_effects(model, unseen, lenses, layers, options.units))
        return
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
