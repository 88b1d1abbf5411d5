"""The card that results show in a notebook: escaped, every column, one screen; short reprs."""

from __future__ import annotations

import math
import re
from html.parser import HTMLParser
from typing import Any

import pandas as pd
import pytest

import lenslrp
from lenslrp.ledger import Ledger
from lenslrp.views.cards import ROWS, Face, shown
from tests.unit.tiny import tiny, word_tokenizer


class Cells(HTMLParser):
    """The texts of a card's cells, row by row."""

    def __init__(self, markup: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.inside = False
        self.feed(markup)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self.inside = True

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self.inside = False

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.rows[-1][-1] += data


def test_a_card_shows_every_column_and_says_how_many_rows_it_leaves_out() -> None:
    frame = pd.DataFrame({f"column {i}": range(40) for i in range(30)})
    markup = Face("A result", {"n": 1234, "share": 0.123456, "ok": True}, frame).html()
    rows = Cells(markup).rows
    assert len(rows) == ROWS + 1
    assert rows[0] == list(frame.columns)
    assert "28 more rows: .to_dataframe()" in markup
    assert ">1,234<" in markup and ">0.1235<" in markup and ">yes<" in markup


def test_what_is_long_is_scrolled() -> None:
    markup = Face("A result", body="<p>long</p>").html()
    assert re.search(
        r'<div style="max-height:600px;overflow-y:auto[^"]*"><p>long</p></div>', markup
    )
    assert "max-height" not in Face("A result").html()


def test_everything_given_as_text_is_escaped() -> None:
    hostile = "</div><script>alert(1)</script>"
    frame = pd.DataFrame({hostile: [hostile]})
    markup = Face(hostile, {hostile: hostile}, frame, notes=[hostile]).html()
    assert "<script" not in markup
    assert markup.count("&lt;script&gt;") == 6  # title, label, value, head, cell, note


def test_signed_numbers_share_one_scale_a_column() -> None:
    frame = pd.DataFrame({"relevance": [2.0, -1.0, 0.0, math.nan], "n": [1, 2, 3, 4]})
    markup = Face("R", frame=frame, coloured=["relevance"]).html()
    assert 'style="text-align:right;background:rgba(214,39,55,0.700)"' in markup
    assert 'style="text-align:right;background:rgba(43,120,205,0.350)"' in markup
    assert [row[0] for row in Cells(markup).rows] == ["relevance", "+2.00", "-1.00", "+0.00", "NaN"]


@pytest.mark.parametrize(
    ("value", "text"),
    [(True, "yes"), (12345, "12,345"), (0.00012345, "0.0001234"), (math.nan, "–"), (None, "–"),
     (("a", "b"), "a  b"), ("text", "text")],
)  # fmt: skip
def test_cells(value: Any, text: str) -> None:
    assert shown(value) == text


def account(**terms: float) -> Ledger:
    zero = dict.fromkeys(
        ("biases", "softmax", "positional", "stabiliser", "plain", "nonlinear_target"), 0.0
    )
    return Ledger(**{**zero, **terms}, table=pd.DataFrame())


def test_the_ledger_says_in_a_sentence_where_the_target_went() -> None:
    ledger = account(target=10.0, leaves=4.0, softmax=5.0, biases=1.0, stabiliser=1e-4)
    assert ledger.sentence == (
        "Of the target, 10, 4 (40%) reached the leaves, 5 (50%) stayed in the softmax and 1 (10%) "
        "stayed in biases."
    )
    assert account(target=0.0, leaves=1.0, softmax=-1.0).sentence == (
        "Of the target, 0, 1 reached the leaves and -1 stayed in the softmax."
    )
    assert account(target=2.0, leaves=2.0).sentence == (
        "Of the target, 2, 2 (100%) reached the leaves."
    )


def test_rows_of_a_batch_say_their_target_and_that_scales_differ() -> None:
    bridge = tiny("llama", tokenizer=word_tokenizer())
    _, R = lenslrp.run_with_relevance(bridge, ["a b c", "d e f"], ["g", "h"])
    markup = R._repr_html_()
    for row in (0, 1):
        value = f"{float(R.target.value[row]):.4g}"
        assert f"row {row}, its own scale: {R.target.of(row).split(' at')[0]}" in markup.replace(
            "&#x27;", "'"
        )
        assert f"= {value}" in markup
    many = lenslrp.run_with_relevance(bridge, ["a b c"] * 10, "g")[1]
    assert many._repr_html_().count('class="lenslrp-heatmap"') == 8
    assert "2 more rows: R[row] shows one." in many._repr_html_()


def test_what_is_printed_is_a_line() -> None:
    bridge = tiny("llama", tokenizer=word_tokenizer())
    _, R = lenslrp.run_with_relevance(bridge, "a b c", "g")
    for result in (R, R.coverage, R.ledger(), lenslrp.survey(bridge.original_model.config)):
        assert len(repr(result)) < 300 and "\n" not in repr(result)
        assert 0 < len(result._repr_html_()) < 20_000
