"""Six photographs explained: does relevance lie on what the head names?

    pip install scikit-image
    python -m benchmarks.vision.photographs --out photographs.png

The photographs are those that scikit-image's wheel holds, cropped to squares; nothing is
downloaded. The head of `cifar_head.py` was trained on pictures of 32 pixels, and a sharp photograph
is another kind of input (it takes the cat for a bird), so they are reduced to 48 pixels before they
are enlarged to the model's 224. It knows ten classes, and three of the six photographs have none of
them (rocket, astronaut, cup): what it says of these is shown all the same. Each row of the figure:
the photograph, then the relevance of each patch's pixels for the predicted class under the gamma
composite, the epsilon rule alone, CP-LRP and Gradient x Input, each with a colour scale of its own,
symmetric around 0.

In a notebook: ``for name, image in photographs().items(): explain(model, image)``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from transformer_lens.model_bridge import TransformerBridge

import lenslrp
from benchmarks.vision import cifar
from benchmarks.vision.cifar_head import classifier, summed_pixels
from lenslrp.hooks import Composite

SEEN = 48  # pixels

# name -> its square crop: top, left, side, in pixels of the stored picture
CROPS = {
    "chelsea": (0, 75, 300),  # a cat's head
    "rocket": (0, 150, 427),  # a rocket on its pad
    "motorcycle_left": (0, 120, 500),  # a motorcycle in a garage
    "horse": (0, 36, 328),  # a black silhouette of a horse
    "astronaut": (0, 0, 512),  # a portrait, with a model of a shuttle
    "coffee": (0, 100, 400),  # a cup
}


def photographs(size: int = SEEN) -> dict[str, NDArray[np.uint8]]:
    """Name -> picture [size, size, 3], from scikit-image's own folder.

    Raises:
        SystemExit: scikit-image is not installed.
    """
    try:
        import skimage
    except ModuleNotFoundError as error:
        raise SystemExit("the photographs come with scikit-image: pip install it") from error
    from PIL import Image

    folder = Path(skimage.__file__).parent / "data"
    pictures = {}
    for name, (top, left, side) in CROPS.items():
        (path,) = folder.glob(f"{name}.*")
        with Image.open(path) as stored:
            square = stored.convert("RGB").crop((left, top, left + side, top + side))
        small = square.resize((size, size), Image.Resampling.LANCZOS)
        pictures[name] = np.asarray(small)
    return pictures


def explain(
    model: TransformerBridge,
    picture: NDArray[np.uint8],
    target: str | int | None = None,
    composite: Composite | None = None,
) -> tuple[torch.Tensor, lenslrp.RelevanceCache]:
    """Logits [1, class] and relevance for one picture, under the gamma composite by default."""
    return lenslrp.run_with_relevance(
        model,
        pixel_values=cifar.prepare(picture[None]),
        target=target,
        composite=composite or lenslrp.AttnLRPViT(),
        names_filter=[],
    )


def draw(model: TransformerBridge, path: Path) -> None:
    """The figure of all photographs, and a line of text for each."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    composites = (
        lenslrp.AttnLRPViT(),
        lenslrp.AttnLRP(),
        lenslrp.CPLRP(),
        lenslrp.GradientTimesInput(),
    )
    pictures, sharp = photographs(), photographs(cifar.SIZE)
    figure = Figure(figsize=(13, 2.7 * len(pictures)), layout="constrained")
    grid = figure.subplots(len(pictures), 1 + len(composites))
    for row, (name, picture) in zip(grid, pictures.items(), strict=True):
        row[0].imshow(sharp[name])
        for axes, composite in zip(row[1:], composites, strict=True):
            logits, relevance = explain(model, picture, composite=composite)
            values = summed_pixels(relevance)[0].numpy()
            limit = np.abs(values).max()
            axes.imshow(sharp[name].mean(axis=-1), cmap="gray", vmin=-150, extent=(0, 16, 16, 0))
            strength = 0.1 + 0.8 * np.abs(values) / limit
            axes.imshow(
                values,
                cmap=colormaps["RdBu_r"],
                vmin=-limit,
                vmax=limit,
                alpha=strength,
                extent=(0, 16, 16, 0),
            )
            axes.set_title(f"{composite.name}, max {limit:.2g}", fontsize=9)
        chances = logits[0].softmax(0)
        best = chances.topk(3)
        said = [
            f"{cifar.NAMES[i]} {p:.0%}"
            for p, i in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ]
        row[0].set_title(f"{name}: {said[0]}", fontsize=9)
        print(f"{name}: {', '.join(said)}; logit {logits[0].max():.2f}")
        for axes in row:
            axes.set_xticks([])
            axes.set_yticks([])
    figure.savefig(path, dpi=80)
    print(f"wrote {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("photographs.png"))
    options = parser.parse_args()
    draw(classifier(), options.out)


if __name__ == "__main__":
    main()
