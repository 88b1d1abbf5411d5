"""The HTML heatmap: text stays text, every number is kept, the scale is what the legend says."""

import re
from html.parser import HTMLParser

import pytest
import torch

from lenslrp.errors import InputError
from lenslrp.text.visible_text import visible
from lenslrp.views.heatmap import colour_scale, signed, token_heatmap
from tests.unit.fake_relevance import EIFFEL, EIFFEL_RELEVANCE, NASTY

OURS = {
    "div", "span", "bdi", "br", "style", "details", "summary", "table", "thead", "tbody", "tr",
    "th", "td",
}  # fmt: skip


# Characters that no page may hold, whatever the tokens.
UNSEEN = r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e\ufeff]"


class Page(HTMLParser):
    """Elements, attribute names and text of a fragment, as an HTML parser sees them."""

    def __init__(self, html):
        super().__init__(convert_charrefs=True)
        self.elements, self.attributes, self.titles, self.text = set(), set(), [], ""
        self.open = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.elements.add(tag)
        self.attributes |= {name for name, _ in attributes}
        self.titles += [value for name, value in attributes if name == "title"]
        if tag != "br":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] != ["style"]:
            self.text += data


def opacity(html, position):
    """Signed opacity of the tile at ``position``: positive where it is red."""
    tile = re.search(
        rf"position {position} · [^>]*background-color:rgba\((\d+),[^)]*,([\d.]+)\)", html
    )
    return float(tile[2]) * (1 if int(tile[1]) > 128 else -1)


def test_tokens_are_text_whatever_they_contain():
    page = Page(token_heatmap(NASTY, range(len(NASTY)), title=NASTY[0]))
    assert page.elements <= OURS
    assert page.attributes <= {"class", "style", "title", "dir", "role", "aria-label", "scope"}
    assert page.open == []
    for token in NASTY:
        assert visible(token) in page.text
    assert not re.search(UNSEEN, page.text)


def test_no_token_can_leave_its_tooltip():
    page = Page(token_heatmap(NASTY, [1.0] * len(NASTY)))
    assert len(page.titles) == len(NASTY)
    for token, title in zip(NASTY, page.titles, strict=True):
        assert title.startswith(f"\u2068{visible(token)}\u2069 · position ")


@pytest.mark.parametrize(
    ("token", "shown"),
    [
        (" Paris", "·Paris"),
        ("in the", "in the"),
        ("a  b", "a··b"),
        ("\n\n", "↵↵"),
        ("\t", "⇥"),
        ("\x00", "⟨U+0000⟩"),
        ("a\u200bb", "a⟨U+200B⟩b"),
        ("\u202e", "⟨U+202E⟩"),
        ("\u00a0", "⟨U+00A0⟩"),
        ("\ud800", "⟨U+D800⟩"),
        ("\u3164", "⟨U+3164⟩"),
        ("\u0301", "◌\u0301"),
        ("e\u0301", "e\u0301"),
        ("", "∅"),
        ("\U0001f600", "\U0001f600"),
    ],
)
def test_what_would_not_be_seen_is_shown(token, shown):
    assert visible(token) == shown


def test_colour_is_symmetric_linear_and_red_for_positive():
    html = token_heatmap(["a", "b", "c", "d"], torch.tensor([2.0, -2.0, 1.0, 0.0]))
    assert opacity(html, 0) == -opacity(html, 1) == pytest.approx(2 * opacity(html, 2))
    assert opacity(html, 3) == 0


def test_tooltips_carry_value_and_position_and_the_legend_the_maximum():
    html = token_heatmap(EIFFEL, EIFFEL_RELEVANCE)
    page = Page(html)
    assert "\u2068·Eiffel\u2069 · position 1 · relevance +4.92" in page.titles
    assert "-4.92" in page.text
    assert "largest +4.92 at ·Eiffel (position 1)" in page.text
    assert "sum +12.30" in page.text


def test_without_any_style_the_numbers_stand_beside_the_tokens():
    html = re.sub(r'<style>.*?</style>| style="[^"]*"', "", token_heatmap(EIFFEL, EIFFEL_RELEVANCE))
    assert "The (+1.31) ·Eiffel (+4.92) ·Tower (+2.40) " in Page(html).text


def test_style_rules_touch_only_the_heatmap():
    style = re.search(r"<style>(.*?)</style>", token_heatmap(["a"], [1.0]), re.DOTALL)[1]
    selectors = re.findall(
        r"([^{}]+)\{[^{}]*\}", style.replace("@media (prefers-color-scheme:dark){", "")
    )
    assert selectors
    for selector in ",".join(selectors).split(","):
        assert ".lenslrp-heatmap" in selector


def test_both_themes_are_there():
    html = token_heatmap(["a"], [1.0])
    assert "prefers-color-scheme:dark" in html
    assert 'data-jp-theme-light="false"' in html
    assert 'data-jp-theme-light="true"' in html


def test_nan_and_infinity_are_hatched_and_said():
    html = token_heatmap(["a", "b", "c"], [float("nan"), float("-inf"), 1.0])
    assert html.count("repeating-linear-gradient") == 2
    assert "hatched: not a finite number" in html
    assert "largest +1.00" in Page(html).text
    assert "relevance NaN" in html
    assert "relevance -inf" in html


def test_padding_is_one_chip_and_does_not_set_the_scale():
    html = token_heatmap(["p", "p", "a"], [9.0, 0.5, 1.0], attention_mask=[False, False, True])
    page = Page(html)
    assert "padding ×2, relevance +9.5" in page.text
    assert "padding at column 0-1" in html
    assert "largest +1.00 at a (position 0)" in page.text  # of the text's own tokens
    assert html.count("position 0 · ") == 1 and "position 1 · " not in html


def test_first_token_dominance_is_said_and_the_scale_can_leave_it_out():
    values = [40.0, 1.0, -2.0]
    plain = token_heatmap(["<s>", "a", "b"], values)
    assert "attention sink" in plain
    assert abs(opacity(plain, 2)) < 0.05
    html = token_heatmap(["<s>", "a", "b"], values, without_first=True)
    assert opacity(html, 0) == -opacity(html, 2)
    assert "Scaled without the first token, which holds +40.00" in html
    assert "largest +40.00 at &lt;s&gt;" in re.sub(r"</?(bdi|span)[^>]*>", "", html)


def test_the_first_token_is_the_first_that_is_not_padding():
    scale = colour_scale([0.0, 40.0, 1.0], [False, True, True], without_first=True)
    assert (scale.first, scale.limit, scale.clipped) == (1, 1.0, (1,))


def test_without_first_needs_another_token():
    assert colour_scale([3.0], [True], without_first=True).limit == 3.0


def test_given_scale_clips_and_says_so():
    html = token_heatmap(["a", "b"], [4.0, 1.0], scale=2.0)
    assert opacity(html, 0) == pytest.approx(2 * opacity(html, 1))
    assert "1 beyond the end of the scale" in html


@pytest.mark.parametrize("values", [[0.0, 0.0], [float("nan")] * 2])
def test_nothing_to_scale(values):
    assert "all relevance is 0" in token_heatmap(["a", "b"], values)


def test_no_tokens():
    assert "no tokens" in token_heatmap([], [])


def test_long_prompts_list_the_largest():
    values = list(range(60))
    html = token_heatmap(["a"] * 60, values)
    assert "The 50 largest values" in html
    assert "<td>59</td>" in html
    assert "<td>9</td>" not in html


@pytest.mark.parametrize(
    ("value", "limit", "text"),
    [
        (1.234, 5.0, "+1.23"),
        (-123.4, 500.0, "-123"),
        (2e-5, 3e-5, "+2.00e-05"),
        (0.0, 0.0, "+0.00"),
    ],
)
def test_numbers_keep_the_digits_of_the_scale(value, limit, text):
    assert signed(value, limit) == text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((["a"], [1.0, 2.0], {}), "relevance has 2 values for 1 tokens"),
        ((["a"], torch.zeros(1, 1), {}), r"relevance has shape \(1, 1\).*relevance\[0\]"),
        ((["a"], [1.0], {"attention_mask": [True, True]}), "attention_mask has 2 values"),
        ((["a"], [1.0], {"scale": 0.0}), "scale is 0.0, expected a positive number"),
        ((["a"], [1.0], {"scale": float("nan")}), "scale is nan"),
    ],
)
def test_bad_input(arguments, message):
    tokens, values, options = arguments
    with pytest.raises(InputError, match=message):
        token_heatmap(tokens, values, **options)
