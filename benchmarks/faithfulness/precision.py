"""Does it matter that relevance is computed in bfloat16? docs/reference/results/precision.json.

    python -m benchmarks.faithfulness.precision --images task.json [--count 24]

For held-out images (see `cifar.py`) and a few methods: the area between the curves of relevance in
float32 and in bfloat16, over the same perturbed passes (bfloat16, 6 steps), and their correlation.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from benchmarks import ROOT
from benchmarks.faithfulness.examples import keep, spread
from benchmarks.vision import cifar
from benchmarks.vision.cifar_head import classifier
from lenslrp.analysis.attribution.methods import attribute
from lenslrp.analysis.evaluation.faithfulness import curves
from lenslrp.analysis.evaluation.model_features import patches_of
from lenslrp.analysis.passes.prompts import as_prompt

METHODS = ("attnlrp", "attnlrp_gamma", "cp_lrp", "gim", "gradient_x_input")
STEPS, SEED = 6, 0


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", type=Path, required=True, help="CIFAR-10, see cifar.py")
    parser.add_argument("--count", type=int, default=24)
    options = parser.parse_args()
    models = {dtype: classifier(dtype) for dtype in (torch.float32, torch.bfloat16)}
    held_out = cifar.split(cifar.read(options.images), held_out=True, per_class=30)
    areas: dict[tuple[str, torch.dtype], list[float]] = {}
    alike: dict[str, list[float]] = {}
    for image in tqdm(cifar.prepare(held_out.pixels)[: options.count]):
        low = models[torch.bfloat16]
        prompt = as_prompt(low, pixel_values=image[None].bfloat16())
        relevances = {
            (name, dtype): attribute(
                name, model, target=prompt.target, pixel_values=image[None].to(dtype)
            ).tokens[0].double().numpy()
            for name in METHODS
            for dtype, model in models.items()
        }  # fmt: skip
        keyed = {f"{name} {dtype}": values for (name, dtype), values in relevances.items()}
        drawn = curves(patches_of(low, prompt), keyed, steps=STEPS)
        for (name, dtype), curve in zip(relevances, drawn.values(), strict=True):
            areas.setdefault((name, dtype), []).append(curve.area)
        for name in METHODS:
            pair = [relevances[name, dtype] for dtype in models]
            alike.setdefault(name, []).append(float(np.corrcoef(*pair)[0, 1]))
    rows = []
    for name in METHODS:
        wide, narrow = (np.array(areas[name, dtype]) for dtype in models)
        rows.append({
            "method": name, "n": len(wide), **spread(narrow, SEED, "bfloat16_"),
            **spread(wide - narrow, SEED, "float32_less_this_"),
            "correlation_lowest": min(alike[name]),
        })  # fmt: skip
    keep(ROOT / "docs/reference/results/precision.json", "images", rows,
         "precision --images FILE", steps=STEPS, baseline="zero", seed=SEED)  # fmt: skip


if __name__ == "__main__":
    main()
