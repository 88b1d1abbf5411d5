"""Pictures of an explained image: what is drawn, what is said beside it, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.text import Text

import lenslrp
from lenslrp import media
from lenslrp.analysis.views.drawing import DARK
from lenslrp.analysis.views.images import as_picture, elsewhere
from lenslrp.analysis.views.report import write_report
from tests.conformance import zoo

PHOTO = np.arange(8 * 8 * 3, dtype=np.uint8).reshape(8, 8, 3)


def explained(name: str = "ViTForImageClassification", **options: Any) -> Any:
    model = zoo.build(name)
    given = {**media.example(model, batch=2), **options}
    return lenslrp.run_with_relevance(model, target=1, **given)[1]


def drawn(figure: Any) -> list[Any]:
    """The relevance maps of a figure, panel by panel: the last image of each with a legend."""
    return [axes.images[-1] for axes in figure.axes if axes.images]


@pytest.mark.parametrize("image", [None, PHOTO])
def test_patches_and_pixels_are_drawn_with_symmetric_scales(image: Any) -> None:
    R = explained()
    figure = R.plot("image", row=1, image=image)
    patches, pixels = drawn(figure)[:2]
    np.testing.assert_allclose(np.asarray(patches.get_array()), R.patches[1].numpy())
    np.testing.assert_allclose(np.asarray(pixels.get_array()), R.pixels[1].sum(dim=0).numpy())
    for panel in (patches, pixels):
        low, high = panel.get_clim()
        assert low == -high < 0
    assert patches.get_clim()[1] == pytest.approx(float(R.patches[1].abs().max()))
    titles = [axes.get_title(loc="left") for axes in figure.axes[:2]]
    assert titles[0].startswith("patches: largest ")
    assert "full colour from" in titles[1]
    assert "class" not in figure.get_suptitle()
    assert "LABEL_1" in figure.get_suptitle()
    assert len(figure.axes[0].images) == (1 if image is None else 2)
    figure.draw_without_rendering()
    panels, legends = figure.axes[:2], figure.axes[2:]
    for panel, legend in zip(panels, legends, strict=True):  # as high as the image
        assert legend.get_position().height == pytest.approx(panel.get_position().height, rel=0.02)
    assert figure._repr_png_().startswith(b"\x89PNG")


def test_what_lies_outside_the_image_is_said() -> None:
    R = explained()
    text = elsewhere(R)
    share = abs(float(R.special[0, 0])) / float(R.tokens[0].abs().sum())
    assert f"[CLS] {float(R.special[0, 0]):+.3g} ({share:.0%} of all |relevance|)" in text
    assert f"learned positions {float(R.positions[0].sum()):+.3g}" in text
    for of in ("patches", ("patches", "pixels")):
        figure = R.plot("image", of=of)
        assert figure.get_supxlabel().replace("\n", " ") == text
        figure.draw_without_rendering()
        (label,) = [t for t in figure.findobj(Text) if t.get_text() == figure.get_supxlabel()]
        assert label.get_window_extent().x1 < figure.bbox.x1
    assert "[DIST]" in elsewhere(explained("DeiTForImageClassification"))


def test_one_panel_and_the_dark_theme() -> None:
    R = explained(leaves="patches")
    assert len(drawn(R.plot("image", theme=DARK))) == 1
    with pytest.raises(lenslrp.InputError, match=r"no relevance of 'pixels' .*it has patches"):
        R.plot("image", of="pixels")


def test_a_spectrogram_is_drawn_by_frequency_and_frame() -> None:
    R = explained("ASTForAudioClassification")
    patches, values = drawn(R.plot("image"))
    assert np.asarray(patches.get_array()).shape == tuple(R.patches.shape[1:])
    assert np.asarray(values.get_array()).shape == (8, 12)


def test_a_waveform_and_a_text_have_no_image() -> None:
    R = explained("HubertForCTC")
    assert R.grid is None
    with pytest.raises(lenslrp.InputError, match="it explains no image"):
        R.plot("image")
    assert len(drawn(R.plot("residual"))) == 1


def test_a_row_that_does_not_exist_is_refused() -> None:
    with pytest.raises(lenslrp.InputError, match="row is 2, but R holds 2 rows"):
        explained().plot("image", row=2)


@pytest.mark.parametrize(
    "image",
    [
        PHOTO,
        PHOTO / 255,
        torch.as_tensor(PHOTO).permute(2, 0, 1),
        torch.as_tensor(PHOTO).permute(2, 0, 1) / 255,
        PHOTO.mean(axis=2),
        np.concatenate([PHOTO, PHOTO[..., :1]], axis=2)[..., :3],
    ],
)
def test_every_form_of_an_image_is_the_same_picture(image: Any) -> None:
    grey = as_picture(image)
    assert grey.shape == (8, 8)
    np.testing.assert_allclose(grey, PHOTO.mean(axis=2) / 255, atol=1e-6)


def test_a_normalised_image_is_scaled_by_its_own_range_and_nonsense_is_refused() -> None:
    grey = as_picture(torch.linspace(-1, 1, 3 * 4 * 4).view(3, 4, 4))
    assert grey.min() == 0
    assert grey.max() == 1
    with pytest.raises(lenslrp.InputError, match=r"image must be .* not \[2, 3, 4, 5\]"):
        as_picture(np.zeros((2, 3, 4, 5)))


def test_in_jupyter_patches_stand_in_their_rows() -> None:
    R = explained()
    page = R._repr_html_()
    assert R.grid == (2, 2)
    assert page.count("grid-template-columns:repeat(2,1.5em)") == 2
    assert page.count('title="patch ') == 2 * 4
    assert "[CLS]" in page
    assert "grid-template" not in explained("HubertForCTC")._repr_html_()


def test_the_report_shows_the_image(tmp_path: Path) -> None:
    R = explained()
    page = write_report(R, tmp_path / "image.html", image=PHOTO).read_text(encoding="utf-8")
    assert '<h2 id="image">Image</h2>' in page
    assert "an image of 2 x 2 patches" in page
    assert "Relevance of 2 by 2 patches." in page
