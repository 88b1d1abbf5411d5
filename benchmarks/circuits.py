"""Do estimates of node effects agree with exact patching, and do they find circuits?

    python benchmarks/circuits.py correlate            # exact patching: resumable, an hour
    python benchmarks/circuits.py table                # what it found so far

Pairs whose clean prompt is answered right and whose corrupt one is answered the other way, on
SmolLM2: indirect object and subject-verb agreement, denoising. Residual stream, attention and MLP
outputs are nodes of one layer and one position; heads and neurons are patched at all positions. The
neurons are a sample: the 50 largest by each estimate, and 100 at random.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file, save_file

import lenslrp
from lenslrp.analysis.circuits import NodeScores, score_nodes
from lenslrp.analysis.files import whole
from lenslrp.analysis.nodes import Node, forward
from lenslrp.analysis.pairs import TEMPLATES, Pairs, template_pairs
from lenslrp.analysis.statistics import bootstrap, spearman

RESULTS = Path(__file__).with_name("results") / "circuits"  # ignored by git
N, CHUNK, SEED = 60, 12, 0
BY_POSITION = ("residual", "attention", "mlp")
WHOLE = ("heads", "neurons")
ESTIMATES: Mapping[str, dict[str, Any]] = {
    "RelP": {"method": "relevance"},
    "AttnLRP": {"method": "relevance", "composite": lenslrp.AttnLRP()},
    "CP-LRP": {"method": "relevance", "composite": lenslrp.CPLRP()},
    "GIM": {"method": "relevance", "composite": lenslrp.GIM()},
    "gradient": {"method": "attribution"},
    "integrated": {"method": "integrated", "steps": 5},
}
PAPER = {"residual": (0.968, 0.753), "attention": (0.962, 0.979), "mlp": (0.992, 0.195)}
"""RelP and attribution patching on GPT-2 small, indirect object (2508.21258)."""


def answered(model: Any, pairs: Pairs) -> Pairs:
    """The pairs whose two prompts are both answered as they should be."""
    clean, corrupt = (
        torch.cat([forward(model, getattr(p, side), p) for p in _parts(pairs)])
        for side in ("clean", "corrupt")
    )
    return pairs[(clean > 0) & (corrupt < 0)]


def _parts(pairs: Pairs) -> list[Pairs]:
    return [pairs[i : i + CHUNK] for i in range(0, len(pairs), CHUNK)]


def drawn(model: Any, task: str, n: int = N, seed: int = SEED) -> Pairs:
    """``n`` answered pairs, the shorter ones first, so that a chunk has little padding."""
    pairs = answered(model, template_pairs(model, task, 2 * n, seed=seed))[:n]
    order = pairs.mask.sum(dim=1).argsort(stable=True)
    print(f"{task}: {len(pairs)} of {2 * n} pairs drawn are answered right", flush=True)
    return pairs[order]


def sampled(estimates: Mapping[str, NodeScores], seed: int) -> list[Node]:
    """The largest neurons by each estimate, over the chunk, and as many at random again."""
    nodes: set[Node] = set()
    for scores in estimates.values():
        top = scores.top(50, component="neurons")
        nodes |= {Node(h, u) for h, u in zip(top["hook"], top["unit"], strict=True)}
    every = [
        (hook, unit)
        for hook, name in scores.components.items()
        if name == "neurons"
        for unit in range(scores.values[hook].shape[1])
    ]
    return sorted(nodes | {Node(*place) for place in random.Random(seed).sample(every, 100)})


def correlate(model: Any, task: str) -> None:
    """Scores of every chunk of pairs in a file of its own."""
    for index, part in enumerate(_parts(drawn(model, task))):
        path = RESULTS / f"{task}-{index}.safetensors"
        if path.exists():
            continue
        found: dict[str, torch.Tensor] = {}
        for names, by_position in ((BY_POSITION, True), (WHOLE, False)):
            options: dict[str, Any] = {"components": names, "by_position": by_position}
            made = {
                name: score_nodes(model, part, **given, **options)
                for name, given in ESTIMATES.items()
            }
            made["exact"] = score_nodes(
                model,
                part,
                method="exact",
                **options,
                only=None if by_position else [*sampled(made, index), *_heads(model)],
            )
            for name, scores in made.items():
                for component in names:
                    found[f"{name}/{component}"] = scores.of(component).contiguous()
            found["gap"] = (made["exact"].clean - made["exact"].corrupt).contiguous()
            print(task, index, names, "exact passes", made["exact"].passes.forward, flush=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole(path) as temporary:
            save_file(found, temporary)


def _heads(model: Any) -> list[Node]:
    return [
        Node(f"blocks.{layer}.attn.hook_z", head)
        for layer in range(model.cfg.n_layers)
        for head in range(model.cfg.n_heads)
    ]


def pearson(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.corrcoef(a, b)[0, 1])


def table() -> None:
    """Mean over pairs of the correlation over nodes, with bootstrap intervals over pairs; and the
    correlation of scores averaged over pairs, where a node is the same in all of them."""
    measures: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
        "Pearson": pearson,
        "Spearman": spearman,
    }
    for task in TEMPLATES:
        files = [load_file(path) for path in sorted(RESULTS.glob(f"{task}-*.safetensors"))]
        if not files:
            continue
        rows = []
        for component in (*BY_POSITION, *WHOLE):
            for name in ESTIMATES:
                values: dict[str, list[float]] = {measure: [] for measure in measures}
                for found in files:
                    exact = found[f"exact/{component}"].double().numpy()
                    estimate = found[f"{name}/{component}"].double().numpy()
                    for a, b in zip(estimate, exact, strict=True):
                        scored = ~np.isnan(b)
                        for measure, of in measures.items():
                            values[measure].append(of(a[scored], b[scored]))
                row: dict[str, Any] = {"component": component, "method": name}
                for measure, each in values.items():
                    mean, low, high = bootstrap(np.array(each), SEED)
                    row[measure] = f"{mean:.3f} ({low:.3f} to {high:.3f})"
                row["n"] = len(each)
                paper = {"RelP": 0, "gradient": 1}.get(name)
                known = component in PAPER and paper is not None and task == "indirect_object"
                row["paper, GPT-2"] = PAPER[component][paper] if known else ""
                rows.append(row)
        print(f"\n{task}")
        print(pd.DataFrame(rows).to_string(index=False))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["correlate", "table"])
    parser.add_argument("--tasks", nargs="+", default=list(TEMPLATES), choices=list(TEMPLATES))
    given = parser.parse_args()
    if given.what == "table":
        table()
        return
    torch.set_num_threads(1)
    model = lenslrp.load("smollm2-135m", dtype=torch.float32, device="cpu")
    for task in given.tasks:
        correlate(model, task)


if __name__ == "__main__":
    main()
