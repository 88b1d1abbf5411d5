"""Images of files for an evaluation: read, refused, named, through the model's own processor."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

import lenslrp
from lenslrp.analysis.evaluation.image_files import read_images
from lenslrp.cli import commands as cli
from lenslrp.errors import InputError
from tests.conformance import zoo

SIZE = 24


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, NDArray[np.uint8]]:
    """A tiny classifier with its processor, a folder of three images and a damaged one."""
    model, images = (tmp_path_factory.mktemp(name) for name in ("vit", "images"))
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        image_size=SIZE, patch_size=8, num_labels=3,
    )  # fmt: skip
    ViTForImageClassification(config).save_pretrained(model)
    ViTImageProcessor(size={"height": SIZE, "width": SIZE}).save_pretrained(model)
    pixels = np.random.default_rng(0).integers(0, 256, (3, 20, 30, 3), dtype=np.uint8)
    for k, one in enumerate(pixels):
        Image.fromarray(one).save(images / f"{k}.png")
    (images / "damaged.jpg").write_bytes(b"\xff\xd8 no more")
    (images / "notes.txt").write_text("no image")
    return model, images, pixels


def test_images_of_files_go_through_the_models_processor(
    photographs: tuple[Path, Path, NDArray[np.uint8]], tmp_path: Path
) -> None:
    place, folder, pixels = photographs
    model = lenslrp.load(str(place))
    np.savez(tmp_path / "some.npz", images=pixels)
    skipped: list[str] = []
    found = read_images(model, folder, skipped)
    assert list(found) == ["0.png", "1.png", "2.png"]
    assert len(skipped) == 1 and "damaged.jpg: no image" in skipped[0]
    process = ViTImageProcessor.from_pretrained(place)
    for k, one in enumerate(found.values()):
        expected = process(images=[pixels[k]], return_tensors="pt")["pixel_values"][0]
        assert torch.equal(one, expected)
    entries = [{"image": Image.fromarray(one)} for one in pixels]
    entries += [{"image": pixels[0].astype(float)}, {"image": pixels[0, 0]}, {"label": 1}]
    for source, wrong in ((tmp_path / "some.npz", 0), (entries, 3)):
        skipped = []
        same = read_images(model, source, skipped)
        assert len(skipped) == wrong
        assert all(map(torch.equal, same.values(), found.values()))
    for source in (None, 3, tmp_path / "none", folder / "0.png"):
        with pytest.raises(InputError, match=r"an \.npz file"):
            read_images(model, source, [])
    np.savez(tmp_path / "other.npz", labels=np.zeros(3))
    with pytest.raises(InputError, match="has no array of images"):
        read_images(model, tmp_path / "other.npz", [])
    narrow = read_images(lenslrp.load(str(place), dtype=torch.bfloat16), folder, [])
    assert all(one.dtype == torch.bfloat16 for one in narrow.values())
    nameless = zoo.build("ViTForImageClassification")
    with pytest.raises(InputError, match="no image processor"):
        read_images(nameless, folder, [])
    for processor in (process, SimpleNamespace(image_processor=process)):
        nameless.processor = processor
        assert list(read_images(nameless, folder, [])) == list(found)


def test_images_from_the_command_line(
    photographs: tuple[Path, Path, NDArray[np.uint8]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    place, folder, _ = photographs
    arguments = ["evaluate", "images", "--model", str(place), "--data", str(folder), "--n", "2"]
    arguments += ["--folder", str(tmp_path), "--steps", "2", "--device", "cpu"]
    arguments += ["--methods", "random", "attnlrp", "--perturb", "zero", "mean"]
    assert cli.main([*arguments, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["n"] == 2
    assert told["settings"]["methods"] == ["random", "attnlrp"]
    assert told["settings"]["perturbations"] == ["zero", "mean"]
    assert len(told["skipped"]) == 1 and "damaged.jpg" in told["skipped"][0]
