"""Faithfulness of patch relevance: a ViT's patches flipped in the order of their relevance.

    python -m benchmarks.vision.patch_flipping --data task.json [--baseline zero] [--dtype bfloat16]

The embedded backbone with the CIFAR-10 head of `cifar_head.py`, on held-out CIFAR-10 images at 224
pixels (16 x 16 patches of 14 pixels). For each image and method: the relevance of every patch for
the logit of the predicted class, and that logit while patches are set to the baseline, the most
relevant first (MoRF) and the least relevant first (LeRF), in equal steps. Score: the area between
the two curves, in logits, over the share of patches flipped (the trapezoid rule); higher is better.
Protocol of Achtibat et al. 2024 (section 4.1), whose images, model and so areas are others.

A patch's relevance is read twice: at its embedding ("patches"), and as the sum over its pixels
("pixels"), where the patch convolution's rule counts too. `--baseline zero`: ImageNet's mean colour
(0 after normalisation); `mean`: the image's own mean colour; `blur`: the image under a box of 63
pixels. `--dtype` is the type of the flipped passes only; relevance is always computed in float32.
Random is one order an image. Results go to a file as they are made, and are not made again.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm
from transformers import ViTForImageClassification

import lenslrp
from benchmarks import RESULTS
from benchmarks.vision import cifar
from benchmarks.vision.cifar_head import classifier, hugging_face_model, summed_pixels
from lenslrp.analysis.common import statistics
from lenslrp.analysis.common.journal import resumed
from lenslrp.analysis.common.statistics import RESAMPLES, interval
from lenslrp.hooks import Composite, Gamma

METHODS: dict[str, Callable[[], Composite]] = {
    "gamma": lenslrp.AttnLRPViT,
    "epsilon": lenslrp.AttnLRP,
    "CP-LRP": lenslrp.CPLRP,
    "Gradient x Input": lenslrp.GradientTimesInput,
}
# not in the main table: where the difference comes from
VARIANTS: dict[str, Callable[[], Composite]] = {
    "gamma on the convolution only": lambda: Composite("a", {"convolution": Gamma(0.25)}),
    "gamma on linear layers only": lambda: Composite("b", {"linear": Gamma(0.05)}),
    "gamma 0.25 on both": lambda: Composite(
        "c", {"linear": Gamma(0.25), "convolution": Gamma(0.25)}
    ),
    "CP-LRP with gamma": lambda: Composite(
        "d", {**lenslrp.AttnLRPViT().rules, "attention_av": lenslrp.CPLRP()["attention_av"]}
    ),
}
RANDOM = "random"
READS = ("patches", "pixels")
BOX = 63


def zero(image: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(image)


def mean(image: torch.Tensor) -> torch.Tensor:
    return image.mean(dim=(-2, -1), keepdim=True).expand_as(image)


def blur(image: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.avg_pool2d(image, BOX, 1, BOX // 2, count_include_pad=False)


BASELINES = {"zero": zero, "mean": mean, "blur": blur}


def relevance_maps(
    model: Any, image: torch.Tensor, target: int, methods: dict[str, Callable[[], Composite]]
) -> dict[str, dict[str, NDArray[np.float64]]]:
    """Method -> where it was read -> relevance [row, column], in logits."""
    maps = {}
    for name, composite in methods.items():
        _, cache = lenslrp.run_with_relevance(
            model,
            pixel_values=image,
            target=target,
            composite=composite(),
            names_filter=[],
            ledger=False,
        )
        assert cache.patches is not None
        maps[name] = {
            "patches": cache.patches[0].double().numpy(),
            "pixels": summed_pixels(cache)[0].double().numpy(),
        }
    return maps


def flipped(
    image: torch.Tensor, baseline: torch.Tensor, order: NDArray[np.int64], counts: list[int]
) -> torch.Tensor:
    """The image with the first ``count`` patches of ``order`` set to the baseline, for each count:
    [count, channel, height, width]."""
    side = int(len(order) ** 0.5)
    width = image.shape[-1] // side
    steps = []
    for count in counts:
        mask = torch.zeros(len(order), dtype=torch.bool)
        mask[torch.from_numpy(order[:count].copy())] = True
        large = mask.view(side, side).repeat_interleave(width, 0).repeat_interleave(width, 1)
        steps.append(torch.where(large, baseline[0], image[0]))
    return torch.stack(steps)


def logits_of(
    model: ViTForImageClassification, images: torch.Tensor, target: int, batch: int
) -> list[float]:
    """The target's logit for each image."""
    logits: list[float] = []
    with torch.inference_mode():
        for part in images.to(model.dtype).split(batch):
            logits += model(pixel_values=part).logits[:, target].float().tolist()
    return logits


def curves(
    model: ViTForImageClassification,
    image: torch.Tensor,
    baseline: torch.Tensor,
    maps: dict[str, NDArray[np.float64]],
    target: int,
    steps: int,
    batch: int,
) -> dict[str, list[list[float]]]:
    """Method -> [MoRF, LeRF], each the target's logit at 0, 1/steps, ..., 1 of the patches."""
    orders = {name: np.argsort(-m.ravel(), kind="stable") for name, m in maps.items()}
    size = len(next(iter(orders.values())))
    counts = [round(size * k / steps) for k in range(1, steps)]
    ways = [(name, order[::way]) for name, order in orders.items() for way in (1, -1)]
    images = [flipped(image, baseline, order, counts) for _, order in ways]
    ends = torch.cat([image, baseline])
    values = logits_of(model, torch.cat([ends, *images]), target, batch)
    start, end, inner = values[0], values[1], np.array(values[2:]).reshape(len(ways), -1)
    result: dict[str, list[list[float]]] = {name: [] for name in orders}
    for (name, _), row in zip(ways, inner, strict=True):
        result[name].append([start, *row.tolist(), end])
    return result


def area(pair: list[list[float]]) -> float:
    """Between LeRF and MoRF, in logits, over the share of patches flipped."""
    morf, lerf = (np.array(curve) for curve in pair)
    return statistics.area(lerf - morf)


def measure(options: argparse.Namespace, images: cifar.Images) -> list[dict[str, Any]]:
    """One row an image: label, prediction, curves by method."""
    methods = METHODS | (VARIANTS if options.variants else {})
    settings = {
        "baseline": options.baseline,
        "steps": options.steps,
        "dtype": options.dtype,
        "seed": options.seed,
        "methods": list(methods),
    }
    kind = options.baseline + ("_variants" if options.variants else "")
    path = options.results or RESULTS / f"patch_flipping_{kind}.jsonl"
    rows = []
    with resumed(path, settings) as (done, append):
        known = {row["image"]: row for row in done}
        bridge = fast = None
        for index in tqdm(range(len(images)), desc="images", unit="image"):
            name = cifar.name_of(images.pixels[index])
            if name not in known:
                bridge = bridge or classifier()
                fast = fast or hugging_face_model(getattr(torch, options.dtype))
                image = cifar.prepare(images.pixels[index : index + 1])
                with torch.no_grad():
                    target = int(bridge(image).argmax())
                maps = {
                    f"{method}, {read}": values
                    for method, reads in relevance_maps(bridge, image, target, methods).items()
                    for read, values in reads.items()
                }
                rng = np.random.default_rng([options.seed, int(name, 16)])
                maps[RANDOM] = rng.random((16, 16))
                baseline = BASELINES[options.baseline](image)
                drawn = curves(fast, image, baseline, maps, target, options.steps, options.batch)
                known[name] = {
                    "image": name,
                    "label": int(images.labels[index]),
                    "predicted": target,
                    "curves": drawn,
                }
                append(known[name])
            rows.append(known[name])
    return rows


def print_tables(rows: list[dict[str, Any]], seed: int) -> None:
    """Areas with intervals, paired differences, mean curves."""
    names = list(rows[0]["curves"])
    areas = {name: np.array([area(row["curves"][name]) for row in rows]) for name in names}
    for read in READS:
        ours = {method: areas[f"{method}, {read}"] for method in ("gamma", "epsilon")}
        print(f"| read at {read} | area | gamma's lead | epsilon's lead |\n|---|---|---|---|")
        for name in (n for n in names if n.endswith(read) or n == RANDOM):
            leads = [
                "-" if values is areas[name] else interval(values - areas[name], seed, "+")
                for values in ours.values()
            ]
            label = name.removesuffix(f", {read}")
            print(f"| {label} | {interval(areas[name], seed)} | " + " | ".join(leads) + " |")
        print()
    shares = np.linspace(0, 1, len(rows[0]["curves"][RANDOM][0]))
    print("| mean logit at | " + " | ".join(f"{share:.0%}" for share in shares) + " |")
    print("|---|" + "---|" * len(shares))
    for name in names:
        both = np.array([row["curves"][name] for row in rows]).mean(axis=0)
        for label, curve in zip(("MoRF", "LeRF"), both, strict=True):
            print(f"| {name}, {label} | " + " | ".join(f"{v:.2f}" for v in curve) + " |")


def main() -> None:
    """Explain, flip, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, default=cifar.SUBSET, help="see cifar.py")
    parser.add_argument("--count", type=int, default=300, help="images, the same of each class")
    parser.add_argument("--steps", type=int, default=6, help="equal steps from none to all patches")
    parser.add_argument("--baseline", choices=BASELINES, default="zero")
    parser.add_argument("--variants", action="store_true", help="also other values of gamma")
    parser.add_argument("--dtype", default="float32", help="of the flipped passes")
    parser.add_argument("--batch", type=int, default=20)
    parser.add_argument("--results", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if not options.data.exists():
        parser.error(f"{options.data} does not exist; give --data")
    images = cifar.read(options.data)
    classes = len(set(images.labels.tolist()))
    held_out = cifar.split(images, held_out=True, per_class=options.count // classes)
    rows = measure(options, held_out)
    right = np.mean([row["label"] == row["predicted"] for row in rows])
    print(
        f"{len(rows)} held-out images of {classes} class(es), {right:.0%} classified correctly; "
        f"baseline {options.baseline}, {options.steps} steps, flipped passes in {options.dtype}; "
        f"95% bootstrap intervals, {RESAMPLES} resamples, seed {options.seed}\n"
    )
    print_tables(rows, options.seed)


if __name__ == "__main__":
    main()
