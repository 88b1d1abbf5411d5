"""Figures and the standalone report, on a stand-in result."""

import base64
import re
from types import SimpleNamespace

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from lenslrp.analysis.views import circuitsvis as circuitsvis_safe
from lenslrp.analysis.views import figures as plots
from lenslrp.analysis.views import report
from lenslrp.analysis.views.checks import Checks, HeadRead, Trial
from lenslrp.errors import InputError
from lenslrp.text.visible_text import visible
from tests.unit.fake_relevance import EIFFEL, NASTY, fake_relevance
from tests.unit.views.test_heatmap import Page


@pytest.fixture(scope="module")
def nasty_report():
    R = fake_relevance(NASTY, None, model_name="<b>model</b>")
    R.target.text = "logit of '<script>alert(4)</script>'"
    return report.report_html(R)


@pytest.mark.parametrize("kind", sorted({*plots.PLOTS} - {"image"}))  # text here
@pytest.mark.parametrize("tokens", [EIFFEL, NASTY], ids=["plain", "nasty"])
def test_every_kind_is_a_labelled_figure_without_pyplot(kind, tokens):
    before = dict(matplotlib.rcParams)
    figure = plots.plot(fake_relevance(tokens, None), kind)
    figure.canvas.draw()
    assert isinstance(figure, Figure)
    assert dict(matplotlib.rcParams) == before
    axes = figure.axes[0]
    assert axes.get_title(loc="left")
    assert axes.get_xlabel()


@pytest.mark.parametrize("draw", [plots.residual_map, plots.head_grid])
def test_maps_are_symmetric_red_positive_and_hatched_behind(draw):
    axes = draw(fake_relevance()).axes[0]
    image = axes.images[0]
    low, high = image.get_clim()
    assert low == -high < 0
    assert high == pytest.approx(np.abs(image.get_array()).max())
    red, _, blue, _ = image.cmap(1.0)
    assert red > blue
    assert axes.patch.get_hatch() == "////"


def test_residual_map_leaves_padding_out_and_can_scale_without_the_first():
    tokens = ["pad", "<s>", "a", "b"]
    R = fake_relevance(tokens, [0.0, 50.0, 1.0, 1.0], mask=[False, True, True, True])
    image = plots.residual_map(R).axes[0].images[0]
    assert image.get_array().shape == (13, 3)
    rescaled = plots.residual_map(R, without_first=True).axes[0].images[0]
    assert rescaled.get_clim()[1] == pytest.approx(np.abs(image.get_array()[:, 1:]).max())


def test_waterfall_ends_at_the_target():
    bars = plots.ledger_bars(fake_relevance()).axes[0].patches
    assert bars[-1].get_x() + bars[-1].get_width() == pytest.approx(17.4)
    assert len(bars) == 3


def test_unknown_kind_names_the_kinds():
    with pytest.raises(InputError, match="no plot is called 'pie'; there are 'residual', 'heads'"):
        plots.plot(fake_relevance(), "pie")


def test_report_is_one_file_without_script_or_remote_asset(nasty_report):
    page = Page(re.sub(r"<(meta|img|source)\b", r"<br data-was=\1", nasty_report)[15:])
    assert "script" not in page.elements
    assert not {name for name in page.attributes if name.startswith("on")}
    for url in re.findall(r'(?:src|srcset|href)="([^"]*)"', nasty_report):
        assert url.startswith("data:image/svg+xml;base64,")
    assert "default-src 'none'" in nasty_report


def test_report_shows_nasty_text_as_text(nasty_report):
    page = Page(re.sub(r"<(meta|img|source)\b", r"<br data-was=\1", nasty_report)[15:])
    for token in NASTY:
        assert visible(token) in page.text
    assert "<b>model</b>" in page.text
    assert "logit of '<script>alert(4)</script>'" in page.text


def test_figures_in_the_report_hold_text_not_markup(nasty_report):
    images = re.findall(r"base64,([^\"]+)", nasty_report)
    assert len(images) == 6
    for image in images:
        svg = base64.b64decode(image).decode()
        assert "<script" not in svg
        assert "<img" not in svg


def test_report_of_a_plain_prompt_says_it_all(monkeypatch, tmp_path):
    monkeypatch.setattr(report, "TokenRelations", SimpleNamespace(of=lambda _: "relations"))
    monkeypatch.setattr(report, "labels_of", lambda _: None)
    tokens = {"relations": [" Paris", "<i>"]}
    monkeypatch.setattr(report, "neuron_writes", lambda *_, relations: tokens[relations])
    monkeypatch.setattr(report, "unembedding", lambda _: None)
    model = SimpleNamespace()
    trial = Trial("head 5.3 off", "head 5.1 off", 0.5, 0.125, 0.375)
    head = HeadRead(5, 3, 1.25, ((" Tower", 0.75), ("<b>", 0.25)))
    found = Checks(((" Rome", 0.625),), " Paris", 17, 0.5, (trial,), (head,))
    monkeypatch.setattr(report, "checked", lambda *_: found)
    path = report.write_report(fake_relevance(), tmp_path / "report.html", model=model)
    text = path.read_text(encoding="utf-8")
    for part in (
        "The Eiffel Tower is located in the city of", "17.4", "blocks.7.mlp.hook_post[41]",
        "·Paris", "&lt;i&gt;", "normalisation_identity", "Every operation on the path has a",
        "+3.1e-08", "70.7%", "float32", "a &lt;note&gt;", "AttnLRP", "SmolLM2-135M",
        "prefers-color-scheme:dark", "head 5.3 off", "0.125", "0.375", "agrees", "rank 17",
        "Head 5.3 (+1.25), from the explained position, attends to ·Tower (75%)", "&lt;b&gt; (25%)",
        "Of the target, 17.4, 12.3 (71%) reached the leaves",
    ):  # fmt: skip
        assert part in text
    assert "Left out" not in text and ">next token</th>" in text
    monkeypatch.setattr(report, "labels_of", lambda _: {0: "no", 1: "yes"})
    assert ">class</th>" in report.report_html(fake_relevance(), model=model)
    assert [child.name for child in tmp_path.iterdir()] == ["report.html"]


def test_report_is_the_same_for_the_same_result():
    R = fake_relevance(missing=("residual", "heads"))
    assert report.report_html(R) == report.report_html(R)


def test_sections_without_hooks_are_left_out_with_a_line():
    R = fake_relevance(missing=("heads", "residual", "mlp.hook_post", "ledger"))
    text = report.report_html(R)
    assert text.count('<p class="absent">Left out: ') == 5
    assert "it takes the model; give model= to write_report." in text
    assert "mlp.hook_post was not read" in text
    assert "data:image" not in text


def test_uncovered_operations_are_loud(monkeypatch):
    R = fake_relevance()
    coverage = R.coverage
    coverage.uncovered.append("blocks.3.mlp <ClampBackward>")
    monkeypatch.setattr(type(R), "coverage", coverage)
    text = report.report_html(R)
    assert "1 operations have no" in text
    assert "blocks.3.mlp &lt;ClampBackward&gt;" in text


def test_first_token_dominance_adds_a_rescaled_heatmap():
    values = [60.0, *[1.0] * 8]
    text = report.report_html(fake_relevance(relevance=values))
    assert "Colours scaled without the first token" in text
    assert "colours are scaled without it; it is drawn" in text


@pytest.mark.usefixtures("unchecked")
def test_report_errors(tmp_path):
    with pytest.raises(InputError, match="row is 3, but R holds 1 rows"):
        report.write_report(fake_relevance(), tmp_path / "a.html", row=3)
    with pytest.raises(InputError, match="does not exist; cannot write a.html there"):
        report.write_report(fake_relevance(), tmp_path / "no" / "a.html")
    for several in ([fake_relevance()], (None, fake_relevance())):
        message = f"a report is of one result, not a {type(several).__name__}: give R, the second"
        with pytest.raises(InputError, match=message):
            report.write_report(several, tmp_path / "a.html")
    assert list(tmp_path.iterdir()) == []


def test_circuitsvis_bundle_is_inlined_once_a_page(monkeypatch):
    monkeypatch.setattr(circuitsvis_safe, "_bundle", lambda: "<script>BUNDLE</script>")
    page = circuitsvis_safe.NotebookPage()
    views = [circuitsvis_safe.colored_tokens(["a"], [1.0], page=page) for _ in range(2)]
    html = "".join(view._repr_html_() for view in [*views, views[0]])
    assert [view._repr_html_().count("BUNDLE") for view in views] == [1, 0]
    assert html.count("BUNDLE") == 2  # the holder keeps it when it is displayed again
    assert str(views[1]).count("BUNDLE") == 1


def test_circuitsvis_props_are_symmetric_finite_and_inert():
    view = circuitsvis_safe.colored_tokens(NASTY, [float("nan"), *range(len(NASTY) - 1)])
    bound = len(NASTY) - 2
    assert (view.props["minValue"], view.props["maxValue"]) == (-bound, bound)
    assert view.props["values"][0] is None
    assert "1 of 25 values are not finite" in view.note
    assert not any(re.search(r"<[a-zA-Z/!?]|&[a-zA-Z#]", token) for token in view.props["tokens"])
    html = view._repr_html_()
    assert "<script>alert" not in html
    assert "<img src=x" not in html


def test_circuitsvis_bad_shapes_name_the_shape():
    with pytest.raises(InputError, match=r"attention has shape \(2, 3\), expected 2 dimensions"):
        circuitsvis_safe.attention_heads(torch.zeros(2, 3), ["a", "b"])
    with pytest.raises(InputError, match="head_names has 1 names for 2 heads"):
        circuitsvis_safe.attention_heads(torch.zeros(2, 1, 1), ["a"], head_names=["x"])
    with pytest.raises(InputError, match="scale is -1"):
        circuitsvis_safe.colored_tokens(["a"], [1.0], scale=-1.0)


def test_circuitsvis_missing_says_how_to_install(monkeypatch):
    monkeypatch.setattr(circuitsvis_safe, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install circuitsvis"):
        circuitsvis_safe.colored_tokens(["a"], [1.0])._repr_html_()
