"""CIFAR-10 as the vision benchmarks read it: images of a file that you have, split by content.

Nothing is downloaded here and nothing of the data is kept in the repository. Read are

* ``*.npz`` with ``images`` [n, 32, 32, 3], ``labels`` [n] and ``names`` [10];
* ``*.bin``, a batch of CIFAR-10's own binary version (a label's byte, then 3,072 bytes an image);
* BIG-bench's ``cifar10_classification/base64/task.json`` (all 10,000 test images).

An image is held out, or is for training the head of ``cifar_head.py``, by the SHA-256 of its
pixels: the same in every file that has it, whatever the order.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks import DATA
from lenslrp.models.onnx_weights import IMAGENET_MEAN, IMAGENET_STD

NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SUBSET = DATA / "cifar10_subset.npz"
SIZE = 224
HELD_OUT = 0.35  # of all images


@dataclass(frozen=True)
class Images:
    """Images [n, height, width, 3] of bytes, and their classes as indices into NAMES."""

    pixels: NDArray[np.uint8]
    labels: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, index: NDArray[np.int64]) -> Images:
        return Images(self.pixels[index], self.labels[index])


def read(path: Path) -> Images:
    """All images of a file, in the order of their hashes."""
    readers = {".npz": _read_npz, ".bin": _read_binary, ".json": _read_bigbench}
    if path.suffix not in readers:
        raise SystemExit(f"{path}: give one of {', '.join(readers)}")
    images = readers[path.suffix](path)
    return images.take(np.argsort(_positions(images), kind="stable"))


def split(images: Images, *, held_out: bool, per_class: int) -> Images:
    """Up to ``per_class`` images of each class, from one side of the split."""
    side = (_positions(images) < HELD_OUT) == held_out
    chosen = [np.flatnonzero(side & (images.labels == c))[:per_class] for c in range(len(NAMES))]
    return images.take(np.sort(np.concatenate(chosen)))


def prepare(pixels: NDArray[np.uint8]) -> torch.Tensor:
    """What the backbone takes, [n, 3, 224, 224]: resized (bicubic), then ImageNet's mean and
    deviation, so that 0 is ImageNet's mean colour."""
    scaled = torch.from_numpy(pixels.copy()).permute(0, 3, 1, 2).float() / 255
    large = torch.nn.functional.interpolate(
        scaled, size=(SIZE, SIZE), mode="bicubic", align_corners=False, antialias=True
    ).clamp(0, 1)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    return (large - mean) / std


def name_of(pixels: NDArray[np.uint8]) -> str:
    """What an image is known by: 16 hexadecimal digits of the SHA-256 of its bytes."""
    return hashlib.sha256(pixels.tobytes()).hexdigest()[:16]


def _positions(images: Images) -> NDArray[np.float64]:
    """A number in [0, 1) for each image, from the hash of its pixels."""
    return np.array([int(name_of(image), 16) / 2**64 for image in images.pixels])


def _read_npz(path: Path) -> Images:
    with np.load(path, allow_pickle=False) as stored:
        names = [str(name) for name in stored["names"]]
        index = np.array([NAMES.index(name) for name in names])
        return Images(stored["images"], index[stored["labels"]])


def _read_binary(path: Path) -> Images:
    rows = np.frombuffer(path.read_bytes(), np.uint8).reshape(-1, 1 + 3 * 32 * 32)
    pixels = rows[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return Images(np.ascontiguousarray(pixels), rows[:, 0].astype(np.int64))


def _read_bigbench(path: Path) -> Images:
    from PIL import Image

    examples = json.loads(path.read_text(encoding="utf-8"))["examples"]
    pixels = [
        np.asarray(Image.open(io.BytesIO(base64.b64decode(e["input"]))).convert("RGB"))
        for e in examples
    ]
    labels = [NAMES.index(max(e["target_scores"], key=e["target_scores"].get)) for e in examples]
    return Images(np.stack(pixels), np.array(labels))
