"""Pictures as PIL images and files: what the model's own processor makes of them is explained."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from PIL import Image

import lenslrp
from lenslrp.analysis import as_prompt, attribute
from lenslrp.pictures import pixels_of
from tests.conformance import zoo

SIZE = {"height": zoo.IMAGE["image_size"], "width": zoo.IMAGE["image_size"]}


def picture(seed: int = 0, mode: str = "RGB") -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    return Image.fromarray(values).convert(mode)


@pytest.fixture(scope="module")
def model() -> Any:
    bridge = zoo.build("ViTForImageClassification")
    bridge.processor = hf.ViTImageProcessorPil(size=SIZE)
    return bridge


def explain(model: Any, pictures: Any) -> Any:
    return lenslrp.run_with_relevance(model, pixel_values=pictures, target=1, names_filter=[])[1]


def test_a_picture_is_what_the_processor_makes_of_it(model: Any, tmp_path: Path) -> None:
    made = model.processor(images=[picture(0), picture(1)], return_tensors="pt")["pixel_values"]
    expected = explain(model, made.double())
    path = tmp_path / "cat.png"
    picture(1).save(path)
    several = explain(model, [picture(0), path])
    torch.testing.assert_close(several.pixels, expected.pixels)
    for one in (picture(1), path, str(path), [str(path)]):
        torch.testing.assert_close(explain(model, one).pixels[0], expected.pixels[1])
    targets = lenslrp.relevance_for_targets(model, targets=[0, 1], pixel_values=picture(1))
    torch.testing.assert_close(targets[1].pixels[0], expected.pixels[1])
    with lenslrp.session(model) as session:
        _, R = session.run_with_relevance(target=1, pixel_values=path)
        torch.testing.assert_close(R.pixels[0], expected.pixels[1])


def test_baselines_take_pictures_too(model: Any) -> None:
    made = pixels_of(model, picture(1))
    expected = attribute("occlusion", model, target=1, pixel_values=made).tokens
    found = attribute("occlusion", model, target=1, pixel_values=picture(1)).tokens
    torch.testing.assert_close(found, expected)
    prompt = as_prompt(model, target=1, pixel_values=picture(1))
    assert prompt.pixels is not None
    torch.testing.assert_close(prompt.pixels, made[0])
    with pytest.raises(lenslrp.InputError, match="LlamaForCausalLM takes no pixel_values; it"):
        as_prompt(zoo.build("LlamaForCausalLM"), target=1, pixel_values=picture(1))


def test_files_are_turned_and_coloured_as_they_are_shown(model: Any, tmp_path: Path) -> None:
    path, turned = tmp_path / "turned.jpg", Image.Exif()
    turned[0x0112] = 6  # shown after a quarter of a turn
    picture().save(path, exif=turned, quality=100)
    shown = Image.open(path).transpose(Image.Transpose.ROTATE_270)
    torch.testing.assert_close(pixels_of(model, path), pixels_of(model, shown))
    grey = pixels_of(model, picture(mode="L"))
    assert grey.shape == (1, 3, SIZE["height"], SIZE["width"]) and grey.dtype == torch.float64
    assert torch.equal(grey[:, 0], grey[:, 1])


def test_of_a_pair_the_image_processor_is_used() -> None:
    config = hf.CLIPConfig(
        text_config={**zoo.SIZES, "vocab_size": 30, "eos_token_id": 2, "bos_token_id": 1},
        vision_config=zoo.IMAGE,
    )
    pair = lenslrp.load(hf.CLIPModel(config).eval())

    class Both:
        image_processor = hf.CLIPImageProcessorPil(size=SIZE, crop_size=SIZE)

    pair.processor = Both()
    _, R = lenslrp.run_with_relevance(pair, torch.tensor([[5, 6, 2]]), pixel_values=picture())
    assert R.patches is not None and R.tokens.shape == (1, 3)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("missing.png", r"missing\.png cannot be read as an image"),
        (3, "the path of an image file or a list of these, not int"),
        ([], "empty list"),
        ([picture(), None], "not NoneType"),
    ],
)
def test_what_is_no_picture(model: Any, given: Any, message: str) -> None:
    with pytest.raises(lenslrp.InputError, match=message):
        explain(model, given)


def test_a_file_that_is_no_image(model: Any, tmp_path: Path) -> None:
    path = tmp_path / "notes.png"
    path.write_text("no image")
    with pytest.raises(lenslrp.InputError, match="cannot be read as an image"):
        explain(model, path)


def test_a_model_without_a_processor() -> None:
    with pytest.raises(lenslrp.InputError, match="set model.processor"):
        explain(zoo.build("ViTForImageClassification"), picture())


def test_a_model_that_reads_no_images() -> None:
    with pytest.raises(lenslrp.InputError, match="takes no pixel_values; it takes input_ids"):
        explain(zoo.build("GPT2LMHeadModel"), picture())


def test_a_processor_that_makes_more_than_pixels(model: Any) -> None:
    class More:
        def __call__(self, images: Any, return_tensors: str) -> dict[str, Any]:
            return {"pixel_values": torch.zeros(1, 3, 8, 8), "image_sizes": torch.ones(1, 2)}

    own, model.processor = model.processor, More()
    with pytest.raises(lenslrp.InputError, match="makes pixel_values, image_sizes of a picture"):
        explain(model, picture())
    model.processor = own


def test_pillow_is_asked_for(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(lenslrp.MissingExtraError, match=r"pip install 'lenslrp\[images\]'"):
        explain(model, "cat.png")


def test_images_have_the_composite_for_vision_transformers_by_default(model: Any) -> None:
    R = explain(model, picture())
    assert R.composite.name == lenslrp.AttnLRPViT().name == "AttnLRP-ViT"
    assert "AttnLRP-ViT" in repr(R)
    _, named = lenslrp.run_with_relevance(
        model, pixel_values=picture(), target=1, composite=lenslrp.AttnLRPViT()
    )
    torch.testing.assert_close(R.pixels, named.pixels)
    assert lenslrp.examine(model).ok
    with lenslrp.session(model) as session:
        assert session.composite == lenslrp.AttnLRPViT()
    with lenslrp.session(zoo.build("GPT2LMHeadModel")) as session:
        assert session.composite == lenslrp.AttnLRP()
