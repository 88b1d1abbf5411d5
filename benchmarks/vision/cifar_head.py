"""A head of ten classes for the embedded vision backbone, and how it was trained.

    from benchmarks.vision.cifar_head import classifier  # a bridge that names CIFAR-10's classes
    python -m benchmarks.vision.cifar_head --data task.json  # trains it anew

The head is 10 x 384 numbers and 10 biases on the class token, multinomial logistic regression on
features of images that ``cifar.py`` does not hold out. It lies beside this script (15 kB), because
training needs images of all ten classes, and tutorials should not. It holds none of the data.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm
from transformer_lens.model_bridge import TransformerBridge
from transformers import ViTForImageClassification

import lenslrp
from benchmarks.vision import cifar
from lenslrp.models.embedded import ensure_cached
from lenslrp.quiet import quiet_transformers

BACKBONE = "vit-s14-saliency"
HEAD = Path(__file__).with_name("cifar_head.safetensors")
RIDGE = 1e-2


def hugging_face_model(dtype: torch.dtype = torch.float32) -> ViTForImageClassification:
    """The backbone with the head of this directory, as a Hugging Face model on the CPU."""
    with quiet_transformers():
        model = ViTForImageClassification.from_pretrained(
            ensure_cached(BACKBONE),
            local_files_only=True,
            num_labels=len(cifar.NAMES),
            id2label=dict(enumerate(cifar.NAMES)),
            label2id={name: i for i, name in enumerate(cifar.NAMES)},
        )
    head = load_file(HEAD)
    model.classifier.load_state_dict(head)
    return model.to(dtype).eval()


def classifier(dtype: torch.dtype = torch.float32) -> TransformerBridge:
    """The same as a bridge, ready for ``run_with_relevance(model, pixel_values=...)``."""
    return lenslrp.load(hugging_face_model(dtype))


def summed_pixels(cache: lenslrp.RelevanceCache) -> torch.Tensor:
    """Relevance of each patch's pixels, summed: [batch, row, column]. Unlike ``cache.patches`` it
    has been through the patch convolution and its rule."""
    assert cache.patches is not None and cache.pixels is not None
    rows, columns = cache.patches.shape[1:]
    batch, channels, height, width = cache.pixels.shape
    tiles = cache.pixels.reshape(batch, channels, rows, height // rows, columns, width // columns)
    return tiles.sum(dim=(1, 3, 5))


def features(model: ViTForImageClassification, images: cifar.Images, batch: int) -> torch.Tensor:
    """The class token after the last norm, [n, d_model]."""
    collected = []
    with torch.inference_mode():
        for start in tqdm(range(0, len(images), batch), desc="features", unit="batch"):
            pixels = cifar.prepare(images.pixels[start : start + batch])
            collected.append(model.vit(pixel_values=pixels).last_hidden_state[:, 0])
    return torch.cat(collected)


def train(x: torch.Tensor, labels: torch.Tensor) -> torch.nn.Linear:
    """Logistic regression with a quadratic penalty on standardised features, to convergence."""
    mean, std = x.mean(0), x.std(0) + 1e-6
    inner = torch.nn.Linear(x.shape[1], len(cifar.NAMES))
    torch.nn.init.zeros_(inner.weight)
    torch.nn.init.zeros_(inner.bias)
    optimizer = torch.optim.LBFGS(inner.parameters(), max_iter=300, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = torch.nn.functional.cross_entropy(inner((x - mean) / std), labels)
        value = value + RIDGE / 2 * inner.weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    head = torch.nn.Linear(x.shape[1], len(cifar.NAMES))
    with torch.no_grad():  # the standardisation becomes part of the head
        head.weight.copy_(inner.weight / std)
        head.bias.copy_(inner.bias - inner.weight @ (mean / std))
    return head


def main() -> None:
    """Train on one side of the split, test on the other, write the head."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="images of all ten classes")
    parser.add_argument("--per-class", type=int, default=150, help="images to train on")
    parser.add_argument("--test", type=int, default=30, help="held-out images of each class")
    parser.add_argument("--batch", type=int, default=20)
    options = parser.parse_args()
    images = cifar.read(options.data)
    train_set = cifar.split(images, held_out=False, per_class=options.per_class)
    test_set = cifar.split(images, held_out=True, per_class=options.test)
    if len(set(train_set.labels.tolist())) < len(cifar.NAMES):
        raise SystemExit(f"{options.data} does not have all ten classes")
    with quiet_transformers():
        model = ViTForImageClassification.from_pretrained(
            ensure_cached(BACKBONE), local_files_only=True, num_labels=len(cifar.NAMES)
        ).eval()
    x, held_out = (features(model, part, options.batch) for part in (train_set, test_set))
    head = train(x, torch.from_numpy(train_set.labels))
    for name, part, given in (("training", train_set, x), ("held-out", test_set, held_out)):
        with torch.no_grad():
            right = head(given).argmax(1) == torch.from_numpy(part.labels)
        print(f"{name} accuracy {right.float().mean():.3f} (n = {len(part)})")
    save_file({k: v.contiguous() for k, v in head.state_dict().items()}, HEAD)
    print(f"wrote {HEAD.name}")


if __name__ == "__main__":
    main()
