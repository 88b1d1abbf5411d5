"""The vision backbone with its CIFAR-10 head: it knows airplanes, and its relevance adds up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import lenslrp
from benchmarks.vision import cifar, cifar_head

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def model() -> Any:
    return cifar_head.classifier()


def test_most_held_out_airplanes_are_known(model: Any, shared_data: Path) -> None:
    """By chance it would be two of the twenty; that file has no other class."""
    images = cifar.read(shared_data / "cifar10_subset.npz")
    airplanes = cifar.split(images, held_out=True, per_class=20)
    with torch.no_grad():
        predicted = model(cifar.prepare(airplanes.pixels)).argmax(-1)
    assert len(predicted) == 20
    assert (predicted == 0).sum() > 10, predicted.tolist()


@pytest.mark.parametrize(
    "composite", [lenslrp.AttnLRPViT(), lenslrp.AttnLRP(), lenslrp.CPLRP()], ids=lambda c: c.name
)
def test_the_ledger_balances_and_classes_are_targets_by_name(model: Any, composite: Any) -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (1, 4, 4, 3), dtype=np.uint8)  # coloured squares, no photograph
    logits, cache = lenslrp.run_with_relevance(
        model,
        pixel_values=cifar.prepare(pixels),
        target="ship",
        composite=composite,
        names_filter=[],
    )
    assert cache.target.value.item() == logits[0, cifar.NAMES.index("ship")]
    assert cache.patches is not None and cache.patches.shape == (1, 16, 16)
    assert cache.pixels is not None and cache.pixels.shape == (1, 3, 224, 224)
    assert abs(cache.ledger().error) < 1e-4
    sums = cifar_head.summed_pixels(cache)
    corner = cache.pixels[0, :, 14:28, 28:42].sum()
    torch.testing.assert_close(sums[0, 1, 2], corner, rtol=1e-4, atol=1e-6)
