"""Which choice of ten features does an answer hang on: by relevance, by gradient, by activation?

    python -m benchmarks.faithfulness.feature_ablation [--n 100] [--target logit] [--results FILE]

Transcoders of four MLPs of SmolLM2-135M and an autoencoder of the residual stream are trained as in
`tutorials/train_transcoders.py`, here on `wikipedia_paragraphs.jsonl`, and kept in the library's
cache folder. The prompts are facts of `benchmarks/knowledge/facts.json` that the model knows. In
each, ten features are switched off, each at a position where it is active (never the first, which
no coder was trained on): what they write is taken away where the coder writes, and the coder's
error stays. The ten are

- the largest by relevance for the target, under AttnLRP and under RelP;
- the largest by the target's gradient times activation;
- the largest by activation (decoders' rows have length 1, so: by what they write);
- drawn among all that are active.

The target is the answer's logit, or (`--target contrast`) that logit less the mean of the ten best
others. Measured: by how much the logarithm of the answer's probability falls, and its logit. `all
layers` is ten among those of all four transcoders. 95% bootstrap intervals over prompts; leads are
paired. Each prompt is appended to `--results` (a file that git ignores) when it is done, so an
interrupted run goes on where it was.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

import lenslrp
from benchmarks import DATA, RESULTS
from benchmarks.knowledge.scores import FACTS, chosen_facts, known_facts, last_only
from lenslrp.analysis import Edit, SparseCoder, edit_units, feature_relevance
from lenslrp.analysis.attribution.features import FeatureRelevance
from lenslrp.analysis.common.journal import resumed
from lenslrp.analysis.common.statistics import interval
from lenslrp.models.embedded import cache_root
from lenslrp.targets import Contrastive, Logit, Target
from tutorials.train_transcoders import explained, train

LAYERS = (8, 18, 24, 29)
STREAM = "blocks.18.hook_resid_post"
TOKENS = 64
SWITCHED_OFF = 10
RULES = {
    "AttnLRP": lenslrp.AttnLRP,
    "RelP": lenslrp.RelP,
    "gradient x activation": lenslrp.GradientTimesInput,
}
TARGETS: dict[str, Callable[[int], Target]] = {
    "logit": Logit,
    "contrast": partial(Contrastive, top_k=10),
}
CHOICES = (*RULES, "activation", "random")
Places = list[tuple[int, int, int]]  # coder, position, feature


@torch.no_grad()
def trained(model: TransformerBridge, folder: Path, paragraphs: int = 400) -> list[SparseCoder]:
    """A transcoder a layer and the stream's autoencoder, from the folder or trained."""
    hooks = [(f"blocks.{n}.mlp.hook_in", f"blocks.{n}.hook_mlp_out") for n in LAYERS]
    ends: list[tuple[str, str | None]] = [*hooks, (STREAM, None)]
    folders = [folder / hook for hook, _ in ends]
    if not all(path.is_dir() for path in folders):
        with (DATA / "wikipedia_paragraphs.jsonl").open(encoding="utf-8") as lines:
            texts = (model.tokenizer(json.loads(line)["text"])["input_ids"] for line in lines)
            long_enough = (ids[:TOKENS] for ids in texts if len(ids) >= TOKENS)
            rows = torch.tensor(list(islice(long_enough, paragraphs)))
        names = {name for pair in ends for name in pair if name}
        kept: dict[str, list[Tensor]] = {name: [] for name in names}
        for some in rows.split(16):
            _, cache = model.run_with_cache(some, names_filter=lambda name: name in names)
            for name in names:
                kept[name].append(cache[name][:, 1:].clone())
        at = {name: torch.cat(parts) for name, parts in kept.items()}
        last = paragraphs // 10
        for (hook, hook_out), path in zip(ends, folders, strict=True):
            x, y = at[hook], at[hook_out or hook]
            with torch.enable_grad():
                coder = train(hook, hook_out, x[last:].flatten(0, 1), y[last:].flatten(0, 1),
                              features=2048, passes=8)  # fmt: skip
            coder.save(path)
            share = explained(coder, x[:last].flatten(0, 1), y[:last].flatten(0, 1))
            active = float((coder.encode(x[:last]) > 0).float().sum(dim=-1).mean())
            print(f"{hook}: {share:.2f} explained, {active:.0f} active, other texts", flush=True)
    return [SparseCoder.load(path) for path in folders]


def chosen(found: list[FeatureRelevance], coders: list[int], scores: list[Tensor]) -> Places:
    """The places of the largest scores among active features, and not at the first position."""
    allowed = [scores[i].masked_fill(found[i].activations[0] == 0, -torch.inf) for i in coders]
    for each in allowed:
        each[0] = -torch.inf
    sizes = [each.numel() for each in allowed]
    best = torch.cat([each.flatten() for each in allowed]).topk(SWITCHED_OFF).indices.tolist()
    places = []
    for index in best:
        at = int(np.searchsorted(np.cumsum(sizes), index, side="right"))
        position, feature = divmod(index - sum(sizes[:at]), allowed[at].shape[-1])
        places.append((coders[at], position, feature))
    return places


def measured(
    model: TransformerBridge,
    coders: list[SparseCoder],
    prompt: str,
    answer: int,
    target: Target,
    seed: int,
) -> dict[str, dict[str, tuple[float, float]]]:
    """Group of coders -> choice -> how far log probability and logit of the answer fall."""
    draw = torch.Generator().manual_seed(seed)
    by_rule = {
        name: feature_relevance(model, prompt, target, coders, composite=rule(), prepend_bos=False)
        for name, rule in RULES.items()
    }
    found = by_rule["AttnLRP"]
    scores = {name: [each.features[0].clone() for each in by_rule[name]] for name in RULES}
    scores["activation"] = [each.activations[0].clone() for each in found]
    scores["random"] = [torch.rand(a.shape, generator=draw) for a in scores["activation"]]
    groups = {coder.hook: [i] for i, coder in enumerate(coders)}
    groups["all layers"] = list(range(len(LAYERS)))
    cases = {(g, c): chosen(found, groups[g], scores[c]) for g in groups for c in CHOICES}
    tokens = model.to_tokens(prompt, prepend_bos=False).expand(len(cases) + 1, -1)
    gone = [torch.zeros(*tokens.shape, coder.W_dec.shape[1]) for coder in coders]
    for row, places in enumerate(cases.values(), start=1):
        for i, position, feature in places:
            write = found[i].activations[0, position, feature] * coders[i].W_dec[feature]
            gone[i][row, position] += write
    edits = [
        Edit(coder.hook_out or coder.hook, function=lambda x, less=less: x - less)
        for coder, less in zip(coders, gone, strict=True)
    ]
    unembedded = model.hooks(fwd_hooks=[("unembed.hook_in", last_only)])
    with torch.no_grad(), unembedded, edit_units(model, edits):
        last = model(tokens)[:, -1].double()
    values = torch.stack([last.log_softmax(dim=-1)[:, answer], last[:, answer]], dim=1)
    falls = (values[0] - values[1:]).tolist()
    result: dict[str, dict[str, Any]] = {group: {} for group in groups}
    for (group, choice), fall in zip(cases, falls, strict=True):
        result[group][choice] = fall
    return result


def print_tables(results: list[dict[str, Any]]) -> None:
    """Mean falls by coder, and the lead of AttnLRP's choice over each other."""
    for group in results[0]["falls"]:
        print(f"\n{group} (n = {len(results)})")
        falls = {
            choice: np.array([row["falls"][group][choice] for row in results]) for choice in CHOICES
        }
        for choice, fall in falls.items():
            lead = falls["AttnLRP"] - fall
            cells = [interval(each, 0) for each in fall.T]
            cells += [interval(lead[:, 0], 0, "+"), f"{(lead[:, 0] > 0).mean():.2f}"]
            print(f"| {choice} | {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=100)
    parser.add_argument("--target", choices=TARGETS, default="logit")
    parser.add_argument("--coders", type=Path, default=cache_root() / "feature_ablation")
    parser.add_argument("--results", type=Path)
    options = parser.parse_args()
    results = options.results or RESULTS / f"feature_ablation-{options.target}.jsonl"
    settings = {"n": options.n, "target": options.target, "layers": LAYERS}
    torch.set_num_threads(1)
    model = lenslrp.load("smollm2-135m", dtype=torch.float32, device="cpu")
    coders = trained(model, options.coders)
    known, _ = known_facts(model, FACTS)
    facts = chosen_facts(known, seed=0, per_relation=9, per_answer=2)[: options.n]
    with resumed(results, settings) as (rows, append):
        for number, fact in enumerate(facts[len(rows) :], start=len(rows)):
            target = TARGETS[options.target](fact.answer_id)
            falls = measured(model, coders, fact.prompt, fact.answer_id, target, number)
            row = {"relation": fact.relation, "prompt": fact.prompt, "falls": falls}
            append(row)
            rows.append(row)
    print_tables(rows)


if __name__ == "__main__":
    main()
