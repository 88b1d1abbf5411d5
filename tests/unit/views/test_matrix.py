"""The matrix of relevance: tokens stay text, one scale holds, empty cells are empty."""

import re

import pytest
import torch

from lenslrp.errors import InputError
from lenslrp.views.matrix import matrix_heatmap
from tests.unit.fake_relevance import NASTY
from tests.unit.views.test_heatmap import OURS, Page

VALUES = torch.tensor([[9.0, -1.0, 0.0], [3.0, 0.5, 2.0]])


def draw(**options):
    return matrix_heatmap(["x", "y"], [".5", ".7"], list("abc"), VALUES, lengths=[2, 3], **options)


def opacities(html):
    return [float(value) for value in re.findall(r"background-color:rgba\([^)]*,([\d.]+)\)", html)]


def test_tokens_are_text_whatever_they_contain():
    size = len(NASTY)
    values = torch.arange(size * size).view(size, size).float()
    page = Page(matrix_heatmap(NASTY, NASTY, NASTY, values, lengths=[size] * size, title=NASTY[0]))
    assert page.elements <= OURS
    assert page.attributes <= {"class", "style", "title", "dir", "role", "aria-label", "scope"}


def test_one_scale_holds_for_all_rows():
    assert opacities(draw()) == pytest.approx([0.7, 0.7 / 9, 0.7 / 3, 0.35 / 9, 1.4 / 9], abs=1e-3)
    page = Page(draw())
    assert "One scale for all rows. The first position outweighs" in page.text.replace(
        "  ", " "
    ) or ("The first position outweighs" in page.text)


def test_the_first_position_can_be_left_out_of_the_scale():
    page = draw(without_first=True)
    assert opacities(page) == pytest.approx([0.7, 0.35, 0.7, 0.175, 0.7], abs=1e-3)
    assert "without the first position, which holds up to +9.00" in page


def test_titles_say_the_exact_numbers():
    titles = Page(draw()).titles
    assert len([title for title in titles if "from" in title]) == 5
    assert "\u2068y\u2069 from \u2068b\u2069 · position 1 · +0.5" in titles


def test_what_is_no_number_is_grey_and_says_so():
    html = matrix_heatmap(["x"], [""], ["a", "b"], torch.tensor([[float("nan"), 1.0]]), lengths=[2])
    assert "background-color:gray" in html and "position 0 · NaN" in html


def test_the_sign_is_seen_without_colour():
    html = matrix_heatmap(
        ["x"], [""], list("abcd"), torch.tensor([[-2.0, 2.0, -0.1, -0.2]]), lengths=[4]
    )
    cells = re.findall(r"<td style[^>]*>([^<]*)</td>", html)
    assert cells == ["\u2212", "", "", "\u2212"] and "\u2212 marks what is negative" in html


def test_a_scale_is_positive():
    with pytest.raises(InputError, match="scale is 0, expected a positive number"):
        draw(scale=0)
